"""Where what was computed of pictures and captions is kept: in memory, or in a folder that outlives the run."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import monotonic
from typing import Protocol

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, distributed

from adapterkit.errors import DataError

Tensors = Mapping[str, Tensor]
_ENDING = ".entry"
_DIGEST = 16
_KEY = 16
_PATIENCE = 10  # seconds between two lines


def key_of(*parts: object) -> str:
    """The name of what follows from these parts alone."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=_KEY).hexdigest()


class Store(Protocol):
    """Tensors by `key_of` what they follow from.

    Attributes:
        damaged: What was found and could not be used.
        held: Bytes of what is kept in memory.
    """

    damaged: list[Path]
    held: int

    def get(self, key: str) -> Tensors | None:
        """What was put there; None where there is nothing, or nothing that is whole."""
        ...

    def put(self, key: str, tensors: Tensors) -> None:
        """Keeps tensors on the CPU."""
        ...


class MemoryStore:
    """For one run.

    Args:
        most: How many entries are kept, those that were used last; None for all.
    """

    def __init__(self, most: int | None = None) -> None:
        self.most = most
        self.damaged: list[Path] = []
        self._entries: dict[str, Tensors] = {}
        self.held = 0

    def get(self, key: str) -> Tensors | None:
        """See `Store`."""
        found = self._entries.pop(key, None)
        if found is not None:
            self._entries[key] = found  # now the last
        return found

    def put(self, key: str, tensors: Tensors) -> None:
        """See `Store`."""
        self.held += _size(tensors) - _size(self._entries.pop(key, {}))
        self._entries[key] = tensors
        if self.most is not None and len(self._entries) > self.most:
            self.held -= _size(self._entries.pop(next(iter(self._entries))))


class FolderStore:
    """A file for each entry, written whole or not at all, with a sum that tells damage.

    Runs may share a folder, also at once. What is in it may be deleted at any time.

    Args:
        folder: Is made when something is kept.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.held = folder, 0
        self.damaged: list[Path] = []

    def get(self, key: str) -> Tensors | None:
        """See `Store`."""
        path = self._path(key)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise DataError(f"cannot be read ({error.strerror}); see options.cache", [path]) from error
        if len(data) > _DIGEST and _digest(data[_DIGEST:]) == data[:_DIGEST]:
            with contextlib.suppress(SafetensorError):
                return load(data[_DIGEST:])
        self.damaged.append(path)
        return None

    def put(self, key: str, tensors: Tensors) -> None:
        """See `Store`."""
        data = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
        path = self._path(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(_digest(data) + data)
                Path(name).replace(path)
            except BaseException:
                Path(name).unlink(missing_ok=True)
                raise
        except OSError as error:
            raise DataError(
                f"the cache cannot be written ({error.strerror}); set options.cache to a folder with room", [path]
            ) from error

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}{_ENDING}"


def make(
    store: Store, what: str, keys: Sequence[str], made: Callable[[int], Tensors], tell: Callable[[str], object]
) -> None:
    """Puts into a store what it lacks, and says what takes long, what was there and what was damaged.

    Processes that share a folder begin at different places, and make nothing that another has made by then.

    Args:
        store: Where it is kept.
        what: In the plural.
        keys: Of all that is needed.
        made: The tensors of a key, by its number.
        tell: Is told.
    """
    numbers = {key: number for number, key in enumerate(keys)}
    lacking = [key for key in numbers if store.get(key) is None]
    if len(lacking) < len(numbers):
        tell(f"cache: {len(numbers) - len(lacking)} of {len(numbers)} {what} are there already")
    for path in store.damaged:
        tell(f"cache: {path} is damaged, and is made anew")
    store.damaged.clear()
    told = monotonic()
    for count, key in enumerate(_own_first(lacking), 1):
        if store.get(key) is None:
            store.put(key, made(numbers[key]))
        if monotonic() - told > _PATIENCE:
            told = monotonic()
            tell(f"{what}: {count} of {len(lacking)} are ready")


def _own_first(keys: Sequence[str]) -> list[str]:
    """All, beginning with this process's share."""
    together = distributed.is_available() and distributed.is_initialized()
    first = len(keys) * distributed.get_rank() // distributed.get_world_size() if together else 0
    return [*keys[first:], *keys[:first]]


def _size(tensors: Tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_DIGEST).digest()
