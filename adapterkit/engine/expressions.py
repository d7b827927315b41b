"""Adapters that act as one at a point: what an expression of names is there."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adapterkit.adapter import AdapterModule, Base
from adapterkit.composition import Average, Composition, Expression, Split, Stack, names_of
from adapterkit.contract.abilities import Abilities
from adapterkit.engine.bases import Computed
from adapterkit.errors import NotMergeableError, RoutingError
from adapterkit.kernels.packed_documents import Documents
from adapterkit.kernels.sums import Acting, Active, Strength, combine, effects, is_one, merge_weights

_SPANS = "every token span has an adapter of its own, and one weight serves all tokens"


def acting_at(expression: Expression, modules: Mapping[str, AdapterModule]) -> Acting | None:
    """What acts for an expression among the adapters of one point; None where none of them is there."""
    if isinstance(expression, str):
        module = modules.get(expression)
        return module if module is None or not module.parts else Combined(module, modules)
    parts = [acting_at(part, modules) for part in expression.parts]
    if not any(part is not None for part in parts):
        return None
    return _composed(expression, parts)


def taken_apart(expression: Expression, modules: Mapping[str, Any]) -> Iterator[Acting]:
    """What acts for an expression at one point, where adapters in it that are `outermost` stand for themselves."""
    outer = [] if isinstance(expression, str) else [n for n in names_of(expression) if is_outermost(modules.get(n))]
    acting = acting_at(expression, {name: one for name, one in modules.items() if name not in outer})
    if acting is not None:
        yield acting
    yield from (modules[name] for name in outer)


def acting_alone(expression: Expression, modules: Mapping[str, AdapterModule]) -> Acting | None:
    """What acts for an expression where no other does; None where nothing is there."""
    active = outermost_last([(acting, 1.0) for acting in taken_apart(expression, modules)])
    return active[0][0] if active else None


def is_outermost(adapter: object) -> bool:
    """Whether an adapter acts around all others; see `AdapterModule.outermost`."""
    return getattr(adapter, "outermost", False)


def _composed(expression: Composition, parts: Sequence[Acting | None]) -> Acting:
    if isinstance(expression, Split):
        bounds = zip(parts, expression.bounds, strict=True)
        return Spread([(part, span) for part, span in bounds if part is not None])
    present = [part for part in parts if part is not None]
    if isinstance(expression, Stack):
        return Stacked(present)
    # An adapter that is not at this point has no effect here, and counts in the mean.
    once = len(parts) if isinstance(expression, Average) else 1
    if len(present) == once and (len(set(expression.parts)) == 1 or len(set(map(id, present))) == 1):
        return present[0]
    return Summed(present, 1 / len(parts) if isinstance(expression, Average) else 1.0)


def outermost_last(active: Active) -> Active:
    """The same, where adapters that are `outermost` act around all others, whose base they would else not share."""
    outer = [one for one in active if is_outermost(one[0])]
    if not outer:
        return active
    inner = [one for one in active if not is_outermost(one[0])]
    around = [adapter if is_one(weight) else Together([(adapter, weight)]) for adapter, weight in outer]
    parts = [Together(inner), *around] if inner else around
    return [(Stacked(parts) if len(parts) > 1 else parts[0], 1.0)]


def flattened(active: Active) -> Active:
    """The same adapters without what puts them together, in the order in which they extend keys and values."""
    return [*_flat(active)]


def _flat(active: Active) -> Iterator[tuple[Acting, Strength]]:
    for adapter, weight in active:
        if isinstance(adapter, Several) and adapter.inner is not None:
            yield from ((part, weight * scale) for part, scale in _flat(adapter.inner))  # type: ignore[operator]
        else:
            yield adapter, weight


class Several:
    """Adapters that act as one."""

    abilities: Abilities = Abilities()
    scalable = True
    parts: Sequence[Acting] = ()

    def sees(self, x: Tensor, base: Base) -> Tensor:
        """See `AdapterModule.sees`: what the last of them sees."""
        return self.parts[-1].sees(x, base) if self.parts else base.norm_out(base(x) + x)  # type: ignore[attr-defined]

    @property
    def inner(self) -> Active | None:
        """The parts with their weights, for what is asked of one after the other: keys, values, positions.

        None where it is asked itself.
        """
        return None

    def parameters(self) -> Iterator[nn.Parameter]:
        """Those of the parts."""
        for part in self.parts:
            yield from part.parameters()

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Not asked: `flattened` takes the parts out."""
        raise NotImplementedError

    def lengthen(self, tokens: Tensor) -> Tensor:
        """Not asked either."""
        raise NotImplementedError


class Together(Several):
    """Adapters that act beside one another with their weights, as one; see `combine`."""

    def __init__(self, active: Active) -> None:
        self.active, self.parts = active, [adapter for adapter, _ in active]

    def __call__(self, x: Tensor, base: Base) -> Tensor:
        return combine(x, base, self.active)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        raise NotMergeableError("what acts below an outermost adapter has no weight of its own")


class Stacked(Several):
    """See `adapterkit.composition.Stack`."""

    def __init__(self, parts: Sequence[Acting]) -> None:
        self.parts = parts

    @property
    def inner(self) -> Active:
        return [(part, 1.0) for part in self.parts]

    def __call__(self, x: Tensor, base: Base) -> Tensor:
        for part in self.parts[:-1]:
            base = Nested(part, base, x)
        return self.parts[-1](x, base)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        for part in self.parts:
            weight, bias = part.merged(weight, bias)
        return weight, bias


class Nested(Computed):
    """A base with an adapter around it, as the base of the next."""

    def __init__(self, adapter: Acting, base: Base, x: Tensor) -> None:
        super().__init__(lambda given: adapter(given, base), x)
        self._adapter, self._base = adapter, base

    @property
    def context(self) -> Mapping[str, Tensor]:
        return self._base.context

    @property
    def weight(self) -> Tensor:
        return self._merged()[0]

    @property
    def bias(self) -> Tensor | None:
        return self._merged()[1]

    def layer(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._base.layer(x, weight, bias)  # type: ignore[attr-defined]

    @torch.no_grad()
    def _merged(self) -> tuple[Tensor, Tensor | None]:
        return self._adapter.merged(self._base.weight, self._base.bias)  # type: ignore[attr-defined]

    def norm_in(self, x: Tensor) -> Tensor:
        return self._base.norm_in(x)  # type: ignore[attr-defined]

    def norm_out(self, x: Tensor) -> Tensor:
        return self._base.norm_out(x)  # type: ignore[attr-defined]

    @property
    def documents(self) -> Documents | None:
        return self._base.documents  # type: ignore[attr-defined]

    @property
    def keys(self) -> Tensor:
        return self._base.keys  # type: ignore[attr-defined]

    @property
    def values(self) -> Tensor:
        return self._base.values  # type: ignore[attr-defined]

    def mix(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return self._base.mix(query, keys, values)  # type: ignore[attr-defined]

    def project(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return self._base.project(tokens)  # type: ignore[attr-defined]


class Summed(Several):
    """Side by side on one base: the sum of their effects, each times `weight`."""

    abilities: Abilities = Abilities(several=True)

    def __init__(self, parts: Sequence[Acting], weight: float) -> None:
        self.parts, self.weight = parts, weight

    @property
    def inner(self) -> Active:
        return [(part, self.weight) for part in self.parts]

    def __call__(self, x: Tensor, base: Base) -> Tensor:
        y = base(x)
        return y + self.effect(x, y, base)

    def effect(self, x: Tensor, y: Tensor, base: Base) -> Tensor:
        """What they add to `y`, which is `base(x)`."""
        return effects(x, y, base, self.inner)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return merge_weights(weight, bias, self.inner)


class Spread(Several):
    """See `adapterkit.composition.Split`."""

    def __init__(self, parts: Sequence[tuple[Acting, tuple[int, int | None]]]) -> None:
        self.parts, self.bounds = [part for part, _ in parts], [span for _, span in parts]

    def __call__(self, x: Tensor, base: Base) -> Tensor:
        y = base(x)
        if y.ndim < 3:
            raise RoutingError(
                f"Split gives every token span its own adapter, but an output {tuple(y.shape)} has no axis of tokens: "
                "expected [batch, length, features]. Leave out what acts there (pooled heads, experts)"
            )
        _check_spans(self.bounds, y.shape[-2])
        total = torch.zeros_like(y)
        for part, (start, stop) in zip(self.parts, self.bounds, strict=True):
            # The whole is computed, and the span of it taken: an adapter may look at all tokens.
            effect = part(x, base) - y
            total[..., start:stop, :] += effect[..., start:stop, :]
        return y + total

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """There is no such weight."""
        raise NotMergeableError(_SPANS)


def _check_spans(bounds: Sequence[tuple[int, int | None]], length: int) -> None:
    """Raises RoutingError where spans that are counted from different ends meet in a sequence of this length."""
    spans = sorted(slice(*span).indices(length)[:2] for span in bounds)
    for (_, stop), (start, _) in itertools.pairwise(span for span in spans if span[0] < span[1]):
        if start < stop:
            raise RoutingError(f"the spans {[*bounds]} of Split overlap in a sequence of {length} tokens")


class Combined(Several):
    """An adapter that combines others; see `AdapterModule.combine`."""

    def __init__(self, module: AdapterModule, modules: Mapping[str, AdapterModule]) -> None:
        self.module = module
        self.scalable = module.scalable
        self.parts = [acting_at(name, modules) or Nothing() for name in module.parts]

    def parameters(self) -> Iterator[nn.Parameter]:
        """Its own, and those of the parts."""
        yield from self.module.parameters()
        yield from super().parameters()

    def __call__(self, x: Tensor, base: Base) -> Tensor:
        return self.module.combine(x, base, self.parts)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.module.merged(weight, bias)


class Nothing(Several):
    """A part that is not at this point: it has no effect."""

    def __call__(self, x: Tensor, base: Base) -> Tensor:
        """The base."""
        return base(x)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The base's."""
        return weight, bias
