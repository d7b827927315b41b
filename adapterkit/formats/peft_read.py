"""From what PEFT keeps in a folder, or a state dict, to adapters."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from adapterkit.checkpoint import Checkpoint, ReadOptions, ReadReport
from adapterkit.contract.codec import Context, Place
from adapterkit.errors import BaseMismatchError, MissingKeysError, UnsupportedFileError, shown
from adapterkit.formats.dialect import Dialect, ForeignModule
from adapterkit.formats.modules import made_up
from adapterkit.formats.parts import Collected
from adapterkit.formats.peft_config import CONFIG_FILE, WEIGHT_FILES, PeftConfig, config_in
from adapterkit.formats.peft_keys import Foreign, by_adapter, grouped
from adapterkit.formats.peft_places import ModelNames
from adapterkit.formats.source import Source
from adapterkit.points import Points

DIALECT = "peft"


@dataclass(frozen=True)
class PeftReadOptions(ReadOptions):
    """How to read.

    Attributes:
        component: Of a pipeline, the component that the file is for; by default the one that has most of its modules.
    """

    component: str | None = None


def read_adapters(
    source: Source, points: Points, options: ReadOptions
) -> dict[str, tuple[Checkpoint | None, ReadReport]]:
    """The adapters of a folder, a file or a state dict, by the name that they have in it, "" for none.

    Raises:
        CheckpointError: Anything that is wrong with it.
    """
    said = config_in(source)
    config = PeftConfig(said or {}, source.where)
    weights = _weights(source) if source.is_folder else source
    dialect = Dialect(DIALECT)
    adapters, rest = by_adapter(weights.entries, dialect)
    tensors = weights.tensors([key for keys in adapters.values() for key in keys.values()])
    reader = _Reader(config, dialect, points, options, weights)
    found = {name: reader.read(keys, tensors) for name, keys in adapters.items()}
    notes = [f"{len(rest):,} tensors of the base itself are looked past"] if rest else []
    if said is None:
        notes.append(f"has no {CONFIG_FILE} beside it: what only that says is guessed (alpha: the rank)")
    return {name: (one, dataclasses.replace(told, notes=[*told.notes, *notes])) for name, (one, told) in found.items()}


def _weights(folder: Source) -> Source:
    here = [name for name in WEIGHT_FILES if name in folder.files]
    if not here:
        raise MissingKeysError(f"has a config and no tensors; expected {' or '.join(WEIGHT_FILES)}", folder.where)
    return folder.file(here[0])


class _Reader:
    """Reads the adapters of one source."""

    def __init__(
        self, config: PeftConfig, dialect: Dialect, points: Points, options: ReadOptions, source: Source
    ) -> None:
        self._config, self._dialect, self._points, self._source = config, dialect, points, source
        self._component, self._strict = getattr(options, "component", None), options.strict

    def read(self, own: Mapping[str, str], tensors: Mapping[str, Tensor]) -> tuple[Checkpoint | None, ReadReport]:
        """One adapter.

        Args:
            own: Its keys, without prefix and name -> as the source has them.
            tensors: The source's.
        """
        bare = grouped(own, self._dialect, lambda _: None)
        names = ModelNames(self._points, self._config, bare.modules, self._component)
        keys = grouped(own, self._dialect, names.parameter)
        whole = {name: tensors[key] for name, key in keys.whole.items()}
        modules = names.ordered(keys.modules)
        context = Context(self._source.where, dict(self._config.values), whole, modules=modules)
        self._dialect.check(context)
        found = Collected(self._source.where)
        matched, unmatched, unknown = [*keys.base], list[str](), [*keys.unknown]
        for foreign, named in keys.modules.items():
            module = self._module(foreign, named, tensors, names, context)
            reading = self._dialect.read([module[0]], tensors, module[1], found)
            matched += reading.matched
            (unknown if names.behind(foreign) else unmatched).extend(reading.unmatched)
            unknown += reading.left_over
        matched += [key for name, key in keys.whole.items() if name in context.used]
        unknown += keys.whole.values()
        done = {*matched}
        unknown = [key for key in dict.fromkeys(unknown) if key not in done]
        self._check_replication(unmatched)
        if unmatched and not found and not len(self._points):
            told = f"is of PEFT's type {self._config.type or '?'}, whose tensors do not tell the shapes of their layers"
            raise UnsupportedFileError(f"{told}; say which model it is for (--base)", self._source.where, unmatched[0])
        if self._strict or not found:
            self._check_type(unknown)
        notes = [*names.notes, *context.notes]
        named = self._config.kept.get("base_model_name_or_path", "")
        base = f"{named} (base_model_name_or_path)" if named else ""
        report = ReadReport(matched, unmatched, unknown, notes, "PEFT", self._config.version, base, fresh=True)
        if not found:
            return None, report
        metadata = {**self._source.metadata, **self._config.kept}
        return Checkpoint(found.parts(context.shared), metadata=metadata), report

    def _module(
        self,
        foreign: Foreign,
        keys: Mapping[str, str],
        tensors: Mapping[str, Tensor],
        names: ModelNames,
        context: Context,
    ) -> tuple[ForeignModule, Context]:
        config = self._config.at(names.pattern_path(foreign))
        if names.doubled(foreign):
            _double(config)
            context.note(f"{foreign.path}: PEFT adds the update of this projection twice, and so it is read")
        own = dataclasses.replace(context, config=config)
        shape = self._dialect.shape({name: tensors[key] for name, key in keys.items()}, own)
        places = names.places(foreign, shape) if len(self._points) else _made_up(foreign, shape)
        return ForeignModule(foreign.path, keys, places), own

    def _check_replication(self, unmatched: list[str]) -> None:
        """Raises where the file is for more layers than the model has: PEFT repeats some of the base's."""
        repeated = self._config.values.get("layer_replication")
        if repeated and unmatched:
            told = f"is for a base whose layers are repeated, {shown(repeated)}, and {unmatched[0]!r} is not here"
            mend = "build the model with these layers in its list, and load the adapter into that"
            raise BaseMismatchError(f"{told}; {mend}", self._source.where, "layer_replication")

    def _check_type(self, unknown: list[str]) -> None:
        """Raises where a type is PEFT's, and nobody here reads its tensors."""
        if unknown and self._config.type:
            missing = "".join(f" {error}" for error in self._dialect.missing)
            told = f"is of PEFT's type {self._config.type}, whose tensors ({shown(unknown[0])}) nothing here reads"
            mend = "a plug-in with a codec of the dialect 'peft' would; adapterkit-peft-types has many"
            raise UnsupportedFileError(f"{told}; {mend}.{missing}", self._source.where, "peft_type")


def _double(config: dict[str, Any]) -> None:
    if isinstance(config.get("lora_alpha"), (int, float)):
        config["lora_alpha"] *= 2


def _made_up(foreign: Foreign, shape: tuple[int, ...] | None) -> list[Place] | None:
    return None if shape is None else [made_up("model", foreign.path or "model", shape)]
