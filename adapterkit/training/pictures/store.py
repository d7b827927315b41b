"""Where what was computed of pictures and captions is kept: in memory, or in a folder that outlives the run."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from adapterkit.errors import DataError

Tensors = Mapping[str, Tensor]
_ENDING = ".entry"
_DIGEST = 16
_KEY = 16


def key_of(*parts: object) -> str:
    """The name of what follows from these parts alone."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=_KEY).hexdigest()


class Store(Protocol):
    """Tensors by `key_of` what they follow from."""

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
        self._entries: dict[str, Tensors] = {}

    def get(self, key: str) -> Tensors | None:
        """See `Store`."""
        found = self._entries.pop(key, None)
        if found is not None:
            self._entries[key] = found  # now the last
        return found

    def put(self, key: str, tensors: Tensors) -> None:
        """See `Store`."""
        self._entries[key] = tensors
        if self.most is not None and len(self._entries) > self.most:
            del self._entries[next(iter(self._entries))]


def _to_nobody(line: str) -> None: ...


class FolderStore:
    """A file for each entry, written whole or not at all, with a sum that tells damage.

    Runs may share a folder, also at once. What is in it may be deleted at any time.

    Args:
        folder: Is made when something is kept.
        tell: Is told what was damaged.
    """

    def __init__(self, folder: Path, tell: Callable[[str], object] = _to_nobody) -> None:
        self.folder, self.tell = folder, tell

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
        self.tell(f"cache: {path} is damaged, and is made anew")
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


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_DIGEST).digest()
