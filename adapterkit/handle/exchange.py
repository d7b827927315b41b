"""The part of the handle that takes adapters in and out: from files, into files, off the model."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from adapterkit.checkpoint import Checkpoint, ReadReport
from adapterkit.errors import ConfigError, InvalidNameError, StateError, shown
from adapterkit.formats import registry
from adapterkit.formats.source import Readable, Source, path_of
from adapterkit.handle import building, loading, merging, saving
from adapterkit.handle.base import Access
from adapterkit.handle.concurrency import require_no_calls, require_unused
from adapterkit.handle.effects import Watched
from adapterkit.handle.initialising import require_values
from adapterkit.handle.refilling import refill
from adapterkit.handle.reports import LoadReport
from adapterkit.handle.view import seen
from adapterkit.mapping import targets
from adapterkit.mapping.model import MappedModel
from adapterkit.points import Points


class Exchange(Access):
    """What comes from a file, what goes into one, and what leaves."""

    def load(
        self,
        source: Readable,
        name: str | None = None,
        *,
        format: str | None = None,
        strict: bool = True,
        allow_pickle: bool = False,
        **options: Any,
    ) -> LoadReport:
        """Reads an adapter. It neither acts nor trains until it is told to, and freezes nothing.

        Args:
            source: A file, a folder, or a `Source`. Tensors by name, which are copied, where a format knows an adapter
                by their names alone; the native one needs a file's metadata with them, `Source.of(tensors, metadata)`.
            name: By default the file's name without its ending, or the folder's.
            format: A format's name; by default the content tells.
            strict: Whether everything that is read must fit this model.
            allow_pickle: Whether a pickle of tensors may be opened, with torch's `weights_only`.
            options: Further ones of the format; see `Format.read_options`.

        Raises:
            CheckpointError: What is read cannot be used, and the model is left as it was. Its subclasses say why: it is
                no plain file (NotRegularFileError), damaged (CorruptFileError), not to be read by this release
                (UnsupportedFileError), of several formats (AmbiguousFormatError), described wrongly
                (InvalidHeaderError), of an unknown type (UnknownAdapterTypeError), for another base
                (BaseMismatchError), lacks tensors or has more (MissingKeysError, UnexpectedKeysError), or has some of
                another shape or dtype, or with NaN (ShapeMismatchError, DtypeMismatchError, NonFiniteError).
            InvalidNameError: The name is malformed or taken.
            UnknownNameError: There is no such format.
            ConfigError: The format has no such option, or the adapter combines others that are not there.
            PluginError: A plug-in's format or type fails.
            AttachError, ReplacedError: The model cannot be adapted in place, or is not what it was.
        """
        source = Source.of(source, allow_pickle=allow_pickle)
        if name is None and not source.name:
            raise InvalidNameError("tensors in memory have no name of their own; give one: load(tensors, 'style')")
        name = building.check_name(source.name if name is None else name, self._state.adapters)
        points = seen(self._mapped)
        found, report = _read(source, format, points, strict=strict, allow_pickle=allow_pickle, **options)
        checkpoint = registry.only(found, source.where)
        return self._install(name, checkpoint, points, strict, source.where, report)

    def load_into(
        self,
        name: str,
        source: Readable,
        *,
        format: str | None = None,
        strict: bool = True,
        allow_pickle: bool = False,
        **options: Any,
    ) -> LoadReport:
        """Reads values into an adapter that is there. Its parameters stay the same objects: an optimizer keeps them.

        What acts and what trains stays as it is. Of a file of several adapters it reads the one of this name.

        Args:
            name: The adapter.
            source: As for `load`.
            format: As for `load`.
            strict: Whether points and configs (but for `targets`) must be equal. Otherwise points that the file lacks
                keep their values, and whatever differs is a warning.
            allow_pickle: As for `load`.
            options: As for `load`.

        Raises:
            UnknownNameError: There is no such adapter.
            AdapterMismatchError: What is read is an adapter of another type, or of another config.
            CheckpointError: It is damaged, for another base, or has other points or shapes. Nothing is changed.
            StateError: The adapter is merged, acts in a call of another thread, or has no values here.
        """
        source = Source.of(source, allow_pickle=allow_pickle)
        attached = self._attached(name)
        mapped = self._mapped_for(attached)
        points = seen(mapped)
        found, report = _read(source, format, points, strict=strict, allow_pickle=allow_pickle, **options)
        checkpoint = found[name] if name in found else registry.only(found, source.where)
        with self._changing() as state:
            self._check()
            if state.merge is not None and name in state.merge.selection.names:
                raise StateError(f"{name!r} is merged into the weights, which would not follow; unmerge() first")
            if name in state.switch.names:
                require_no_calls(state.roots, f"load into {name!r}, which acts,")
            notes = refill(attached, checkpoint, mapped, points, strict, source.where, finite=report.finite)
            state.adapters[name] = dataclasses.replace(attached, metadata=dict(checkpoint.metadata))
        return self._loaded(name, checkpoint, notes, report)

    def install(
        self,
        name: str,
        checkpoint: Checkpoint,
        *,
        strict: bool = True,
        source: object = None,
        report: ReadReport | None = None,
    ) -> LoadReport:
        """Attaches an adapter that is already in memory; what `load` does after reading. Errors name `source`."""
        if not isinstance(checkpoint, Checkpoint):  # pyright: ignore[reportUnnecessaryIsInstance] - what users give
            raise ConfigError([f"expected a Checkpoint, not {shown(checkpoint)}; load() reads files"], "install()")
        return self._install(name, checkpoint, self._mapped.points(), strict, source, report)

    def _install(
        self,
        name: str,
        checkpoint: Checkpoint,
        points: Points,
        strict: bool,
        source: object,
        report: ReadReport | None,
    ) -> LoadReport:
        with self._changing() as state:
            self._check()
            building.check_name(name, state.adapters)
            told = {} if report is None else {"finite": report.finite, "fresh": report.fresh}
            built, notes = loading.build_loaded(checkpoint, self._mapped, points, strict, source, **told)
            self._check_parts(built)
            state.insert(name, built, self._mapped, checkpoint.metadata)
        return self._loaded(name, checkpoint, notes, report)

    def _loaded(self, name: str, checkpoint: Checkpoint, notes: Sequence[str], report: ReadReport | None) -> LoadReport:
        attached = self._attached(name)
        return LoadReport(
            name=name,
            type=" + ".join(part.type for part in checkpoint.parts),
            points=list(attached.points),
            parameters=sum(p.numel() for p in building.parameters_of(attached.modules.values())),
            notes=[*(report.notes if report else ()), *notes],
            metadata=self.metadata(name),
            read=report or ReadReport(),
            adapter=Watched(self._state, name),
        )

    def load_all(
        self,
        source: Readable,
        *,
        format: str | None = None,
        strict: bool = True,
        allow_pickle: bool = False,
        **options: Any,
    ) -> dict[str, LoadReport]:
        """Reads every adapter of a source under the name that it has there: all of them, or none.

        One without a name gets the file's. Arguments and errors as for `load`.
        """
        source = Source.of(source, allow_pickle=allow_pickle)
        points = seen(self._mapped)
        found, report = _read(source, format, points, strict=strict, allow_pickle=allow_pickle, **options)
        named = {name or source.name: checkpoint for name, checkpoint in found.items()}
        with self._changing() as state:
            for name in named:
                building.check_name(name, state.adapters)
            reports: dict[str, LoadReport] = {}
            try:
                for name, checkpoint in named.items():
                    reports[name] = self._install(name, checkpoint, points, strict, source.where, report)
            except BaseException:
                for name in reversed(reports):
                    self.remove(name)
                raise
        return reports

    def save(
        self,
        names: str | Sequence[str],
        path: str | os.PathLike[str],
        *,
        format: str = "native",
        metadata: Mapping[str, str] | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> Path:
        """Writes adapters to a file, atomically: whatever happens, the path holds the old file or the new.

        Several adapters, whatever their types, go into one file, which `load_all` reads. An adapter that combines
        others takes them along.

        Args:
            names: One name, or several.
            path: The file, or the folder where the format writes one.
            format: A format's name; not every format holds several.
            metadata: Text by name that goes along, beside what the adapters have (see `metadata`) or in its place.
            dtype: What floating-point tensors are written as; by default as they are.
            options: Further ones of the format; see `Format.write_options`.

        Raises:
            UnknownNameError: There is no such adapter or format.
            ConfigError: The format has no such option, or a name stands twice.
            CheckpointError: The format cannot express the adapter, or the place cannot be written.
        """
        path = path_of(path, "save()")
        writer = registry.named_format(format)
        chosen = writer.writing(dtype=saving.checked_dtype(dtype), **options)
        more = saving.checked_metadata(metadata)
        wanted = self._with_parts(saving.checked_names(names))
        self._check()  # before a backend looks at a model that is not what it was
        mapped = {name: self._mapped_for(self._attached(name)) for name in wanted}
        views = {id(one): seen(one) for one in mapped.values()}  # each model is looked at once
        checkpoints = {name: self._checkpoint(name, one, views[id(one)]) for name, one in mapped.items()}
        checkpoints = {n: one.replace(metadata={**one.metadata, **more}) for n, one in checkpoints.items()}
        if len(checkpoints) == 1 and isinstance(names, str):
            checkpoints = {"": checkpoints[names]}
        whole = next((one for one in mapped.values() if one is not self._mapped), self._mapped)
        report = writer.write(checkpoints, path, views[id(whole)], chosen)
        for note in report.notes:
            warnings.warn(f"{path}: {note}", stacklevel=2)
        return path

    def _check_parts(self, built: Sequence[building.Built]) -> None:
        attached = {name: one.points for name, one in self._state.adapters.items()}
        for one in built:
            here: dict[str, set[str]] = {}
            for key, module in one.modules.items():
                for part in module.parts:
                    here.setdefault(part, set()).add(key)
            targets.check_parts(here, attached, type(one.config).__name__)

    def _with_parts(self, names: Sequence[str]) -> list[str]:
        """The names, each after those that its adapter combines."""
        found: dict[str, None] = {}
        for name in names:
            modules = self._attached(name).modules.values()
            parts = dict.fromkeys(part for module in modules for part in module.parts)
            found |= dict.fromkeys([*self._with_parts(list(parts)), name])
        return list(found)

    def checkpoint(self, name: str) -> Checkpoint:
        """One adapter with all that a file must know of it; the tensors are copies on the CPU. `install` takes it.

        Raises:
            PluginError: The adapter's type is not registered, so no file could name it.
        """
        return self._checkpoint(name, self._mapped_for(self._attached(name)))

    def _checkpoint(self, name: str, mapped: MappedModel, here: Points | None = None) -> Checkpoint:
        self._check()
        require_values([name], self._state, "save")
        return saving.to_checkpoint(self._attached(name), mapped, here)

    def remove(self, name: str) -> None:
        """Takes an adapter off the model. The last one leaves the model bit for bit as it was found.

        A module that was replaced since gets back what it was, wherever it is now.

        Raises:
            StateError: It is merged into the weights; a block of another thread or task has it, or it acts in a call of
                another thread; or another library has changed the class of a module. Nothing is changed.
        """
        self._remove(name, force=False)

    def _remove(self, name: str, *, force: bool) -> list[str]:
        with self._changing() as state:
            self._attached(name)
            if state.merge is not None and name in state.merge.selection.names:
                raise StateError(f"{name!r} is merged into the weights; unmerge() before removing it")
            if users := self._users_of(name):
                raise StateError(f"{users[0]!r} combines {name!r}; remove({users[0]!r}) first")
            return state.discard(name, force=force)

    def detach(self, *, force: bool = False) -> None:
        """Takes every adapter off: the model is bit for bit what it was. Merged weights are unmerged first.

        Args:
            force: Whether to put right what can be put right, where another library has changed what was adapted, and
                to tell the rest in a warning.

        Raises:
            StateError: A block of another thread or task has an adapter, or one acts in a call of another thread; or
                another library has changed the class of a module, or weights while they were merged.
        """
        left: list[str] = []
        with self._changing() as state, state.switch.held():
            require_unused(state.switch, state.adapters)
            if not state.switch.default.idle:
                require_no_calls(state.roots, "detach what acts")
            if state.merge is not None:
                left += merging.unmerge(state, force=force)
            for name in reversed(list(state.adapters)):  # what combines others came after them
                left += [f"the class of {path}" for path in self._remove(name, force=force)]
        if left:
            warnings.warn(f"detached, and left as they are: {', '.join(dict.fromkeys(left))}", stacklevel=2)

    def metadata(self, name: str) -> dict[str, str]:
        """What the file of an adapter says beside the tensors; empty for one that is no file's."""
        return dict(self._attached(name).metadata)

    def _users_of(self, name: str) -> list[str]:
        """The adapters that combine this one."""
        every = self._state.adapters.items()
        return [user for user, one in every if any(name in module.parts for module in one.modules.values())]


def _read(
    source: Source, format: str | None, points: Points, **options: Any
) -> tuple[dict[str, Checkpoint], ReadReport]:
    reader = registry.find_format(source, format)
    return reader.read(source, points, reader.reading(**options))
