"""Attention points: a prefix acts as an explicit softmax over its keys and those of the model says."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import adapterkit as ak
from adapterkit.points import AttentionPoint, InjectionPoint
from adapterkit.testing.proofs.bench import (
    NAME,
    NEAR,
    ROUNDING,
    TIGHT,
    Bench,
    Outputs,
    Refuted,
    convicted,
    difference,
    judged,
)
from adapterkit.testing.proofs.verdicts import Verdict
from adapterkit.testing.subject import randomise

BY_LIMITS = "by limits"
"""Why a point is proven whose module does not call torch's attention once: in the limits, and not by the equation."""

_LENGTH = 2
_FAINT, _HUGE = 1e-200, 1e200

Prefixes = Mapping[str, tuple[Tensor, Tensor]]
"""Path of an attention module -> keys [kv_heads, length, head_dim] and values [kv_heads, length, value_width]."""


class Calls(TorchFunctionMode):
    """Sees the calls of torch's scaled dot product attention within some modules' forwards.

    Attributes:
        seen: Path of a module -> how many calls each of its forwards made.
        arguments: Path -> query, key and value of its last call, where they are to be kept.
    """

    def __init__(self, model: nn.Module, paths: Sequence[str]) -> None:
        super().__init__()
        self.seen: dict[str, list[int]] = {path: [] for path in paths}
        self.arguments: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        self._model, self._stack = model, list[str]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or not self._stack:
            return func(*args, **kwargs)
        path = self._stack[-1]
        self.seen[path][-1] += 1
        return self.attend(path, *args, **kwargs)

    def attend(self, path: str, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The call itself."""
        self.arguments[path] = query, key, value
        return F.scaled_dot_product_attention(query, key, value, *args, **kwargs)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks tell whose forward is under way."""
        hooks = [hook for path in self.seen for hook in self._hooks(path)]
        try:
            with self:
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def _hooks(self, path: str) -> Iterator[Any]:
        def enter(*_: Any) -> None:
            self._stack.append(path)
            self.seen[path].append(0)

        module = self._model.get_submodule(path)
        yield module.register_forward_pre_hook(enter)
        yield module.register_forward_hook(lambda *_: self._stack.pop() and None, always_call=True)


class Reference(Calls):
    """In the place of each call: an explicit softmax in float64, over keys of a prefix and the call's own.

    Args:
        model, prefixes: Whose calls, and what is put in front of their keys.
        nearest: A bias by distance meets the prefix as it meets the nearest key, and not with zero.
    """

    def __init__(self, model: nn.Module, prefixes: Prefixes, *, nearest: bool) -> None:
        super().__init__(model, list(prefixes))
        self._prefixes, self._nearest = prefixes, nearest

    def attend(
        self,
        path: str,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        keys, values = self._prefixes[path]
        mask = _additive(attn_mask, query.shape[-2], key.shape[-2], causal=is_causal)
        front = mask.amax(-1, keepdim=True) if self._nearest else mask.new_zeros(())
        mask = torch.cat([front.expand(*mask.shape[:-1], keys.shape[-2]), mask], -1)
        key, value = (_in_front(front, rest) for front, rest in ((keys, key), (values, value)))
        if key.shape[1] != query.shape[1]:  # grouped heads
            key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], 1) for part in (key, value))
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        logits = factor * (query.double() @ key.double().mT) + mask
        return (logits.softmax(-1) @ value.double()).to(query.dtype)


def _additive(mask: Tensor | None, queries: int, keys: int, *, causal: bool) -> Tensor:
    """A mask that is added to logits, with one column for each key."""
    if causal:
        mask = torch.ones(queries, keys, dtype=torch.bool).tril()
    if mask is None:
        return torch.zeros(1, keys, dtype=torch.float64)
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, float("-inf"))
    return mask.double().expand(*mask.shape[:-1], keys)


def _in_front(front: Tensor, rest: Tensor) -> Tensor:
    """Positions in front of the keys or values [batch, heads, length, width] of a call, repeated where it is."""
    front = front.to(rest).repeat_interleave(rest.shape[1] // front.shape[0], 0)
    return torch.cat([front.expand(rest.shape[0], -1, -1, -1), rest], 2)


def prove_attentions(bench: Bench, points: Sequence[InjectionPoint]) -> list[Verdict]:
    """Verdicts on attention points."""
    found = [point for point in points if isinstance(point, AttentionPoint)]
    idle = {point.id: "no call runs this attention" for point in found if point.path not in bench.ran}
    here = [point for point in found if point.id not in idle]
    counted = _counted(bench, here)
    by_equation = [point for point in here if counted[point.path]]
    by_limits = [point for point in here if not counted[point.path]]
    wrong = convicted(by_equation, lambda some: _equation(bench, some))
    for point in by_limits:
        wrong |= convicted([point], lambda some: _limits(bench, some))
    limited = {point.id for point in by_limits}
    return judged(found, wrong, idle, lambda point: BY_LIMITS if point.id in limited else "attention equation")


def _counted(bench: Bench, points: Sequence[InjectionPoint]) -> dict[str, bool]:
    """Path -> whether each of the module's forwards calls torch's attention once, for one point."""
    calls = Calls(bench.model, sorted({point.path for point in points}))
    with calls.watching():
        bench.outputs()
    paths = Counter(point.path for point in points)
    shapes = {path: all(part.ndim == 4 for part in parts) for path, parts in calls.arguments.items()}
    return {path: set(seen) == {1} and paths[path] == 1 and shapes[path] for path, seen in calls.seen.items()}


def _equation(bench: Bench, points: Sequence[InjectionPoint]) -> None:
    with bench.adapted(ak.Prefix(length=_LENGTH), points) as adapters:
        randomise(adapters, NAME)
        found = bench.outputs()
        modules: Any = adapters.modules(NAME)
        prefixes: dict[str, Any] = {point.path: (modules[point.id].keys, modules[point.id].values) for point in points}
        with adapters.disabled():
            told = [_unlike(bench, found, Reference(bench.model, prefixes, nearest=one)) for one in (False, True)]
    if all(told):
        raise Refuted(f"not softmax(q [P; k]) [P; v]: {told[0]}")
    if not bench.changed_in(found):
        raise Refuted("a prefix changes nothing")


def _unlike(bench: Bench, found: Outputs, reference: Reference) -> str:
    """In what outputs are other than those of a reference; "" where they are the same."""
    with reference.watching():
        expected = bench.outputs()
    for label, output in found.items():
        if (distance := difference(output, expected[label])) > TIGHT:
            return f"other by {distance:.1e} of the largest value, in call {label!r}"
    return ""


def _limits(bench: Bench, points: Sequence[InjectionPoint]) -> None:
    """A faint prefix is the base; of an overwhelming one of one position the keys do not matter; a plain one acts.

    What must not be is measured by what must: a model may hear little of one attention.
    """
    with bench.adapted(ak.Prefix(length=1), points) as adapters:
        randomise(adapters, NAME)
        if (effect := _distance(bench.outputs(), bench.base)) < ROUNDING:
            raise Refuted("a prefix changes nothing")
        with adapters.activated({NAME: _FAINT}):
            if _distance(bench.outputs(), bench.base) > NEAR * effect:
                raise Refuted(f"a prefix of weight {_FAINT:g} is not the base")
        module: Any = adapters.modules(NAME)[points[0].id]
        with adapters.activated({NAME: _HUGE}):
            alone = bench.outputs()
            _shift(module.keys)
            by_keys = _distance(bench.outputs(), alone)
            _shift(module.values)
            by_values = _distance(bench.outputs(), alone)
        if by_values < ROUNDING:
            raise Refuted("a prefix that has all of the mass does not depend on its values")
        if by_keys > NEAR * by_values:
            raise Refuted("a prefix that has all of the mass depends on its keys")


@torch.no_grad()
def _shift(tensor: Tensor) -> None:
    tensor.copy_(tensor.flip(-1) * 0.7 + 0.1)


def _distance(one: Outputs, other: Outputs) -> float:
    return max(difference(output, other[label]) for label, output in one.items())
