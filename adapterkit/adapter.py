"""The contract: what an adapter type is.

A type is one frozen dataclass (`AdapterConfig`) that says what to add, and one small module (`AdapterModule`) that it
builds at each injection point. Merging, saving, mixing, switching and reporting come from here.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor, nn

from adapterkit import choosing
from adapterkit.errors import ConfigError, NotMergeableError, PluginError
from adapterkit.points import InjectionPoint, Kind, WeightLayout
from adapterkit.selectors import Selector

_Config = TypeVar("_Config", bound="AdapterConfig")


class Base(Protocol):
    """What a point computed before this adapter: `base(x)`."""

    def __call__(self, x: Tensor, /) -> Tensor:
        """The output for this input."""
        ...


class WeightBase(Base, Protocol):
    """The base at a `weight` point: its frozen weight can be read too.

    Below other adapters (in a `Stack`) it is the weight with those in it.
    """

    @property
    def weight(self) -> Tensor:
        """[out, in / groups, *kernel], in the model's dtype; the point's rows (or columns) only. Requires no grad."""
        ...

    @property
    def bias(self) -> Tensor | None:
        """[out] or None."""
        ...

    def layer(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What the point computes with another weight and bias of these shapes, in the model's dtype."""
        ...


class Sublayer(Base, Protocol):
    """The base at an `output` point: `x` is the residual stream, `base(x)` the sublayer's output before the add.

    The block computes `y = x + base(x)` (pre-norm), or `y = norm_out(x + base(x))` (post-norm).
    """

    def norm_in(self, x: Tensor) -> Tensor:
        """The pre-norm between residual stream and sublayer; the identity in a post-norm block."""
        ...

    def norm_out(self, x: Tensor) -> Tensor:
        """The post-norm over the residual sum; the identity in a pre-norm block."""
        ...


class AdapterModule(nn.Module):
    """What a config builds at one point.

    Final classes override `forward`, or `merged` alone, which then is called in every forward; at an attention point
    `extend`, where sequences get longer `lengthen`.

    Attributes:
        at: Id of the point that it was built for, for messages.
        parts: Names of the other adapters that this one combines; see `combine`.
        scalable: Whether it can act with another weight than 1, and beside others at its point.
        positional: Whether it counts the positions of the sequence: it then cannot act beside what adds positions.
        from_base: Whether `initialise` has anything to do: it costs a wide copy of the weight, and needs a dense one.
        shared: What `AdapterConfig.shared` built; there is no such attribute where it built nothing.
    """

    at: str = ""
    parts: tuple[str, ...] = ()
    scalable: bool = True
    positional: bool = False
    from_base: bool = True
    shared: Any

    def forward(self, x: Tensor, base: Base) -> Tensor:
        """This point's output with the adapter.

        Args:
            x: At a `weight` point the adapted module's own input; at an `output` point the residual stream
                [batch, length, features]; at a `tokens` point whatever the embedding is given.
            base: Computes what the point computed before this adapter; a `Sublayer` at an `output` point.

        Returns:
            What replaces `base(x)`: at a span, that span's features only.
        """
        own, layer = type(self), getattr(base, "layer", None)
        if own.merged is AdapterModule.merged or layer is None:
            why = "names no parts to combine" if own.combine is not AdapterModule.combine else "defines no forward"
            raise NotImplementedError(f"{own.__name__}{_place(self)} {why}")
        weight, bias = base.weight, base.bias  # type: ignore[attr-defined]
        wide = torch.promote_types(weight.dtype, torch.float32)
        merged, merged_bias = self.merged(weight.to(wide), None if bias is None else bias.to(wide))
        check_merged(self, merged, weight)
        return layer(x, merged.to(weight.dtype), None if merged_bias is None else merged_bias.to(weight.dtype))

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values with more positions put in FRONT; called at an `attention` point.

        Args:
            keys, values: [batch, kv_heads, length, head_dim], after the rotary embedding and the cache update. Values
                may have another width: see `AttentionLayout`.
        """
        raise NotImplementedError(f"{type(self).__name__} does not act on keys and values")

    def lengthen(self, tokens: Tensor) -> Tensor:
        """More positions for the sequence; called at a `tokens` point whose layout `lengthens`.

        Args:
            tokens: The embedded sequence [batch, length, features].

        Returns:
            [positions, features], for all rows, or [batch, positions, features].
        """
        raise NotImplementedError(f"{type(self).__name__} does not make sequences longer")

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

    def initialise(self, weight: Tensor, bias: Tensor | None) -> None:
        """Takes start values from the base, once, for a new adapter; files and the meta device skip it.

        Runs without grad, under the point's seeded generator.

        Args:
            weight, bias: As in `merged`, of the frozen base; copy what is kept.
        """

    def observe(self, x: Tensor) -> None:
        """Sees the point's input in every forward inside `Adapters.observing`; see `AdapterConfig.observed`."""

    def forget(self) -> None:
        """Drops what was observed, where the block of `Adapters.observing` has raised."""

    def penalty(self) -> Tensor | None:
        """A term that training adds to the loss, a scalar; see `Adapters.penalty`."""
        return None

    def extra_repr(self) -> str:
        """Parameter names and shapes, so that `repr(model)` shows what was injected."""
        return ", ".join(f"{name}={tuple(p.shape)}" for name, p in self.named_parameters(recurse=False))


class Part(Protocol):
    """Another adapter at the same point."""

    def __call__(self, x: Tensor, base: Base, /) -> Tensor:
        """As `AdapterModule.forward`."""
        ...


class AdditiveModule(AdapterModule):
    """An adapter whose effect is a sum: `forward(x, base) = base(x) + delta(x)`, and `W + delta_weight()`.

    Where only `delta_weight` is written, every forward computes with the sum.
    """

    def delta(self, x: Tensor) -> Tensor:
        """What is added to the point's output. It is cast to the output's dtype; casting `x` up would waste memory."""
        raise NotImplementedError(f"{type(self).__name__}{_place(self)} defines neither delta nor delta_weight")

    @property
    def has_delta(self) -> bool:
        """Whether the type writes `delta`."""
        return type(self).delta is not AdditiveModule.delta

    def delta_weight(self) -> Tensor:
        """What is added to the weight: [out, in / groups, *kernel]."""
        raise NotMergeableError(f"{type(self).__name__} has no equivalent weight")

    def forward(self, x: Tensor, base: Base) -> Tensor:
        """`base(x) + delta(x)`, in the base's dtype."""
        if not self.has_delta:
            return super().forward(x, base)
        y = base(x)
        return y + self.added(x, y)

    def added(self, x: Tensor, y: Tensor) -> Tensor:
        """`delta(x)`, checked to be of the shape of `y`, the base's output, and in its dtype."""
        delta = self.delta(x)
        if delta.shape != y.shape:
            raise PluginError(
                f"{type(self).__name__}.delta{_place(self)} gave {tuple(delta.shape)}, and the base {tuple(y.shape)}"
            )
        return delta.to(y.dtype)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """`weight + delta_weight()`; the bias is untouched."""
        delta = self.delta_weight()
        check_merged(self, delta, weight, "delta_weight")
        return weight + delta.to(weight.dtype), bias


def check_merged(module: AdapterModule, merged: Tensor, weight: Tensor, method: str = "merged") -> None:
    """Raises PluginError where a weight has another shape than that which it stands for, and was not meant to."""
    if module.scalable and merged.shape != weight.shape:
        raise PluginError(
            f"{type(module).__name__}.{method}{_place(module)} gave {tuple(merged.shape)}, and the weight is "
            f"{tuple(weight.shape)}"
        )


def _place(module: AdapterModule) -> str:
    return f" at {module.at}" if module.at else ""


@dataclass(frozen=True)
class AdapterConfig:
    """What to add. Subclasses are frozen dataclasses whose fields are JSON values.

    Attributes:
        kinds: The kinds of points that the type can act at.
        neutral: Whether a new adapter has no effect.
        exact_gradients: Whether gradients are those of the equation; one may hold a part constant on purpose.
        forms: The forms of layers (`WeightLayout.form`) that it can act on at `weight` points; None for all.
        targets: A selector; see `adapterkit.selectors`.
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset()
    neutral: ClassVar[bool] = True
    exact_gradients: ClassVar[bool] = True
    forms: ClassVar[frozenset[str] | None] = None
    targets: str = "all"

    def __post_init__(self) -> None:
        problems = _type_problems(self) or self.problems()
        if problems:
            raise ConfigError(problems, type(self).__name__)
        Selector(self.targets)

    def problems(self) -> list[str]:
        """What is wrong with the values, one sentence each. Scalars are of the annotated types already."""
        return []

    def choose(self, points: Sequence[InjectionPoint], label: str) -> list[InjectionPoint]:
        """Those of a model's points that the adapter is for; every way to say so is checked.

        Args:
            points: All points of the model.
            label: The model's name, for errors.

        Raises:
            TargetNotFoundError: A part of `targets` matches nothing.
            IncompatibleTargetError: It matches, but the type cannot act there.
            ConfigError: A setting does not fit the points.
        """
        chosen = choosing.by_selector(self.targets, self.kinds, points, type(self).__name__, label)
        chosen = choosing.narrowed(chosen, self.narrow(chosen), type(self).__name__, self.targets)
        choosing.check_accepted(chosen, self.accepts, type(self).__name__)
        if problems := self.selection_problems(chosen):
            raise ConfigError(problems, type(self).__name__)
        return chosen

    def narrow(self, points: Sequence[InjectionPoint]) -> Sequence[InjectionPoint]:
        """Those of the selected points that concern the type at all: a bias' training, those with a bias."""
        return points

    def selection_problems(self, points: Sequence[InjectionPoint]) -> list[str]:
        """What is wrong with the config for the points that it selects, such as a setting that none receives."""
        return []

    def build(self, point: InjectionPoint) -> AdapterModule:
        """The module for one point, on the current default device.

        Runs once per point under a seeded generator of its own, and under the meta device when a file is loaded:
        compute sizes from the point and the config alone.
        """
        raise NotImplementedError(f"{type(self).__name__} must define build(point)")

    def shared(self, points: Sequence[InjectionPoint]) -> nn.Module | None:
        """One module that those of all points use together, as their `shared`; None for none.

        It is saved, moved, trained and counted once. Built like a point's module: under a seed, and under the meta
        device when a file is loaded. It lies on one device: bring what you take from it to where you need it.
        """
        return None

    @property
    def observations(self) -> int:
        """Number of batches that training shows to a new adapter before the first step; see `Adapters.observing`."""
        return 0

    def rate(self, parameter: str) -> float:
        """The factor on the learning rate of a parameter, by its name in the module; see `parameter_groups`."""
        return 1.0

    def observed(self, modules: Mapping[str, AdapterModule]) -> None:
        """Runs once at the end of `Adapters.observing`, without grad: point id -> module, each has observed."""

    def after_step(self, modules: Mapping[str, AdapterModule], step: int, steps: int) -> None:
        """Runs after every optimizer step in training, without grad; gradients are still there.

        Args:
            modules: Point id -> module.
            step: Number of this step, from 1.
            steps: Of the whole training.
        """

    def accepts(self, point: InjectionPoint) -> str | None:
        """None where the type can act at this point, else the reason why it cannot."""
        if point.kind not in self.kinds:
            return f"{type(self).__name__} acts at {'/'.join(sorted(self.kinds))} points"
        form = point.layout.form if isinstance(point.layout, WeightLayout) else None
        if point.kind == "weight" and self.forms is not None and form not in self.forms:
            return (
                f"{type(self).__name__} acts on layers of the form {'/'.join(sorted(self.forms))}, and this is {form}"
            )
        return None

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls: type[_Config], values: Mapping[str, Any]) -> _Config:
        """The inverse of `to_dict`.

        Raises:
            ConfigError: Unknown keys, wrong types or values out of bounds.
        """
        fields = {f.name: f for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - set(fields))
        if unknown:
            raise ConfigError([f"unknown key {key!r}; known: {', '.join(fields)}" for key in unknown], cls.__name__)
        required = [n for n, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING]
        missing = [f"missing key {key!r}" for key in required if key not in values]
        if missing:
            raise ConfigError(missing, cls.__name__)
        return cls(**{name: _thaw(fields[name].type, value) for name, value in values.items()})


def _thaw(annotation: object, value: Any) -> Any:
    """JSON has no tuples; give back those that the annotation asks for."""
    return tuple(value) if isinstance(value, list) and str(annotation).startswith("tuple") else value


_SCALARS: dict[str, Callable[[Any], bool]] = {
    "int": lambda v: isinstance(v, int) and not isinstance(v, bool),
    "float": lambda v: isinstance(v, (int, float)) and not isinstance(v, bool) and abs(v) <= sys.float_info.max,
    "bool": lambda v: isinstance(v, bool),
    "str": lambda v: isinstance(v, str),
    "None": lambda v: v is None,
}


def _type_problems(config: AdapterConfig) -> list[str]:
    """Fields whose value does not fit a scalar annotation; other annotations are the type's own business."""
    problems = []
    for item in dataclasses.fields(config):
        annotation = item.type.__name__ if isinstance(item.type, type) else str(item.type)
        options = [part.strip() for part in annotation.split("|")]
        if not all(option in _SCALARS for option in options):
            continue
        value = getattr(config, item.name)
        if not any(_SCALARS[option](value) for option in options):
            problems.append(f"{item.name} must be {' or '.join(options)}, not {value!r}")
    return problems
