"""The contract: what an adapter type is.

A type is one frozen dataclass (`AdapterConfig`) that says what to add, and one small module (`AdapterModule`) that it
builds at each injection point. Merging, saving, mixing, switching and reporting come from here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adapterkit.contract.abilities import Abilities, by_default
from adapterkit.contract.base import Attention, Base, Part, Sublayer, WeightBase
from adapterkit.contract.config import AdapterConfig
from adapterkit.contract.factors import Factors
from adapterkit.errors import NotMergeableError
from adapterkit.kernels import low_rank
from adapterkit.kernels.sums import check_shape, checked_merged, fitted, place_of

__all__ = [
    "AdapterConfig",
    "AdapterModule",
    "AdditiveModule",
    "Attention",
    "Base",
    "Factors",
    "Part",
    "Sublayer",
    "WeightBase",
    "checked_merged",
]


class AdapterModule(nn.Module):
    """What a config builds at one point.

    Final classes override `forward`, or `merged` alone, which then is called in every forward; at an attention point
    `extend` or `attend`, where sequences get longer `lengthen`.

    Attributes:
        at: Id of the point that it was built for, for messages.
        parts: Names of the other adapters that this one combines; see `combine`.
        scalable: Whether it can act with another weight than 1, and beside others at its point.
        outermost: Whether it acts around what all others at its point make together, in whatever order they are named:
            it chooses the input that they are given. Where it is not `scalable` it may have company all the same.
        counted: Whether the positions that it puts in front of keys count, for a relative position bias over them.
        front: How many positions in front of keys, or of an embedded sequence, count for the tokens' own positions,
            which begin behind them.
        padded: Whether padding counts as positions of what it is given, and what makes sequences longer stands in front
            of a row's padding. As a rule it does not count: a row is what it is alone.
        pooled: Whether what is pooled from an encoder's first position is the first of what it adds, and not a token.
        reads_input: Whether its `extend` reads `base.input`, which is kept for it during the attention's forward.
        positional: Whether it counts the positions of the sequence: it then cannot act beside what adds positions.
        abilities: What the type can do, from what it defines.
        from_base: Whether `initialise` has anything to do: it costs a wide copy of the weight, and needs a dense one.
        tied: What names the weight in which this module and others of its adapter act as one, in layers that are tied:
            where all that acts in those says the same, a merge gives them one weight. None for one of its own.
        empty: Whether it has memory and no values: it was built on the meta device; see `Adapters.initialise`.
        shared: What `AdapterConfig.shared` built; there is no such attribute where it built nothing.
    """

    abilities: Abilities = Abilities()
    at: str = ""
    parts: tuple[str, ...] = ()
    scalable: bool = True
    front: int = 0
    padded: bool = False
    pooled: bool = False
    outermost: bool = False
    counted: bool = False
    reads_input: bool = False
    positional: bool = False
    from_base: bool = True
    tied: str | None = None
    empty: bool = False
    shared: Any

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.abilities = Abilities.of(cls)

    @by_default
    def forward(self, x: Tensor, base: Base) -> Tensor:
        """This point's output with the adapter.

        Args:
            x: At a `weight` point the adapted module's own input; at an `output` point the residual stream
                [batch, length, features]; at a `tokens` point whatever the embedding is given.
            base: Computes what the point computed before this adapter; a `Sublayer` at an `output` point.

        Returns:
            What replaces `base(x)`: at a span, that span's features only.
        """
        layer = getattr(base, "layer", None)
        if not self.abilities.merge or layer is None:
            why = "names no parts to combine" if self.abilities.combine else "defines no forward"
            raise NotImplementedError(f"{type(self).__name__}{place_of(self)} {why}")
        weight, bias = base.weight, base.bias  # type: ignore[attr-defined]
        wide = torch.promote_types(weight.dtype, torch.float32)
        merged, merged_bias = checked_merged(self, weight.to(wide), None if bias is None else bias.to(wide))
        return layer(x, merged.to(weight.dtype), None if merged_bias is None else merged_bias.to(weight.dtype))

    @by_default
    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values with more positions put in FRONT; called at an `attention` point.

        Where it takes a further parameter `base`, it is given one with `base.context`; as in `contract.base.Beside`.

        Args:
            keys, values: [batch, kv_heads, length, head_dim], after the rotary embedding and the cache update. Values
                may have another width: see `AttentionLayout`.
        """
        raise NotImplementedError(f"{type(self).__name__} does not act on keys and values")

    @by_default
    def sees(self, x: Tensor, base: Sublayer) -> Tensor:
        """What its effect at an `output` point is computed from; `Fuse` may take its query from it.

        By default what the sublayer and the stream give together, behind the norm that follows, if one does.
        """
        return base.norm_out(base(x) + x)

    @by_default
    def attend(self, query: Tensor, keys: Tensor, values: Tensor, base: Attention) -> Tensor:
        """An attention of its own beside the softmax; called at an `attention` point after the softmax has run.

        Args:
            query: [batch, heads, queries, head_dim], as the attention uses it: after norms and the rotary embedding.
            keys, values: The model's own, as in `extend`, without what others put in front. Which of them a query may
                see is the mask's business, and only the base knows it.
            base: `base(query)` is the softmax attention's output. Rows and positions that are padding hold anything.

        Returns:
            What replaces `base(query)`, of its shape. Effects are summed and weighted as everywhere:
            `base + sum_i w_i (attend_i - base)`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no attention of its own")

    @by_default
    def lengthen(self, tokens: Tensor) -> Tensor:
        """More positions for the sequence; called at a `tokens` point whose layout `lengthens`.

        Where it takes a further parameter `base`, it is given one, as `extend` is.

        Args:
            tokens: The embedded sequence [batch, length, features].

        Returns:
            [positions, features], for all rows, or [batch, positions, features].
        """
        raise NotImplementedError(f"{type(self).__name__} does not make sequences longer")

    @by_default
    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The weight and bias that do the same without the adapter.

        Args:
            weight: [out, in / groups, *kernel], whatever the module's own layout, float32 or wider;
                the span's rows only.
            bias: [out] or None.

        Raises:
            NotMergeableError: There are none.
        """
        raise NotMergeableError(f"{type(self).__name__} has no equivalent weight")

    @by_default
    def combine(self, x: Tensor, base: Base, parts: Sequence[Part]) -> Tensor:
        """The point's output where this adapter combines others; called instead of `forward` where `parts` are named.

        Args:
            x, base: As in `forward`.
            parts: `part(x, base)` for every name in `self.parts`, in that order.
        """
        raise NotImplementedError(f"{type(self).__name__} does not combine other adapters")

    def bind(self, shared: nn.Module) -> None:
        """Receives what `AdapterConfig.shared` built, as `self.shared`."""
        self.shared = shared

    @by_default
    def initialise(self, weight: Tensor, bias: Tensor | None) -> None:
        """Takes start values from the base, once, for a new adapter; files and the meta device skip it.

        Runs without grad, under the point's seeded generator; at output and attention points there is nothing to take.

        Args:
            weight, bias: As in `merged`, of the frozen base; copy what is kept. At a norm point [features] each. At a
                `tokens` point the token embedding [features, rows], each row as it stands in the sequence, and None.
        """

    def observe(self, x: Tensor) -> None:
        """Sees the point's input in every forward inside `Adapters.observing`; see `AdapterConfig.observed`."""

    def observe_gradient(self, x: Tensor, grad: Tensor) -> None:
        """Sees, in a backward inside `Adapters.observing`, a call's gradient: see `AdapterConfig.observes_gradients`.

        Args:
            x: The point's input in that call.
            grad: The gradient of the loss with respect to the point's output there: at a span, that span's features.
        """

    def forget(self) -> None:
        """Drops what was observed, where the block of `Adapters.observing` has raised."""

    def penalty(self) -> Tensor | None:
        """A term that training adds to the loss, a scalar; see `Adapters.penalty`."""
        return None

    def extra_repr(self) -> str:
        """Parameter names and shapes, so that `repr(model)` shows what was injected."""
        return ", ".join(f"{name}={tuple(p.shape)}" for name, p in self.named_parameters(recurse=False))


class AdditiveModule(AdapterModule):
    """An adapter whose effect is a sum: `forward(x, base) = base(x) + delta(x)`, and `W + delta_weight()`.

    Where `factors` is written, both follow from it. Where only `delta_weight` is, every forward computes with the sum.
    """

    @by_default
    def factors(self) -> Factors | None:
        """The update as two thin factors, for whatever can use them: sums, routes, merges, resizing, kernels.

        Returns:
            None where there are none now: where training drops a part of what is computed, for example. A type that
            may have none writes `delta` and `delta_weight` too.
        """
        return None

    @by_default
    def delta(self, x: Tensor) -> Tensor:
        """What is added to the point's output. It is cast to the output's dtype; casting `x` up would waste memory."""
        factors = self.factors()
        if factors is None:
            raise NotImplementedError(f"{type(self).__name__}{place_of(self)} defines neither delta nor delta_weight")
        return low_rank.update(x, factors)

    @by_default
    def delta_weight(self) -> Tensor:
        """What is added to the weight: [out, in / groups, *kernel]."""
        factors = self.factors()
        if factors is None:
            raise NotMergeableError(f"{type(self).__name__} has no equivalent weight")
        return low_rank.dense(factors)

    @by_default
    def forward(self, x: Tensor, base: Base) -> Tensor:
        """`base(x) + delta(x)`, in the base's dtype."""
        if self.abilities.merge and not self.abilities.delta:
            return super().forward(x, base)
        y = base(x)
        return y + self.added(x, y)

    def added(self, x: Tensor, y: Tensor) -> Tensor:
        """`delta(x)`, checked to be of the shape of `y`, the base's output, and in its dtype."""
        return fitted(self, self.delta(x), y)

    @by_default
    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """`weight + delta_weight()`; the bias is untouched."""
        factors = self.factors() if self.abilities.low_rank else None
        if factors is not None and factors.shape == weight.shape:
            return low_rank.added(weight, factors), bias
        delta = self.delta_weight()
        check_shape(self, "delta_weight", delta, weight)
        return weight + delta.to(weight.dtype), bias
