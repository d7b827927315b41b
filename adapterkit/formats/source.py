"""What an adapter is read from: a file, a folder, or tensors in memory. Formats see no difference where there is none.

A file's header is parsed once, whoever asks, and its tensors are read when they are asked for.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, TypeAlias

from torch import Tensor

from adapterkit.errors import CheckpointError, ConfigError, InvalidHeaderError, NotRegularFileError, did_you_mean, shown
from adapterkit.formats import container, pickles, strict_json
from adapterkit.formats.container import Entry, Header
from adapterkit.formats.files import open_plain
from adapterkit.formats.strict_json import StrictJSONError

JSON_LIMIT = 1 << 24
"""Bytes of a JSON file."""
_SUFFIXES = frozenset({".safetensors", ".bin", ".pt"})
_SHOWN = 3


class Source:
    """What an adapter is read from.

    Attributes:
        where: What errors name: a path, or words.
        path: The file or folder; None for tensors in memory.
        is_folder: Whether it is a folder: it then has files, and no tensors of its own.
    """

    where: object = "an adapter in memory"
    path: Path | None = None
    is_folder: bool = False

    @staticmethod
    def of(given: Readable, metadata: Mapping[str, str] | None = None, *, allow_pickle: bool = False) -> Source:
        """A source of a path or of tensors; one that is a source already is itself.

        Args:
            given: A file or folder, which need not exist, or tensors by name.
            metadata: Beside tensors, what a file's metadata would say.
            allow_pickle: Whether a file that is a pickle of tensors may be opened.
        """
        if isinstance(given, Source):
            return given
        if isinstance(given, Mapping):
            return MemorySource(given, metadata or {})
        path = path_of(given, "load()", "a file, a folder or tensors by name")
        return FolderSource(path, allow_pickle) if _is_folder(path) else FileSource(path, allow_pickle)

    @property
    def name(self) -> str:
        """What it is called, for an adapter's name: a file without its ending."""
        return ""

    @property
    def entries(self) -> Mapping[str, Entry]:
        """Dtype and shape of every tensor by name; of a file, checked against the file's size.

        Raises:
            CheckpointError: It holds no tensors, or is damaged.
        """
        raise NotImplementedError

    @property
    def metadata(self) -> Mapping[str, str]:
        """What is said beside the tensors.

        Raises:
            CheckpointError: As for `entries`.
        """
        raise NotImplementedError

    def tensors(self, names: Collection[str] | None = None) -> dict[str, Tensor]:
        """The tensors of these names, or all; the caller's own, to be changed and kept. Each call reads anew.

        Raises:
            CheckpointError: As for `entries`; or a file is another by now than it was.
        """
        raise NotImplementedError

    @property
    def head(self) -> bytes:
        """The first 64 bytes of a file, to tell its kind; none where there is no file to read."""
        return b""

    @contextlib.contextmanager
    def open(self) -> Iterator[tuple[BinaryIO, int]]:
        """A file, opened for reading, and its size in bytes: for formats that are no safetensors files.

        Raises:
            CheckpointError: It is no plain file.
        """
        raise NotRegularFileError("is no file, and a file is expected", self.where)
        yield

    @property
    def files(self) -> tuple[str, ...]:
        """The names in a folder; of a file, those beside it. Hidden ones are left out."""
        return ()

    def file(self, name: str) -> Source:
        """The file or folder of this name, in a folder or beside a file.

        Raises:
            CheckpointError: There is none, or the name leads elsewhere.
        """
        raise CheckpointError(f"{name!r} is expected with it, and there are no files", self.where)

    def json(self, name: str) -> Any:
        """What the JSON file of this name holds, in a folder or beside a file.

        Raises:
            InvalidHeaderError: It is no JSON, or says a thing twice.
            CheckpointError: As for `file`.
        """
        found = self.file(name)
        with found.open() as (file, size):
            if size > JSON_LIMIT:
                raise InvalidHeaderError(f"{size:,} bytes of JSON; the limit is {JSON_LIMIT:,}", found.where)
            text = file.read()
        try:
            return strict_json.loads(text)
        except StrictJSONError as error:
            raise InvalidHeaderError(f"is {error}", found.where) from error


def path_of(given: object, where: str, expected: str = "a path") -> Path:
    """What a user says is a path.

    Raises:
        ConfigError: It is none.
    """
    try:
        return Path(given)  # type: ignore[arg-type]
    except Exception as error:  # `__fspath__` may be anybody's
        raise ConfigError([f"expected {expected}, not {shown(given)}"], where) from error


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):  # too long a name, no permission: whoever opens it says so
        return False


Readable: TypeAlias = Source | str | os.PathLike[str] | Mapping[str, Tensor]


class MemorySource(Source):
    """Tensors in memory. What is handed out are copies: the caller's are neither changed nor kept."""

    def __init__(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        wrong = [key for key, value in tensors.items() if not isinstance(key, str) or not isinstance(value, Tensor)]
        if wrong:
            raise ConfigError(
                [f"expected names with tensors; {shown(wrong[0])} has {type(tensors[wrong[0]]).__name__}"]
            )
        self._tensors, self._metadata = dict(tensors), dict(metadata)

    @functools.cached_property
    def entries(self) -> Mapping[str, Entry]:  # type: ignore[override]
        return {name: Entry(tensor.dtype, tuple(tensor.shape)) for name, tensor in self._tensors.items()}

    @property
    def metadata(self) -> Mapping[str, str]:
        return self._metadata

    def tensors(self, names: Collection[str] | None = None) -> dict[str, Tensor]:
        chosen = self._tensors if names is None else {n: t for n, t in self._tensors.items() if n in names}
        return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in chosen.items()}


class _Place(Source):
    """A path."""

    def __init__(self, path: Path, allow_pickle: bool = False) -> None:
        self.path = self.where = path
        self._allow_pickle = allow_pickle

    @property
    def folder(self) -> Path:
        """Where its files are."""
        assert self.path is not None
        return self.path if self.is_folder else self.path.parent

    @property
    def files(self) -> tuple[str, ...]:
        try:
            return tuple(sorted(entry.name for entry in self.folder.iterdir() if not entry.name.startswith(".")))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot be read: {error}", self.folder) from error

    def file(self, name: str) -> Source:
        if not name or name in (".", "..") or {"/", "\\", "\0"} & set(name):
            raise CheckpointError(f"names {name[:80]!r}, which is no file of its folder", self.where)
        path = self.folder / name
        if not path.exists():
            raise CheckpointError(f"there is no such file.{did_you_mean(name, self.files)}", path)
        return Source.of(path, allow_pickle=self._allow_pickle)


class FolderSource(_Place):
    """A folder."""

    is_folder = True

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def entries(self) -> Mapping[str, Entry]:
        raise self._no_file()

    @property
    def metadata(self) -> Mapping[str, str]:
        raise self._no_file()

    def tensors(self, names: Collection[str] | None = None) -> dict[str, Tensor]:
        raise self._no_file()

    @contextlib.contextmanager
    def open(self) -> Iterator[tuple[BinaryIO, int]]:
        raise self._no_file()
        yield

    def _no_file(self) -> NotRegularFileError:
        files = [name for name in self.files if Path(name).suffix in _SUFFIXES]
        mend = f"such as {', '.join(files[:_SHOWN])} in it" if files else "or an adapter's own folder"
        return NotRegularFileError(f"is a folder; expected a plain file, {mend}", self.path)


class FileSource(_Place):
    """A file: a safetensors file, a pickle of tensors where that is allowed, or any other, to be opened."""

    @property
    def name(self) -> str:
        return self.folder.joinpath(self.path or "").stem

    @functools.cached_property
    def _reader(self) -> ModuleType:
        """What reads such a file."""
        return pickles if self._allow_pickle and pickles.is_pickle(self.head) else container

    @functools.cached_property
    def _header(self) -> Header:
        return self._reader.read_header(self.path)

    @property
    def entries(self) -> Mapping[str, Entry]:
        return self._header.entries

    @property
    def metadata(self) -> Mapping[str, str]:
        return self._header.metadata

    def tensors(self, names: Collection[str] | None = None) -> dict[str, Tensor]:
        return self._reader.read_tensors(self.path, self._header, names)

    @functools.cached_property
    def head(self) -> bytes:  # type: ignore[override]
        with self.open() as (file, _):
            return file.read(64)

    @contextlib.contextmanager
    def open(self) -> Iterator[tuple[BinaryIO, int]]:
        assert self.path is not None
        with open_plain(self.path) as opened:
            yield opened
