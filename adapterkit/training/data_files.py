"""Finding the files of training data: what is there, what is left out, and why."""

from __future__ import annotations

import hashlib
import os
import stat
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from adapterkit.errors import DataError, RowError, printable
from adapterkit.training.faults import joined

_LITTER = frozenset(
    {
        "__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "system volume information", "@eadir",
        "#recycle", "lost+found",
    }
)  # fmt: skip
SPLITS = frozenset({"train", "training", "val", "valid", "validation", "test", "testing", "dev"})
"""Names of folders that are parts of one set of data, to train on and to measure with."""
_TOLD = 3  # files that a note names
_Result = TypeVar("_Result")


class Notes:
    """What was left out of the data, or is not used as it stands: told once, one sentence for each reason.

    Args:
        folder: The data; names are told relative to it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._names: dict[str, dict[str, None]] = {}

    def add(self, reason: str, path: Path) -> None:
        """Notes a file or folder."""
        self._names.setdefault(reason, {})[name_of(path, self.folder)] = None

    def take(self, others: Notes) -> None:
        """Notes what others have noted of the same data."""
        for reason, names in others._names.items():
            self._names.setdefault(reason, {}).update(names)

    def warn(self) -> None:
        """Tells whoever calls, where there is no run that would."""
        for sentence in self.sentences():
            warnings.warn(f"{self.folder}: {sentence}", stacklevel=3)

    def sentences(self) -> list[str]:
        """Each reason with the number of files, and the first of them."""
        return [f"{reason}: {listed(names)}" for reason, names in self._names.items()]


def listed(names: Iterable[str]) -> str:
    """How many there are, and the first few: `5 (a.png, b.png, c.png, ...)`."""
    names = list(names)
    more = ", ..." if len(names) > _TOLD else ""
    told = ", ".join(printable(name).replace("\n", r"\n") for name in names[:_TOLD])
    return f"{len(names)} ({told}{more})"


def name_of(path: Path, folder: Path) -> str:
    """A file's name in the data: its path as seen from the folder, with slashes."""
    return Path(os.path.relpath(path, folder)).as_posix() if path != folder else path.name


def is_hidden(path: Path) -> bool:
    """Whether its name says that it is no data: what systems and programs leave in folders."""
    return path.name.startswith(".") or path.name.casefold() in _LITTER


def walk(folder: Path, notes: Notes | None = None) -> list[Path]:
    """The files in a folder and its subfolders, sorted by path. Links are followed; what is hidden is left out.

    Raises:
        DataError: There is no such folder, or one of its subfolders cannot be listed.
    """
    if not folder.is_dir():
        raise DataError(f"data {folder} is not a folder (looked in {Path.cwd()})")
    return sorted(_below(folder, frozenset({_identity(folder)}), notes or Notes(folder)))


def _below(folder: Path, above: frozenset[tuple[int, int]], notes: Notes) -> Iterator[Path]:
    for path in _entries(folder):
        if is_hidden(path):
            notes.add("left out, hidden", path)
            continue
        try:
            mode = path.stat().st_mode
        except OSError:
            notes.add("left out, a link that leads nowhere", path)
            continue
        if stat.S_ISREG(mode):
            yield path
        elif not stat.S_ISDIR(mode):
            notes.add("left out, neither a file nor a folder", path)
        elif (identity := _identity(path)) in above:
            notes.add("left out, a link to a folder that it lies in", path)
        else:
            yield from _below(path, above | {identity}, notes)


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise DataError(f"cannot be listed ({error.strerror})", [folder]) from error


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def content_key(path: Path) -> str:
    """A hash of what a file holds: the same after a copy, another after an edit, whatever its times say.

    Raises:
        DataError: It cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    try:
        with path.open("rb") as file:
            while part := file.read(1 << 20):
                digest.update(part)
        return digest.hexdigest()
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})", [path]) from error


def gather(paths: Iterable[Path], read: Callable[[Path], _Result]) -> list[_Result]:
    """What `read` makes of every file.

    Raises:
        DataError: Naming all files that it refuses, with the reason of the first; of rows all, with their reasons.
    """
    results, failures = [], []
    for path in paths:
        try:
            results.append(read(path))
        except DataError as error:
            failures.append((path, error))
    if failures:
        rows = [error for _, error in failures if isinstance(error, RowError)]
        if len(rows) == len(failures) and sum(one.count for one in rows) > 1:
            raise joined(rows)
        told = f"{len(failures)} file{'s' * (len(failures) > 1)}: {failures[0][1].reason}"
        raise DataError(told, [path for path, _ in failures])
    return results


def together(errors: Sequence[DataError]) -> DataError:
    """Several errors as one."""
    if len(errors) == 1:
        return errors[0]
    return DataError("; and ".join(one.reason for one in errors), [file for one in errors for file in one.files])
