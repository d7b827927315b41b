"""Which format a file has: by name, or by what recognises its content."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from adapterkit.checkpoint import (
    Checkpoint,
    Format,
    OtherReader,
    Part,
    ReadOptions,
    ReadReport,
    WriteOptions,
    WriteReport,
)
from adapterkit.errors import (
    AdapterKitError,
    AmbiguousFormatError,
    BrokenFormatError,
    CheckpointError,
    ConfigError,
    MissingKeysError,
    NotRegularFileError,
    PluginError,
    UnexpectedKeysError,
    UnsupportedFileError,
    did_you_mean,
    shown,
)
from adapterkit.formats.files import unreadable
from adapterkit.formats.source import Source
from adapterkit.mapping.targets import some
from adapterkit.plugins.manager import get_plugin_manager, instance_of, owner
from adapterkit.points import Points
from adapterkit.specs import FormatSpec

_log = logging.getLogger(__name__)

_Options = TypeVar("_Options", ReadOptions, WriteOptions)


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

    def recognises(self, source: Source) -> bool:
        """See `Format.recognises`; raises BrokenFormatError where the format does not keep to it."""
        with self._blaming("recognises", source.where):
            try:
                return bool(self.inner.recognises(source))
            except BrokenFormatError:
                raise
            except CheckpointError:
                return False

    def diagnose(self, source: Source) -> None:
        with self._blaming("diagnose", source.where):
            self.inner.diagnose(source)

    def read(
        self, source: Source, points: Points, options: ReadOptions | None = None
    ) -> tuple[dict[str, Checkpoint], ReadReport]:
        """See `Format.read`; what is left out is an error here, where `options.strict` is, or where it is everything.

        Args:
            source, points: As in `Format.read`.
            options: See `reading`; by default what the format has by default.
        """
        where, options = source.where, options or self.reading()
        with self._blaming("read", where):
            found: object = self.inner.read(source, points, options)
        if not isinstance(found, tuple) or len(found) != 2 or not isinstance(found[1], ReadReport):
            raise self._broken(f"read returned {_shown(found)}; expected a dict of Checkpoints and a ReadReport", where)
        checkpoints, report = found
        if not isinstance(checkpoints, Mapping) or not all(isinstance(name, str) for name in checkpoints):
            raise self._broken(f"read returned {_shown(checkpoints)}; expected a dict of name -> Checkpoint", where)
        _check_matched(where, checkpoints, report, strict=options.strict, named=len(points) > 0)
        for checkpoint in checkpoints.values():
            self._check(checkpoint, where)
        return dict(checkpoints), dataclasses.replace(report, format=self.spec.name)

    def reader(self, model: Any) -> OtherReader | None:
        with self._blaming("reader", type(model).__name__):
            return self.inner.reader(model)

    def place(self, folder: Path, title: str) -> Path:
        """See `Format.place`."""
        with self._blaming("place", folder):
            return self.inner.place(folder, title)

    def write(
        self, checkpoints: Mapping[str, Checkpoint], target: Path, points: Points, options: WriteOptions | None = None
    ) -> WriteReport:
        with self._blaming("write", target):
            report: object = self.inner.write(checkpoints, target, points, options or self.writing())
        if report is not None and not isinstance(report, WriteReport):
            raise self._broken(f"write returned {_shown(report)}; expected a WriteReport or None", target)
        return report or WriteReport()

    def reading(self, **options: Any) -> ReadOptions:
        """The format's options for `read`.

        Raises:
            ConfigError: It has none of such a name.
        """
        return self._made(self.inner.read_options, ReadOptions, options)

    def writing(self, **options: Any) -> WriteOptions:
        """The format's options for `write`; errors as for `reading`."""
        return self._made(self.inner.write_options, WriteOptions, options)

    def writing_known(self, **options: Any) -> WriteOptions:
        """The format's options for `write`, of these the ones that it has."""
        known = {item.name for item in dataclasses.fields(self.inner.write_options) if item.init}
        return self.writing(**{name: value for name, value in options.items() if name in known})

    def _made(self, cls: type[_Options], expected: type[_Options], options: Mapping[str, Any]) -> _Options:
        if not (isinstance(cls, type) and issubclass(cls, expected)):
            raise PluginError(f"{self.spec}: {cls!r} is no dataclass of {expected.__name__}", owner(self.spec))
        known = [item.name for item in dataclasses.fields(cls) if item.init]
        if unknown := sorted(set(options) - set(known)):
            raise ConfigError(
                [f"unknown option {key!r}.{did_you_mean(key, known)}" for key in unknown], f"options of {self.spec}"
            )
        return cls(**options)

    @contextlib.contextmanager
    def _blaming(self, method: str, where: object) -> Iterator[None]:
        try:
            yield
        except AdapterKitError:
            raise
        except IsADirectoryError as error:
            raise NotRegularFileError(f"is a folder, and {self.spec} expects a file", where) from error
        except Exception as error:  # third-party code may raise anything
            raise self._broken(f"{method} raised {type(error).__name__}: {error}", where) from error

    def _broken(self, what: str, where: object) -> BrokenFormatError:
        return BrokenFormatError(f"{self.spec}: {what}", where, owner(self.spec))

    def _check(self, found: object, where: object) -> None:
        if not isinstance(found, Checkpoint):
            raise self._broken(f"read returned {_shown(found)}; expected a Checkpoint", where)
        if problem := _problem(found):
            raise self._broken(f"read returned a Checkpoint whose {problem}", where)


def only(checkpoints: Mapping[str, Checkpoint], where: object) -> Checkpoint:
    """The one adapter of a source.

    Raises:
        UnsupportedFileError: It holds several.
    """
    if len(checkpoints) != 1:
        names = ", ".join(checkpoints)
        raise UnsupportedFileError(f"holds several adapters ({names[:200]}); Adapters.load_all() reads them", where)
    return next(iter(checkpoints.values()))


def _check_matched(
    where: object, checkpoints: Mapping[str, Checkpoint], report: ReadReport, *, strict: bool, named: bool
) -> None:
    """What nothing receives is an error where it must not be so, and where there is nothing else."""
    rest = [*report.unmatched, *report.left_over]
    told = [
        f"{len(keys):,} keys {what}: {some(keys)}"
        for keys, what in (
            (report.unmatched, "belong to no point of the model"),
            (report.left_over, "are unknown to the format"),
        )
        if keys
    ]
    if not checkpoints or (rest and not report.matched):
        why = "nothing in it fits the model" if named else "nothing in it can be read without its model (--base)"
        raise MissingKeysError(f"{why}; {'; '.join(told) or 'there is nothing in it'}", where)
    if strict and rest:
        mend = "strict=False (--lenient) loads the rest"
        raise UnexpectedKeysError(f"{'; '.join(told)}; {mend}", where, str(rest[0])[:200])


def _problem(checkpoint: Checkpoint) -> str | None:
    """What of a checkpoint is not as it is declared."""
    if problem := _unlike(checkpoint, ("base", "backends", "metadata"), ("base",)):
        return problem
    if not isinstance(checkpoint.parts, Sequence) or not checkpoint.parts:
        return f"parts is {_shown(checkpoint.parts)}; expected a list of at least one Part"
    return next((problem for part in checkpoint.parts if (problem := _part_problem(part))), None)


def _part_problem(part: object) -> str | None:
    if not isinstance(part, Part):
        return f"parts hold {_shown(part)}; expected a Part"
    if not isinstance(part.type, str):
        return f"type is {_shown(part.type)}; expected a str"
    if problem := _unlike(part, ("config", "tensors", "settings"), ("tensors", "settings")):
        return problem
    for key, own in part.tensors.items():
        for name, tensor in own.items():
            if not isinstance(tensor, Tensor):
                return f"tensors[{key!r}][{name!r}] is {_shown(tensor)}; expected a torch.Tensor (torch.from_numpy)"
    return None


def _unlike(whole: object, dicts: Sequence[str], nested: Sequence[str]) -> str | None:
    """Which of these fields is no dict, or, of the nested ones, no dict of dicts."""
    for name in dicts:
        if not isinstance(value := getattr(whole, name), Mapping):
            return f"{name} is {_shown(value)}; expected a dict"
    for name in nested:
        for key, inner in getattr(whole, name).items():
            if not isinstance(inner, Mapping):
                return f"{name}[{key!r}] is {_shown(inner)}; expected a dict"
    return None


def _shown(value: object) -> str:
    """A value as an error shows it, with its type: not a page of numbers."""
    if value is None:
        return "None"
    text = repr(value) if isinstance(value, (str, bytes, int, float)) else ""
    return f"{type(value).__name__} {text[:80]}".strip()


def named_format(name: str) -> NamedFormat:
    """The format of this name.

    Raises:
        UnknownNameError: There is none.
    """
    return NamedFormat(get_plugin_manager().format(name))


def find_format(source: Source, name: str | None = None) -> NamedFormat:
    """The format of this name, or the one that recognises the file's content.

    adapterkit's own formats are asked first: their files say whose they are, whatever a plug-in's format claims.

    Raises:
        UnknownNameError: No format has the name.
        AmbiguousFormatError: Several formats recognise the file.
        CheckpointError: No format recognises it; says what is wrong with it where a format can tell, and which
            formats could not be asked.
    """
    if name is not None:
        return named_format(name)
    _check_exists(source.path)
    asked: list[NamedFormat] = []
    failures: list[AdapterKitError] = []
    specs = sorted(get_plugin_manager().formats().values(), key=lambda spec: not _is_own(spec))
    for _, group in itertools.groupby(specs, key=_is_own):
        recognised = _recognising(group, source, asked, failures)
        if len(recognised) > 1:
            names = " and ".join(str(one.spec) for one in recognised)
            hint = f"name one with format={recognised[0].spec.name!r}"
            raise AmbiguousFormatError(f"is recognised by {names}; {hint}", source.where)
        if recognised:
            for error in failures:
                _log.warning("a format is ignored: %s", error)
            return recognised[0]
    raise _unrecognised(source, asked, failures)


def _check_exists(path: Path | None) -> None:
    if path is None:
        return
    try:
        path.lstat()
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error


def _is_own(spec: FormatSpec) -> bool:
    return spec.origin is not None and spec.origin.distribution == "adapterkit"


def _recognising(
    specs: Iterable[FormatSpec], source: Source, asked: list[NamedFormat], failures: list[AdapterKitError]
) -> list[NamedFormat]:
    """Those that recognise the file. Adds to `asked` what can be had, and to `failures` why one cannot be asked."""
    found: list[NamedFormat] = []
    for spec in specs:
        try:
            asked.append(one := NamedFormat(spec))
            if one.recognises(source):
                found.append(one)
        except AdapterKitError as error:
            failures.append(error)
    return found


def _like(source: Source) -> str:
    """What a tensor of it is called; nothing where it has none."""
    try:
        first = next(iter(source.entries), None)
    except CheckpointError:
        return ""
    return "" if first is None else f" ({len(source.entries):,} tensors, as {shown(first)})"


def _unrecognised(source: Source, asked: Sequence[NamedFormat], failures: Sequence[AdapterKitError]) -> CheckpointError:
    """What is wrong with a file that no format recognises."""
    problems: list[AdapterKitError] = []
    for one in asked:
        try:
            one.diagnose(source)
        except AdapterKitError as error:
            problems.append(error)
    # That it is a folder is the least that can be said of one.
    problem = next((one for one in problems if not isinstance(one, NotRegularFileError)), next(iter(problems), None))
    if isinstance(problem, CheckpointError) and not failures:
        return problem
    known = ", ".join(one.spec.name for one in asked)
    told = str(problem) if problem else f"its content{_like(source)} is of no format that is installed ({known})"
    unasked = f". These formats could not be asked: {'; '.join(map(str, failures))}" if failures else ""
    return UnsupportedFileError(f"{told}; name one with format=...{unasked}", source.where)
