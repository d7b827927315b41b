"""The attention seam of modules that compute their softmax themselves: matmul, softmax, matmul, in their own forward.

Their forward runs as it is, and what it computes is watched: which scores are a product of queries and keys, by which
number they are scaled, what their softmax is, and which values it mixes. With the sum z of the exponentials of all
logits, further keys k' and values v' make of the mixed values y

    (z y + exp(s q k') v') / (z + sum exp(s q k'))

so that no mask, bias or shape of the module's own has to fit more keys.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from adapterkit.backend import AttentionSeam, Extension, extension_of
from adapterkit.backends.forward_names import mentions
from adapterkit.errors import IncompatibleTargetError

_SOFTMAX = frozenset({"softmax", "Softmax"})
_PRODUCTS = frozenset({"matmul", "__matmul__", "bmm"})
_SCALES: Mapping[str, int] = {
    **dict.fromkeys(("mul", "__mul__", "__rmul__", "mul_", "__imul__", "multiply"), 1),
    **dict.fromkeys(("div", "__truediv__", "div_", "__itruediv__", "true_divide"), -1),
}
_SUMS = frozenset({"add", "__add__", "__radd__", "add_", "__iadd__", "__sub__", "sub", "masked_fill", "masked_fill_"})
_BOUNDS = frozenset({"where", "max", "maximum", "clamp", "clip"})
"""By which scores are masked, too."""

_CASTS = frozenset({"to", "float", "type", "type_as", "half", "contiguous", "view", "reshape", "clone", "dropout"})


@dataclass(frozen=True)
class _Scores:
    """A tensor that is a product of queries and keys, scaled and masked.

    Attributes:
        query, keys: [..., queries, width] and [..., length, width].
        scale: Of the product.
        total: Logarithm of the sum of the exponentials [..., queries, 1], where it is their softmax by now.
    """

    query: Tensor
    keys: Tensor
    scale: float = 1.0
    total: Tensor | None = None


def attend(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What `module(*args, **kwargs)` computes, over keys and values that the active adapters have extended.

    Raises:
        IncompatibleTargetError: The module does not mix values by one softmax of one product of queries and keys.
    """
    extension = extension_of(module)
    forward: Any = type(module).forward
    if extension is None:
        return forward(module, *args, **kwargs)
    watch = _Watch(extension)
    with watch:
        result = forward.__wrapped__(module, *args, **kwargs)
    if watch.mixed != 1:
        raise IncompatibleTargetError(
            f"{type(module).__name__} mixes values by a softmax over keys {watch.mixed} times, not once; its keys and "
            "values cannot be extended: choose other targets than attention points"
        )
    return result


class ComputedAttentionSeam(AttentionSeam):
    """Reaches attentions whose forward multiplies queries and keys, takes a softmax, and multiplies by values."""

    forward: ClassVar[Callable[..., Any] | None] = staticmethod(attend)

    def refusal(self, module: nn.Module) -> str | None:
        if mentions(module, _SOFTMAX):
            return None
        return f"{type(module).__name__} has no softmax over keys in its forward, so that no keys can be put beside"

    def attend_refusal(self, module: nn.Module) -> str | None:
        return self.refusal(module)


class _Watch(TorchFunctionMode):
    """Inside it, mixed values are those with the extension's further keys and values."""

    def __init__(self, extension: Extension) -> None:
        super().__init__()
        self.extension, self.mixed = extension, 0
        self._known: dict[int, tuple[Tensor, _Scores]] = {}  # with the tensor, whose id must not be used again

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "einsum" and (product := _as_product(args)) is not None:
            name, args, func = "matmul", product, torch.matmul
        if name == "baddbmm" and len(args) == 3:  # scores that a mask is added to
            return self._known_as(func(*args, **kwargs), _Scores(args[1], args[2].mT, kwargs.get("alpha", 1.0)))
        before = [self._of(value) for value in args[:3]]
        if name in _PRODUCTS and before[0] is not None and before[0].total is not None:
            return self._mix(func(*args, **kwargs), before[0], before[0].total, args[1])
        result = func(*args, **kwargs)
        scores = self._after(name, args, kwargs, before) if isinstance(result, Tensor) else None
        return result if scores is None else self._known_as(result, scores)

    def _known_as(self, result: Tensor, scores: _Scores) -> Tensor:
        self._known[id(result)] = (result, scores)
        return result

    def _of(self, value: object) -> _Scores | None:
        found = self._known.get(id(value))
        return None if found is None else found[1]

    def _after(self, name: str, args: Any, kwargs: Any, before: list[_Scores | None]) -> _Scores | None:
        """What the result is of the call, where it is scores."""
        if name in _PRODUCTS and len(args) == 2:
            return _Scores(args[0], args[1].transpose(-2, -1))
        told = [one for one in before if one is not None]
        if len(told) != 1:  # of two, which are the keys cannot be told
            return None
        if name in _SCALES and told[0].total is None:
            return _scaled(told[0], args, before, _SCALES[name])
        if name == "softmax" and told[0].total is None and _over_keys(args, kwargs):
            return replace(told[0], total=torch.logsumexp(args[0], dim=-1, keepdim=True))
        return told[0] if name in _CASTS or (name in _SUMS | _BOUNDS and told[0].total is None) else None

    def _mix(self, output: Tensor, scores: _Scores, total: Tensor, values: Tensor) -> Tensor:
        """Mixed values [..., queries, width], with those of the extension."""
        self.mixed += 1
        query, keys, values, total = (self._by_heads(part) for part in (scores.query, scores.keys, values, total))
        mixed = self._by_heads(output)
        longer, more, mask = self.extension.extend(keys, values, None, queries=query.shape[2], causal=False)
        added = longer.shape[2] - keys.shape[2]
        if added:
            logits = scores.scale * query @ longer[:, :, :added].mT
            logits = logits if mask is None else _biased(logits, mask[..., :added])
            whole = torch.logaddexp(total, logits.logsumexp(dim=-1, keepdim=True))
            mixed = (total - whole).exp() * mixed + (logits - whole).exp() @ more[:, :, :added]
        mixed = self.extension.attend(query, keys, values, mixed, scale=scores.scale)
        return mixed.reshape(output.shape).to(output.dtype)

    def _by_heads(self, part: Tensor) -> Tensor:
        """[batch, heads, length, width], where heads are in the batch."""
        if part.ndim == 4:
            return part
        heads = self.extension.kv_heads
        if part.ndim != 3 or part.shape[0] % heads:
            raise IncompatibleTargetError(
                f"an attention computes with tensors {tuple(part.shape)}, of which the heads are not known; its keys "
                "and values cannot be extended"
            )
        return part.unflatten(0, (-1, heads))


def _as_product(args: Any) -> tuple[Tensor, Tensor] | None:
    """The factors of a product of matrices that is written as a sum: "bhid,bhjd->bhij", "bhij,bhjd->bhid"."""
    if len(args) == 2 and isinstance(args[1], list | tuple):
        args = (args[0], *args[1])
    if len(args) != 3 or not isinstance(args[0], str):
        return None
    left, _, right = args[0].replace(" ", "").replace("->", ",").partition(",")
    right, _, out = right.partition(",")
    lead = out[:-2]
    if not (left[:-2] == right[:-2] == lead and len(out) > 2 and out[-2] == left[-2]):
        return None
    if left[-1] == right[-1] and out[-1] == right[-2]:
        return args[1], args[2].transpose(-2, -1)
    return (args[1], args[2]) if left[-1] == right[-2] and out[-1] == right[-1] else None


def _scaled(scores: _Scores, args: Any, before: list[_Scores | None], power: int) -> _Scores | None:
    other = args[1] if before[0] is not None else args[0]
    if isinstance(other, Tensor):
        return replace(scores, scale=scores.scale * float(other) ** power) if other.ndim == 0 else None
    return replace(scores, scale=scores.scale * float(other) ** power)


def _over_keys(args: Any, kwargs: Any) -> bool:
    dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
    return dim in (-1, args[0].ndim - 1)


def _biased(logits: Tensor, mask: Tensor) -> Tensor:
    return logits.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else logits + mask
