"""The attention seam of timm's other attentions: those that can call torch's scaled_dot_product_attention, once.

They differ in how they make queries, keys and values (rotary embeddings, windows, pooled queries, position biases), and
agree in the call. So their own forward runs, on a view of the module that says `fused_attn`, and the call is given the
extended keys and values.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from adapterkit.backend import AttentionSeam, Extension, extension_of
from adapterkit.errors import IncompatibleTargetError

_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
"""The arguments of scaled_dot_product_attention, in their order."""


def attend(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What `module(*args, **kwargs)` computes, over keys and values that the active adapters have extended.

    Raises:
        IncompatibleTargetError: The module does not call scaled_dot_product_attention exactly once.
    """
    forward = inspect.unwrap(type(module).forward)
    extension = extension_of(module)
    if extension is None:
        return forward(module, *args, **kwargs)
    calls: list[torch.Size] = []  # counted outside of the mode, whose own attributes torch.compile loses
    with _Extended(extension, calls):
        result = forward(_FusedView(module), *args, **kwargs)
    if len(calls) != 1:
        raise IncompatibleTargetError(
            f"{type(module).__name__} called scaled_dot_product_attention {len(calls)} times, not once; its keys "
            "and values cannot be extended: choose other targets than attention points"
        )
    return result


class FusedAttentionSeam(AttentionSeam):
    """Reaches attentions that have timm's switch `fused_attn`. While a prefix acts, the switch reads as on."""

    forward: ClassVar[Callable[..., Any] | None] = staticmethod(attend)

    def refusal(self, module: nn.Module) -> str | None:
        if hasattr(module, "fused_attn"):
            return None
        return (
            f"the keys and values of {type(module).__name__} cannot be extended: it has no `fused_attn`, by which "
            "timm's attentions say that they can call scaled_dot_product_attention"
        )

    def attend_refusal(self, module: nn.Module) -> str | None:
        return self.refusal(module)


class _FusedView:
    """A module as it is, but for `fused_attn`."""

    fused_attn = True

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class _Extended(TorchFunctionMode):
    """Inside it, scaled_dot_product_attention gets the extension's keys, values and mask, and its own beside."""

    def __init__(self, extension: Extension, calls: list[torch.Size]) -> None:
        super().__init__()
        self.extension, self.calls = extension, calls

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        given = {**dict(zip(_NAMES, args, strict=False)), **(kwargs or {})}
        query, key, value = (given.pop(name) for name in _NAMES[:3])
        self.calls.append(query.shape)
        if query.dim() == 4:
            return self._attend(query, key, value, given)
        # Windows stand between heads and tokens: [batch, heads, windows, length, head_dim]. They join the batch.
        folded = self._attend(_fold(query), _fold(key), _fold(value), given)
        return folded.unflatten(0, (query.shape[0], query.shape[2])).transpose(1, 2)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> Tensor:
        mask, causal = options.pop("attn_mask", None), options.pop("is_causal", False)
        keys, values, mask = self.extension.extend(key, value, mask, queries=query.shape[2], causal=causal)
        # An extended mask is explicit; what torch calls causal would count from the prefix.
        causal = causal and keys is key
        output = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, is_causal=causal, **options)
        return self.extension.attend(query, key, value, output, scale=options.get("scale"))


def _fold(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(0, 1)
