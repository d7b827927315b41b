"""Sequences of whole numbers in files, read by memory map: how many there are takes disk, and next to no memory."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from adapterkit.errors import DataError

_NUMBER, _ENTRY = np.dtype("<i4"), np.dtype("<i8")
_LARGE = 1 << 20  # bytes that are written at a time


class Shelf:
    """Is written once, then read, also by processes that are forked after `finish`.

    Args:
        numbers: An open file, for what the sequences hold: int32, one behind the other.
        index: An open file, for where each ends and its tag: int64, [sequences, 2].
    """

    def __init__(self, numbers: IO[bytes], index: IO[bytes]) -> None:
        self._files: tuple[IO[bytes], ...] = (numbers, index)
        self._end = 0

    @classmethod
    def temporary(cls, near: Path) -> Shelf:
        """In files without a name, which are gone with the process.

        Args:
            near: They lie in the next folder above this path that there is and can be written to; the system's folder
                for such files is often kept in memory.
        """
        for folder in (*near.absolute().parents, None):
            with contextlib.suppress(OSError):
                return cls(*(tempfile.TemporaryFile(dir=folder, buffering=_LARGE) for _ in range(2)))
        raise DataError(f"nothing can be written near {near}, where tokens are kept while training")

    def append(self, numbers: Any, tag: int | None = 0) -> None:
        """Adds a sequence [length] with a number that says what it is.

        Args:
            numbers: What it holds.
            tag: That number; None where what comes next belongs to the same sequence.

        Raises:
            DataError: The disk is full.
        """
        row = np.asarray(numbers, _NUMBER)
        self._end += len(row)
        entry = np.array([] if tag is None else [self._end, tag], _ENTRY)
        with _writing():
            for file, values in zip(self._files, (row, entry), strict=True):
                file.write(values.tobytes())

    def finish(self) -> Shelf:
        """What was written can be read from now on. The files are closed: what is mapped stays so without them.

        Raises:
            DataError: The disk is full.
        """
        with _writing():
            self._numbers, index = (_mapped(*one) for one in zip(self._files, (_NUMBER, _ENTRY), strict=True))
        self._index = index.reshape(-1, 2)
        self.close()
        return self

    def close(self) -> None:
        """Lets go of the files, also where what waits for them cannot be written."""
        for file in self._files:
            with contextlib.suppress(OSError):
                file.close()
        self._files = ()

    def __len__(self) -> int:
        return len(self._index)

    @property
    def total(self) -> int:
        """Numbers in all sequences."""
        return len(self._numbers)

    @property
    def tags(self) -> np.ndarray:
        """Of the sequences: int64, [sequences]."""
        return self._index[:, 1]

    def span(self, place: int) -> tuple[int, int]:
        """Where a sequence begins and ends."""
        return int(self._index[place - 1, 0]) if place else 0, int(self._index[place, 0])

    def between(self, start: int, end: int) -> Tensor:
        """Numbers from there to there, a copy in memory: int32, [end - start]."""
        return torch.from_numpy(self._numbers[start:end].astype(np.int32))

    def __getitem__(self, place: int) -> Tensor:
        """A sequence: int32, [length]."""
        return self.between(*self.span(place))


@contextlib.contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        told = f"tokens cannot be kept on disk ({error.strerror}); make room, or set output or options.cache"
        raise DataError(f"{told} to a place that has it") from error


def _mapped(file: IO[bytes], dtype: np.dtype[Any]) -> np.ndarray:
    file.seek(0, 2)
    if not file.tell():  # no memory can be mapped to nothing
        return np.empty(0, dtype)
    return np.memmap(file, dtype, "r")
