"""What the files of kohya's scripts, LyCORIS and the UIs share: keys of a prefix, a module, and a tensor's name."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from adapterkit.checkpoint import (
    Checkpoint,
    Format,
    ReadOptions,
    ReadReport,
    WriteOptions,
    WriteReport,
    single,
)
from adapterkit.codec import Context, Place
from adapterkit.errors import CheckpointError, ConfigError, did_you_mean, shown
from adapterkit.formats import container, other_readers
from adapterkit.formats.cards import Card, CardOptions
from adapterkit.formats.container import Entry
from adapterkit.formats.dialect import Dialect, ForeignModule
from adapterkit.formats.foreign_names import ForeignNames, known_base
from adapterkit.formats.module_writing import ModuleNames, Tensors, Writing, with_one_alpha
from adapterkit.formats.modules import Modules, made_up
from adapterkit.formats.origins import base_of, tool_of
from adapterkit.formats.parts import Collected
from adapterkit.formats.pipeline_parts import candidates
from adapterkit.formats.prefixes import ANY, DENOISER, Prefix, is_original, prefix_of
from adapterkit.formats.source import Source
from adapterkit.naming import KnownBase
from adapterkit.points import Points

DIALECT = "lycoris"
_ALIASES = {
    "lora_A.weight": "lora_down.weight",
    "lora_B.weight": "lora_up.weight",
    "lora_A.default.weight": "lora_down.weight",
    "lora_B.default.weight": "lora_up.weight",
    "lora.down.weight": "lora_down.weight",
    "lora.up.weight": "lora_up.weight",
    "down.weight": "lora_down.weight",
    "up.weight": "lora_up.weight",
}
"""Other names for the tensors of LoRA -> the dialect's."""
_SHARED_PREFIXES = frozenset({"transformer.", "unet.", "prior.", "text_encoder.", "text_encoder_2.", "text_encoder_3."})
"""Those that files of other libraries have too, which name LoRA's tensors otherwise."""
_OF_SEVERAL = frozenset({*_ALIASES, "alpha", "weight", "bias"})
"""Names of tensors that those files have too."""
_WRAPPER = "base_model.model."
"""PEFT's, which has LoHa and LoKr by the same names. With names of an original checkpoint it is none of PEFT's."""
_SAMPLE, _SHOWN = 4, 200
_ROUNDING = 1e-5
"""An error, relative, that is nothing to tell of."""
_EXACT = frozenset({"alpha"})
"""Tensors of one number that are written in full whatever the dtype: it costs nothing."""


@dataclass(frozen=True)
class ModuleFileOptions(ReadOptions):
    """How to read a file for the UIs.

    Attributes:
        component: Of a pipeline with several transformers or UNets, the one that the file is for.
    """

    component: str = ""


@dataclass
class Found:
    """A module as a file has it.

    Attributes:
        prefix, name: In front of it, and its name.
        keys: Tensor name in the dialect -> key.
    """

    prefix: Prefix
    name: str
    keys: dict[str, str] = field(default_factory=dict)


class ModuleFileFormat(Format):
    """A file of the dialect `lycoris`: whatever is said of its modules, the codecs read.

    Attributes:
        style: Which files are this format's: the style of the prefix that the first of their keys has.
        naming_style: Whose names it writes; see `Naming.in_files`.
        separator: What stands between a prefix and a module.
    """

    read_options = ModuleFileOptions
    write_options = CardOptions
    style: ClassVar[str]
    naming_style: ClassVar[str] = "kohya"
    separator: ClassVar[str] = "_"

    def recognises(self, source: Source) -> bool:
        return style_of(source.entries) == self.style

    def read(self, source: Source, points: Points, options: ReadOptions) -> tuple[Mapping[str, Checkpoint], ReadReport]:
        dialect, context = Dialect(DIALECT), Context(source.where)
        found, left_over = grouped(source.entries, dialect, source.where)
        component = options.component if isinstance(options, ModuleFileOptions) else ""
        placed = Placing(points, dialect, context, source.entries, component).all(found)
        modules = [ForeignModule(_label(one)[:_SHOWN], one.keys, places) for one, places in placed]
        wanted = {key for one in modules if one.places is not None for key in one.keys.values()}
        into = Collected(source.where)
        tensors = source.tensors(wanted)
        reading = dialect.read(modules, tensors, context, into)
        for sentence in _others_misread(modules, tensors, source.metadata):
            context.note(sentence)
        checkpoint = Checkpoint(into.parts(context.shared), metadata=dict(source.metadata))
        tool, version = tool_of(source.metadata)
        report = ReadReport(
            reading.matched,
            reading.unmatched,
            [*left_over, *reading.left_over],
            list(context.notes),
            tool,
            version,
            base_of(source.metadata, source.entries.items()),
            fresh=True,
        )
        return ({"": checkpoint} if into else {}), report

    def write(
        self, checkpoints: Mapping[str, Checkpoint], target: Path, points: Points, options: WriteOptions
    ) -> WriteReport | None:
        assert isinstance(options, CardOptions)
        checkpoint = single(checkpoints, target)
        context = Context(target, options=options)
        writing = Writing(checkpoint, points, Dialect(DIALECT), context, options.rank)
        if points.model is None:
            named = writing.made_up(self.separator)
        else:
            named = writing.modules(self.names(points), self.naming_style)
        base = known_base(points)
        modules = self.spelled(named, base, options)
        tensors = {
            f"{name}.{own}": tensor if own in _EXACT else options.cast(tensor)
            for name, module in modules.items()
            for own, tensor in module.items()
        }
        card = Card(checkpoint.metadata, base, options, target.stem)
        container.write(target, tensors, card.metadata(modules, tensors))
        if writing.error > _ROUNDING:
            context.note(f"is an approximation: of the effect, at most {writing.error:.2g} is left out at a module")
        return WriteReport(list(context.notes), writing.error)

    def spelled(self, modules: Tensors, base: KnownBase | None, options: CardOptions) -> Tensors:
        """What is written, as its readers want LoRA: with one alpha."""
        return with_one_alpha(modules, options.alpha)

    @abstractmethod
    def names(self, points: Points) -> ModuleNames:
        """What the modules of a model's components are called in a file that is written."""


def style_of(keys: Iterable[str]) -> str | None:
    """The format whose files have such keys; None where they are of none of this dialect."""
    split = _Splitting(Dialect(DIALECT).names)
    for key in keys:
        prefix = prefix_of(key)
        found = None if prefix is None else split(key, prefix)
        if prefix is None or found is None:
            continue
        module, name = found
        if prefix.text == _WRAPPER:
            own = is_original(module) or name in _ALIASES.values()
        else:
            own = prefix.text not in _SHARED_PREFIXES or name not in _OF_SEVERAL
        if own:
            return prefix.style
    return None


class _Splitting:
    """Splits keys behind their prefixes into a module and a tensor's name.

    Args:
        names: Those of tensors that codecs know.
    """

    def __init__(self, names: frozenset[str]) -> None:
        self._names = names | _ALIASES.keys()
        self._longest = max(map(len, self._names))

    def __call__(self, key: str, prefix: Prefix) -> tuple[str, str] | None:
        """The module, and what is behind it; None where no such tensor is known."""
        rest = key[len(prefix.text) :]
        # A key may have millions of dots: of a dotted one no more is looked at than the longest name takes.
        at = rest.find(".", 0 if prefix.flat else max(0, len(rest) - self._longest - 1))
        while at >= 0 and rest[at + 1 :] not in self._names:
            at = -1 if prefix.flat else rest.find(".", at + 1)
        return (rest[:at], rest[at + 1 :]) if at > 0 else None


def grouped(keys: Iterable[str], dialect: Dialect, where: object = None) -> tuple[list[Found], list[str]]:
    """A file's keys by module, and those that are of none.

    Raises:
        CheckpointError: Two keys say the same.
    """
    splitting = _Splitting(dialect.names)
    found: dict[tuple[str, str], Found] = {}
    left_over: list[str] = []
    for key in keys:
        prefix = prefix_of(key)
        split = None if prefix is None else splitting(key, prefix)
        if prefix is None or split is None:
            left_over.append(key)
            continue
        module, name = split[0], _ALIASES.get(split[1], split[1])
        own = found.setdefault((prefix.text, module), Found(prefix, module)).keys
        if name in own:
            raise CheckpointError(f"says the same as {own[name][:_SHOWN]!r}", where, key[:_SHOWN])
        own[name] = key
    return list(found.values()), left_over


def _others_misread(
    modules: Sequence[ForeignModule], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> list[str]:
    named = [(one.name, frozenset(one.keys)) for one in modules]
    keys = {f"{one.name}.{name}": key for one in modules for name, key in one.keys.items()}
    return other_readers.told(named, keys, tensors, metadata)


def _label(found: Found) -> str:
    return f"{found.prefix.text}{found.name}"


class Placing:
    """Where the modules of a file act.

    Args:
        points: The model's; none where no model is at hand.
        dialect, context: How the file is read.
        entries: What the file has.
        component: See `ModuleFileOptions`.

    Raises:
        ConfigError: There is no such component.
    """

    def __init__(
        self, points: Points, dialect: Dialect, context: Context, entries: Mapping[str, Entry], component: str = ""
    ) -> None:
        self._modules, self._component = Modules(points), component
        self._components = {} if points.model is None else points.model.components
        if component and self._components and component not in self._components:
            near = did_you_mean(component, self._components) or f" There are {', '.join(self._components)}."
            raise ConfigError([f"component {shown(component)} is none of the model's.{near}"], "load()")
        self._names = {name: ForeignNames(one) for name, one in self._components.items()}
        self._dialect, self._context, self._entries = dialect, context, entries
        self._known: dict[tuple[str, str], list[Place] | None] = {}

    def all(self, found: Sequence[Found]) -> Iterator[tuple[Found, Sequence[Place] | None]]:
        """Every module with its places, in the order of the file."""
        if not self._components:
            return ((one, self._made_up(one)) for one in found)
        parts: dict[str, list[Found]] = {}
        for one in found:
            parts.setdefault(one.prefix.part, []).append(one)
        chosen = self._chosen(parts)
        return ((one, self._places(chosen.get(one.prefix.part, ()), one)) for one in found)

    def _made_up(self, one: Found) -> list[Place] | None:
        shape = self._shape(one)
        return None if shape is None else [made_up(one.prefix.text[:-1] or DENOISER, one.name, shape)]

    def _shape(self, one: Found) -> tuple[int, ...] | None:
        entries = {name: self._entries[key] for name, key in one.keys.items()}
        tensors = {name: torch.empty(e.shape, dtype=e.dtype, device="meta") for name, e in entries.items()}
        return self._dialect.shape(tensors, self._context)

    def _places(self, components: Sequence[str], one: Found) -> list[Place] | None:
        for name in components:
            key = name, _label(one)
            if key not in self._known:
                self._known[key] = self._placed(name, one)
            if (places := self._known[key]) is not None:
                return places
        return None

    def _placed(self, component: str, one: Found) -> list[Place] | None:
        pieces = self._names[component].find(one.name, flat=one.prefix.flat, original=one.prefix.original)
        return None if pieces is None else self._modules.placed(component, pieces)

    def _chosen(self, parts: Mapping[str, Sequence[Found]]) -> dict[str, list[str]]:
        """Part -> the component that it is. A text encoder is one part at most: that which fits it best."""
        scored = [
            (*self._fit(component, own), -rank, part, component)
            for part, own in parts.items()
            for rank, component in enumerate(self._candidates(part))
        ]
        chosen: dict[str, list[str]] = {}
        for _, hits, _, part, component in sorted(scored, reverse=True):
            taken = part in chosen or any([component] == other for other in chosen.values())
            if part == ANY:
                chosen.setdefault(part, []).append(component)
            elif hits and not taken:
                chosen[part] = [component]
        return chosen

    def _candidates(self, part: str) -> Sequence[str]:
        named = self._component and part in (DENOISER, ANY)
        return [self._component] if named else candidates(part, self._components)

    def _fit(self, component: str, found: Sequence[Found]) -> tuple[float, int]:
        """Which part of the modules that it has are of its shapes, and how many it has."""
        placed = [(one, places) for one in found if (places := self._places([component], one)) is not None]
        sample = placed[:_SAMPLE]
        told = [(shape, places[0].shape) for one, places in sample if (shape := self._shape(one)) is not None]
        fits = sum(_same(shape, here) for shape, here in told)
        return (fits / len(told) if told else 0.5), len(placed)


def _same(told: Sequence[int], here: Sequence[int]) -> bool:
    """Whether shapes agree; a 1 x 1 convolution may be a matrix."""
    return functools.reduce(int.__mul__, told, 1) == functools.reduce(int.__mul__, here, 1) and told[0] == here[0]
