"""The attention seam of every module whose forward calls torch's scaled_dot_product_attention, once, however deep.

Attentions differ in how they make queries, keys and values (rotary embeddings, windows, pooled queries, convolutions,
processors), and agree in the call. So their own forward runs, and the call is given the extended keys, values and mask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from adapterkit.backend import AttentionSeam, Extension, extension_of
from adapterkit.backends.forward_names import mentions
from adapterkit.errors import IncompatibleTargetError

_CALL = F.scaled_dot_product_attention
_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
"""The arguments of scaled_dot_product_attention, in their order."""

_CALLED = frozenset({"scaled_dot_product_attention", "dispatch_attention_fn"})
"""Names of torch's call, and of the function by which diffusers reaches it."""


def attend(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What `module(*args, **kwargs)` computes, over keys and values that the active adapters have extended.

    Raises:
        IncompatibleTargetError: The module does not call scaled_dot_product_attention exactly once.
    """
    extension = extension_of(module)
    forward: Any = type(module).forward
    if extension is None:
        return forward(module, *args, **kwargs)
    calls: list[torch.Size] = []  # counted outside of the mode, whose own attributes torch.compile loses
    with _Extended(extension, calls, type(module).__name__):
        result = forward.__wrapped__(_as_fused(module), *args, **kwargs)
    if len(calls) != 1:
        raise IncompatibleTargetError(_uncounted(type(module).__name__, "did not call"))
    return result


class CalledAttentionSeam(AttentionSeam):
    """Reaches attentions that call scaled_dot_product_attention exactly once in a forward.

    While a prefix acts, timm's switch `fused_attn` reads as on.
    """

    forward: ClassVar[Callable[..., Any] | None] = staticmethod(attend)

    def refusal(self, module: nn.Module) -> str | None:
        if calls_attention(module):
            return None
        return (
            f"the keys and values of {type(module).__name__} cannot be extended: its forward does not call "
            "scaled_dot_product_attention"
        )

    def attend_refusal(self, module: nn.Module) -> str | None:
        return self.refusal(module)


def calls_attention(module: nn.Module) -> bool:
    """Whether the code of a module's forward, or of what it calls, mentions torch's attention. Nothing is run."""
    return mentions(module, _CALLED)


def _as_fused(module: nn.Module) -> Any:
    return module if module.__dict__.get("fused_attn", True) else _FusedView(module)


class _FusedView:
    """A module as it is, but for `fused_attn`."""

    fused_attn = True

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _uncounted(name: str, how: str) -> str:
    return (
        f"{name} {how} scaled_dot_product_attention once in its forward, so its keys and values cannot be extended: "
        "choose other targets than attention points"
    )


class _Inner(TorchFunctionMode):
    """Hides what runs inside from the seams of modules around: theirs is their own call alone."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # The same function by a name that no seam looks for.
        func = torch.ops.aten.scaled_dot_product_attention if func is _CALL else func
        return func(*args, **(kwargs or {}))


class _Extended(TorchFunctionMode):
    """Inside it, scaled_dot_product_attention gets the extension's keys, values and mask, and its own beside."""

    def __init__(self, extension: Extension, calls: list[torch.Size], name: str) -> None:
        super().__init__()
        self.extension, self.calls, self.name = extension, calls, name

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not _CALL:
            return func(*args, **(kwargs or {}))
        given = {**dict(zip(_NAMES, args, strict=False)), **(kwargs or {})}
        query, key, value = (given.pop(name) for name in _NAMES[:3])
        if self.calls:
            raise IncompatibleTargetError(_uncounted(self.name, "called more than"))
        self.calls.append(query.shape)
        mask = given.pop("attn_mask", None)
        with _Inner():
            return _in_four(self._attend, query, key, value, mask, given, self.extension.kv_heads)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]
    ) -> Tensor:
        repeats, odd = divmod(key.shape[1], self.extension.kv_heads)
        if odd or key.shape[1] != value.shape[1]:
            raise IncompatibleTargetError(
                f"{self.name} attends with {key.shape[1]} heads of keys and not with {self.extension.kv_heads}, as its "
                "layers tell, so its keys and values cannot be extended: choose other targets than attention points"
            )
        causal = options.pop("is_causal", False)
        if repeats > 1:  # the module has repeated each head for the queries that share it
            key, value, options = key[:, ::repeats], value[:, ::repeats], {**options, "enable_gqa": True}
        keys, values, mask = self.extension.extend(key, value, mask, queries=query.shape[2], causal=causal)
        # An extended mask is explicit; what torch calls causal would count from the prefix.
        causal = causal and keys is key
        output = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, is_causal=causal, **options)
        return self.extension.attend(query, key, value, output, scale=options.get("scale"))


def _in_four(
    attend: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    options: dict[str, Any],
    heads: int,
) -> Tensor:
    """An attention of tensors [batch, heads, length, head_dim], for tensors that have more dimensions, or fewer.

    Args:
        attend: It.
        query, key, value: [batch * heads, length, head_dim], or [batch, heads, windows..., length, head_dim].
        mask: Broadcastable to [..., queries, length].
        options: What else it is given.
        heads: Of keys and values.
    """
    if query.dim() == 3:
        rows = len(key) // heads
        each = mask is not None and mask.dim() == 3 and len(mask) > 1
        mask = mask.reshape(rows, -1, *mask.shape[1:]) if mask is not None and each else mask
        parts = [part.reshape(rows, -1, *part.shape[1:]) for part in (query, key, value)]
        return attend(*parts, _wide(mask, 4), options).flatten(0, 1)
    if query.dim() == 4:
        return attend(query, key, value, _wide(mask, 4), options)
    # Windows stand between heads and tokens. They join the batch.
    mask, lead = _wide(mask, query.dim()), (len(query), *query.shape[2:-2])
    if mask is not None and (len(mask), *mask.shape[2:-2]) != (1,) * len(lead):
        mask = mask.expand(lead[0], -1, *lead[1:], -1, -1)
    folded = attend(*map(_fold, (query, key, value)), None if mask is None else _fold(mask), options)
    return folded.reshape(*lead, *folded.shape[1:]).movedim(-3, 1)


def _wide(mask: Tensor | None, dimensions: int) -> Tensor | None:
    return None if mask is None else mask[(None,) * (dimensions - mask.dim())]


def _fold(x: Tensor) -> Tensor:
    """[batch, heads, windows..., length, width] -> [batch * windows..., heads, length, width]."""
    return x.movedim(1, -3).flatten(0, -4)
