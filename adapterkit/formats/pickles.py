"""Pickles of tensors, as `torch.save` writes them: opened by permission alone, and never more than tensors.

torch's `weights_only` builds nothing but tensors and plain values. What it does not look at is checked here: an archive
that grows when it is unpacked, and a tensor that says it is larger than its memory.
"""

from __future__ import annotations

import json
import warnings
import zipfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from adapterkit.errors import CorruptFileError, UnsupportedFileError
from adapterkit.formats.container import Entry, Header
from adapterkit.formats.files import open_plain

_ZIP, _PICKLE = b"PK\x03\x04", tuple(b"\x80" + bytes([protocol]) for protocol in range(2, 6))
_DEPTH = 8


def is_pickle(head: bytes) -> bool:
    """Whether a file that begins like this may be a pickle, as it is or in a zip archive."""
    measured = head[4:9] == b"\0\0\0\0{"  # a safetensors header, whose length may begin with the same two bytes
    return head.startswith((_ZIP, *_PICKLE)) and not measured


def read_header(path: Path) -> Header:
    """What tensors there are, by their names in nested dicts, joined by dots; other values are metadata, as JSON.

    Raises:
        UnsupportedFileError: There is more in it than tensors and plain values.
        CorruptFileError: It is damaged.
        CheckpointError: See `open_plain`.
    """
    tensors: dict[str, Entry] = {}
    metadata: dict[str, str] = {}
    for name, value in _values(path):
        if isinstance(value, Tensor):
            tensors[name] = Entry(value.dtype, tuple(value.shape))
        elif isinstance(value, str):
            metadata[name] = value
        elif value is None or isinstance(value, (bool, int, float)):
            metadata[name] = json.dumps(value)
        else:
            raise UnsupportedFileError(f"holds a {type(value).__name__}, and tensors are expected", path, name[:200])
    return Header(tensors, metadata, b"")


def read_tensors(path: Path, header: Header, names: Collection[str] | None = None) -> dict[str, Tensor]:
    """The tensors of these names, or all, each in memory of its own. Errors are those of `read_header`."""
    chosen = header.entries if names is None else names
    found = {name: value for name, value in _values(path) if name in chosen and isinstance(value, Tensor)}
    return {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in found.items()}


def _values(path: Path) -> Iterator[tuple[str, Any]]:
    with open_plain(path) as (file, size):
        _check_archive(path, file, size)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's own, about its old files
                whole = torch.load(file, map_location="cpu", weights_only=True)
        except MemoryError:
            raise
        except Exception as error:  # of a damaged file torch raises anything
            told = str(error).partition("\n")[0][:200]
            raise UnsupportedFileError(f"is no pickle of tensors alone, or is damaged: {told}", path) from error
    for name, value in _flat(path, "", whole, _DEPTH):
        if isinstance(value, Tensor):
            _check_tensor(path, name, value, size)
        yield name, value


def _check_archive(path: Path, file: BinaryIO, size: int) -> None:
    """What is packed must not unpack to more: `torch.save` stores, and never compresses."""
    if file.read(4) == _ZIP:
        try:
            with zipfile.ZipFile(file) as archive:
                whole = sum(entry.file_size for entry in archive.infolist())
        except (zipfile.BadZipFile, ValueError, OSError, EOFError, NotImplementedError) as error:
            raise CorruptFileError(f"is a damaged zip archive: {error}", path) from error
        if whole > size:
            raise UnsupportedFileError(f"unpacks to {whole:,} bytes, and has {size:,}", path)
    file.seek(0)


def _flat(path: Path, prefix: str, value: Any, depth: int) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, Mapping):
        yield prefix, value
        return
    if not depth:
        raise UnsupportedFileError(f"is nested deeper than {_DEPTH}", path, prefix[:200])
    for key, inner in value.items():
        yield from _flat(path, f"{prefix}.{key}" if prefix else str(key), inner, depth - 1)


def _check_tensor(path: Path, name: str, tensor: Tensor, size: int) -> None:
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise UnsupportedFileError("is no dense tensor", path, name[:200])
    if tensor.numel() * tensor.element_size() > size:
        raise CorruptFileError(f"says that its shape is {tuple(tensor.shape)}, more than the file", path, name[:200])
