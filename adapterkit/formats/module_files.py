"""What the files of kohya's scripts, LyCORIS and the UIs share: keys of a prefix, a module, and a tensor's name."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

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
from adapterkit.contract.codec import Context
from adapterkit.contract.naming import KnownBase
from adapterkit.errors import UnsupportedFileError
from adapterkit.formats import container, diffusers_config, other_readers
from adapterkit.formats.cards import Card, CardOptions
from adapterkit.formats.dialect import Dialect, ForeignModule
from adapterkit.formats.files import write_atomically
from adapterkit.formats.foreign_names import known_base
from adapterkit.formats.module_keys import DIALECT, grouped, style_of
from adapterkit.formats.module_writing import LORA_UP, ModuleNames, Tensors, Writing, with_one_alpha
from adapterkit.formats.origins import base_of, tool_of
from adapterkit.formats.parts import Collected
from adapterkit.formats.placing import Placing
from adapterkit.formats.source import Source
from adapterkit.mapping.targets import some
from adapterkit.points import Points

_ROUNDING = 1e-5
"""An error, relative, that is nothing to tell of."""
_EXACT = frozenset({"alpha"})
"""Numbers that are written in full whatever the dtype, but for LoRA's, which is one that the dtype has."""


@dataclass(frozen=True)
class ModuleFileOptions(ReadOptions):
    """How to read a file for the UIs.

    Attributes:
        component: Of a pipeline with several transformers or UNets, the one that the file is for.
    """

    component: str = ""


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
        return style_of(source.entries, shared=diffusers_config.KEY not in source.metadata) == self.style

    def read(self, source: Source, points: Points, options: ReadOptions) -> tuple[Mapping[str, Checkpoint], ReadReport]:
        dialect, context = Dialect(DIALECT), Context(source.where)
        found, left_over = grouped(source.entries, dialect, source.where)
        if not found:
            told = f"none of its {len(left_over):,} keys is of a file for the UIs: {some(left_over)}"
            raise UnsupportedFileError(told, source.where)
        component = options.component if isinstance(options, ModuleFileOptions) else ""
        placed = Placing(points, dialect, context, source.entries, component).all(found)
        modules = [ForeignModule(one.label, one.keys, places) for one, places in placed]
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
            f"{name}.{own}": tensor if own in _EXACT and LORA_UP not in module else options.cast(tensor)
            for name, module in modules.items()
            for own, tensor in module.items()
        }
        card = Card(checkpoint.metadata, base, options, target.stem)
        body = container.body(target, tensors)
        write_atomically(target, body.header(card.metadata(modules, body)), *body.pieces)
        if writing.error > _ROUNDING:
            context.note(f"is an approximation: of the effect, at most {writing.error:.2g} is left out at a module")
        return WriteReport(list(context.notes), writing.error)

    def spelled(self, modules: Tensors, base: KnownBase | None, options: CardOptions) -> Tensors:
        """What is written, as its readers want LoRA: with one alpha."""
        return with_one_alpha(modules, options.alpha, options.dtype)

    @abstractmethod
    def names(self, points: Points) -> ModuleNames:
        """What the modules of a model's components are called in a file that is written."""


def _others_misread(
    modules: Sequence[ForeignModule], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> list[str]:
    named = [(one.name, frozenset(one.keys)) for one in modules]
    keys = {f"{one.name}.{name}": key for one in modules for name, key in one.keys.items()}
    return other_readers.told(named, keys, tensors, metadata)
