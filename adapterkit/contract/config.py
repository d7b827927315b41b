"""The contract: an adapter type's config, a frozen dataclass that says what to add."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from torch import Tensor, nn

from adapterkit.contract.fields import checked_overrides, checked_values, is_number, kind_problems, type_problems
from adapterkit.errors import AdapterKitError, ConfigError, shown
from adapterkit.mapping import targets
from adapterkit.points import InjectionPoint, Kind
from adapterkit.selectors import Selector

if TYPE_CHECKING:
    from torch import Tensor

    from adapterkit.adapter import AdapterModule

_Config = TypeVar("_Config", bound="AdapterConfig")

BaseValues = Callable[[str], "tuple[Tensor, Tensor | None]"]
"""Reads the weight and bias of the frozen base at a point, by its id."""


@dataclass(frozen=True)
class AdapterConfig:
    """What to add. Subclasses are frozen dataclasses whose fields are JSON values.

    Attributes:
        kinds: The kinds of points that the type can act at; every type has to say some.
        neutral: Whether a new adapter has no effect.
        exact_gradients: Whether gradients are those of the equation; one may hold a part constant on purpose.
        forms: The forms of layers (`WeightLayout.form`) that it can act on at `weight` points; None for all.
        common: Fields that `shared` reads, which no point can have for itself.
        targets: A selector; see `adapterkit.selectors`.
        settings: Point id -> what is other there than in the config, field by field; {} for nothing. Where there are
            any, they name the points, and `targets` is not read. Data, as files have it: selectors are for people.
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset()
    neutral: ClassVar[bool] = True
    exact_gradients: ClassVar[bool] = True
    forms: ClassVar[frozenset[str] | None] = None
    common: ClassVar[frozenset[str]] = frozenset()
    targets: str = "all"
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, hash=False, repr=False, kw_only=True)

    def __post_init__(self) -> None:
        try:
            problems = type_problems(self) or self.problems() or self._settings_problems() or kind_problems(self.kinds)
        except AdapterKitError:
            raise
        except Exception as error:  # a type's own checks are of values that it expects, and a file may hold any
            told = f"the values cannot be checked: {type(error).__name__}: {shown(str(error))}"
            raise ConfigError([told], type(self).__name__) from error
        if problems:
            raise ConfigError(problems, type(self).__name__)
        _ = self._selector  # one that cannot be parsed is an error now

    @functools.cached_property
    def _selector(self) -> Selector:
        return Selector(self.targets)

    def _settings_problems(self) -> list[str]:
        """What is wrong with the settings of points; every set of them is made, and so checked, once."""
        problems: list[str] = []
        given: Any = self.settings
        if not isinstance(given, Mapping):
            return [f"settings must map point ids to fields, not {shown(given)}"]
        if strange := [key for key in given if not isinstance(key, str)]:
            return [f"settings must map point ids such as 'attn.q@language.0' to fields, not {shown(strange[0])}"]
        object.__setattr__(self, "settings", {key: own if own else {} for key, own in given.items()})
        for key in self.settings:
            try:
                self.at(key)
            except ConfigError as error:
                problems += [f"settings[{key!r}]: {problem}" for problem in error.problems]
        return problems

    def at(self: _Config, point: InjectionPoint | str) -> _Config:
        """The config at a point, or at the point of an id: with the settings that are its own, and none of others."""
        if not self.settings:
            return self
        place = point if isinstance(point, str) else point.id
        at: dict[str, _Config] = self.__dict__.setdefault("_at", {})  # asked for many times for each of thousands
        return at[place] if place in at else at.setdefault(place, self._made_at(place))

    def _made_at(self: _Config, place: str) -> _Config:
        own = self.settings.get(place, {})
        if not isinstance(own, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance] - what a file has
            raise ConfigError([f"must map fields to values, not {shown(own)}"], type(self).__name__)
        made: dict[str, _Config] = self.__dict__.setdefault("_made", {})
        key = repr(sorted(own.items(), key=repr))
        if key not in made:
            made[key] = self.overridden(checked_overrides(type(self), own))
        return made[key]

    def rank_at(self, point: InjectionPoint) -> int | None:
        """The rank of what it does at a point, for reports: by default the field `rank`; None where there is none."""
        rank = getattr(self.at(point), "rank", None)
        return rank if type(rank) is int else None

    def scale_at(self, point: InjectionPoint) -> float | None:
        """The factor on what it does at a point, for reports: by default `scale`; None where there is none."""
        scale = getattr(self.at(point), "scale", None)
        return float(scale) if is_number(scale) else None

    def overridden(self: _Config, values: Mapping[str, Any]) -> _Config:
        """The config with other values in some fields, for a point of its own.

        Override it where another field would still speak of what these fields say: ranks by selector beside a rank.
        """
        return dataclasses.replace(self, **values, settings={})

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
        name = type(self).__name__
        if self.settings:
            chosen = targets.by_ids(self.settings, points, label)
            targets.check_concerned(chosen, [p for p in chosen if self.at(p).narrow([p])], name)
        else:
            chosen = targets.by_selector(self.targets, self.kinds, points, name, label, self.accepts)
            chosen = targets.narrowed(chosen, self.narrow(chosen), name, self.targets)
        targets.check_accepted(chosen, lambda point: self.at(point).accepts(point), name)
        if problems := self.selection_problems(chosen):
            raise ConfigError(problems, type(self).__name__)
        return chosen

    def means(self, point: InjectionPoint) -> bool:
        """Whether settings or targets name this point, and the type can act at its kind."""
        if self.settings:
            return point.id in self.settings
        return point.kind in self.kinds and self._selector.matches(point)

    def narrow(self, points: Sequence[InjectionPoint]) -> Sequence[InjectionPoint]:
        """Those of the selected points that concern the type at all: a bias' training, those with a bias."""
        return points

    def selection_problems(self, points: Sequence[InjectionPoint]) -> list[str]:
        """What is wrong with the config for the points that it selects, such as a setting that none receives."""
        return []

    def build(self, point: InjectionPoint) -> AdapterModule:
        """The module for one point, on the current default device.

        Runs once per point under a seeded generator of its own, and under the meta device when a file is loaded:
        compute sizes from the point and the config alone. Where the point has settings of its own, it is called on
        the config that has them, as is `accepts`.
        """
        raise NotImplementedError(f"{type(self).__name__} must define build(point)")

    def alike(self, point: InjectionPoint) -> Hashable | None:
        """What `build` makes its module from: where it is equal, so are the modules, but for their random values.

        Loading a file then builds one of them and copies it, which is many times quicker; None for no such thing. What
        a class says here holds for its own `build`, and for no other that a subclass writes.
        """
        return None

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

    def rate(self, parameter: str, point: InjectionPoint) -> float:
        """The factor on the learning rate of a parameter; see `Adapters.parameter_groups`.

        Args:
            parameter: Its name in the module.
            point: Where that is; for a parameter that all points share, the first of them.
        """
        return 1.0

    @property
    def observes_gradients(self) -> bool:
        """Whether observing needs backwards: `AdapterModule.observe_gradient`. Training then runs them too."""
        return False

    def observed(self, modules: Mapping[str, AdapterModule], base: BaseValues) -> None:
        """Runs once at the end of `Adapters.observing`, without grad.

        Args:
            modules: Point id -> module; each has observed.
            base: `base(point id)` reads the weight and bias of the frozen base there, as `initialise` is given them.
        """

    @property
    def adapts(self) -> bool:
        """Whether `after_step` does anything: a loop that never calls it is told so. By default, if it is defined."""
        return type(self).after_step is not AdapterConfig.after_step

    def after_step(self, modules: Mapping[str, AdapterModule], step: int, steps: int | None) -> None:
        """Runs after every optimizer step in training, without grad; gradients are still there.

        `self.at(id)` has a point's own settings, as in `observed`.

        Args:
            modules: Point id -> module.
            step: Number of this step, from 1.
            steps: Of the whole training; None where nobody knows.
        """

    @property
    def words(self) -> Sequence[str]:
        """Tokens of its own, which no tokenizer has until `teach` puts them there; empty for most types."""
        return ()

    def written(self, text: str) -> str:
        """A text as its own words want it written, such as one word for all that its vectors stand for."""
        return text

    def teach(self, modules: Mapping[str, AdapterModule], tokenizer: Any) -> Mapping[str, int]:
        """Puts the words into a tokenizer, and tells the modules which tokens they are. A second time changes nothing.

        Args:
            modules: Point id -> module, of the one component that reads what this tokenizer writes.
            tokenizer: One of transformers'.

        Returns:
            Word -> id.

        Raises:
            ConfigError: A word is a token already that means something else.
        """
        return {}

    def example_context(self, points: Sequence[InjectionPoint], rows: int) -> Mapping[str, Tensor]:
        """The side inputs that the type reads as `base.context`, by name: a random one of each, on the default device.

        The names are those that `Adapters.context` takes; it runs once on the meta device for them. The conformance kit
        runs with the examples. Empty where the type reads none.

        Args:
            points: Those of the adapter.
            rows: First axis of every example: [rows, ...].
        """
        return {}

    def accepts(self, point: InjectionPoint) -> str | None:
        """None where the type can act at this point, else the reason why it cannot."""
        if point.kind not in self.kinds:
            return f"{type(self).__name__} acts at {'/'.join(sorted(self.kinds))} points"
        form = point.form
        if point.kind == "weight" and self.forms is not None and form not in self.forms:
            return (
                f"{type(self).__name__} acts on layers of the form {'/'.join(sorted(self.forms))}, and this is {form}"
            )
        return None

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values; without `settings` where there are none."""
        values = dataclasses.asdict(self)
        if not self.settings:
            values.pop("settings", None)
        return values

    @classmethod
    def from_dict(cls: type[_Config], values: Mapping[str, Any]) -> _Config:
        """The inverse of `to_dict`.

        Raises:
            ConfigError: Unknown keys, wrong types or values out of bounds.
        """
        return cls(**checked_values(cls, values))
