"""Which format a file has: by name, or by what recognises its content."""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from adapterkit.checkpoint import Checkpoint, Format
from adapterkit.errors import (
    AdapterKitError,
    AmbiguousFormatError,
    BrokenFormatError,
    CheckpointError,
    NotRegularFileError,
    UnsupportedFileError,
    did_you_mean,
)
from adapterkit.plugins.manager import get_plugin_manager, instance_of, owner
from adapterkit.points import Points
from adapterkit.specs import FormatSpec

_log = logging.getLogger(__name__)


class NamedFormat(Format):
    """An installed format. Whatever it does wrong is a CheckpointError that names it.

    Args:
        spec: What a plug-in has registered.

    Raises:
        MissingDependencyError, PluginError: It cannot be had.
    """

    def __init__(self, spec: FormatSpec) -> None:
        self.spec = spec
        self.inner = instance_of(spec, Format)

    def recognises(self, path: Path) -> bool:
        """See `Format.recognises`; raises CheckpointError where the format does not keep to it."""
        with self._blaming("recognises", path):
            return bool(self.inner.recognises(path))

    def diagnose(self, path: Path) -> None:
        with self._blaming("diagnose", path):
            self.inner.diagnose(path)

    def read(self, path: Path, points: Points) -> Checkpoint:
        with self._blaming("read", path):
            found: object = self.inner.read(path, points)
        return self._checked("read", found, path)

    def read_many(self, path: Path, points: Points) -> dict[str, Checkpoint]:
        with self._blaming("read_many", path):
            found: object = self.inner.read_many(path, points)
        if not isinstance(found, Mapping) or not found or not all(isinstance(name, str) for name in found):
            raise self._broken(f"read_many returned {_shown(found)}; expected a dict of name -> Checkpoint", path)
        return {name: self._checked("read_many", one, path) for name, one in found.items()}

    def write(self, checkpoint: Checkpoint, path: Path, points: Points) -> None:
        with self._blaming("write", path):
            self.inner.write(checkpoint, path, points)

    def write_many(self, checkpoints: Mapping[str, Checkpoint], path: Path, points: Points) -> None:
        with self._blaming("write_many", path):
            self.inner.write_many(checkpoints, path, points)

    @contextlib.contextmanager
    def _blaming(self, method: str, path: Path) -> Iterator[None]:
        try:
            yield
        except AdapterKitError:
            raise
        except IsADirectoryError as error:
            raise NotRegularFileError(f"is a folder, and {self.spec} expects a file", path) from error
        except Exception as error:  # third-party code may raise anything
            raise self._broken(f"{method} raised {type(error).__name__}: {error}", path) from error

    def _broken(self, what: str, path: Path) -> BrokenFormatError:
        return BrokenFormatError(f"{self.spec}: {what}", path, owner(self.spec))

    def _checked(self, method: str, found: object, path: Path) -> Checkpoint:
        if not isinstance(found, Checkpoint):
            raise self._broken(f"{method} returned {_shown(found)}; expected a Checkpoint", path)
        if problem := _problem(found):
            raise self._broken(f"{method} returned a Checkpoint whose {problem}", path)
        return found


def _problem(checkpoint: Checkpoint) -> str | None:
    """What of a checkpoint is not as it is declared."""
    if not isinstance(checkpoint.type, str):
        return f"type is {_shown(checkpoint.type)}; expected a str"
    for part in ("config", "tensors", "base", "backends", "metadata"):
        if not isinstance(value := getattr(checkpoint, part), Mapping):
            return f"{part} is {_shown(value)}; expected a dict"
    for part in ("tensors", "base"):
        for key, inner in getattr(checkpoint, part).items():
            if not isinstance(inner, Mapping):
                return f"{part}[{key!r}] is {_shown(inner)}; expected a dict"
    for key, own in checkpoint.tensors.items():
        for name, tensor in own.items():
            if not isinstance(tensor, Tensor):
                return f"tensors[{key!r}][{name!r}] is {_shown(tensor)}; expected a torch.Tensor (torch.from_numpy)"
    return None


def _shown(value: object) -> str:
    """A value as an error shows it, with its type: not a page of numbers."""
    if value is None:
        return "None"
    text = repr(value) if isinstance(value, (str, bytes, int, float)) else ""
    return f"{type(value).__name__} {text[:80]}".strip()


def find_format(path: Path, name: str | None = None) -> NamedFormat:
    """The format of this name, or the one that recognises the file's content.

    adapterkit's own formats are asked first: their files say whose they are, whatever a plug-in's format claims.

    Raises:
        UnknownNameError: No format has the name.
        AmbiguousFormatError: Several formats recognise the file.
        CheckpointError: No format recognises it; says what is wrong with it where a format can tell, and which
            formats could not be asked.
    """
    manager = get_plugin_manager()
    if name is not None:
        return NamedFormat(manager.format(name))
    if not path.exists() and not path.is_symlink():
        raise CheckpointError(f"there is no such file.{did_you_mean(path.name, _beside(path))}", path)
    asked: list[NamedFormat] = []
    failures: list[AdapterKitError] = []
    specs = sorted(manager.formats().values(), key=lambda spec: not _is_own(spec))
    for _, group in itertools.groupby(specs, key=_is_own):
        recognised = _recognising(group, path, asked, failures)
        if len(recognised) > 1:
            names = " and ".join(str(one.spec) for one in recognised)
            hint = f"name one with format={recognised[0].spec.name!r}"
            raise AmbiguousFormatError(f"is recognised by {names}; {hint}", path)
        if recognised:
            for error in failures:
                _log.warning("a format is ignored: %s", error)
            return recognised[0]
    raise _unrecognised(path, asked, failures)


def _beside(path: Path) -> list[str]:
    """The names of the files in a path's folder, as far as they can be read."""
    with contextlib.suppress(OSError):
        return [entry.name for entry in path.parent.iterdir() if not entry.name.startswith(".")]
    return []


def _is_own(spec: FormatSpec) -> bool:
    return spec.origin is not None and spec.origin.distribution == "adapterkit"


def _recognising(
    specs: Iterable[FormatSpec], path: Path, asked: list[NamedFormat], failures: list[AdapterKitError]
) -> list[NamedFormat]:
    """Those that recognise the file. Adds to `asked` what can be had, and to `failures` why one cannot be asked."""
    found: list[NamedFormat] = []
    for spec in specs:
        try:
            asked.append(one := NamedFormat(spec))
            if one.recognises(path):
                found.append(one)
        except AdapterKitError as error:
            failures.append(error)
    return found


def _unrecognised(path: Path, asked: Sequence[NamedFormat], failures: Sequence[AdapterKitError]) -> CheckpointError:
    """What is wrong with a file that no format recognises."""
    problem: AdapterKitError | None = None
    for one in asked:
        try:
            one.diagnose(path)
        except AdapterKitError as error:
            problem = error
            break
    if isinstance(problem, CheckpointError) and not failures:
        return problem
    known = ", ".join(one.spec.name for one in asked)
    told = str(problem) if problem else f"its content is of no format that is installed ({known})"
    unasked = f". These formats could not be asked: {'; '.join(map(str, failures))}" if failures else ""
    return UnsupportedFileError(f"{told}; name one with format=...{unasked}", path)
