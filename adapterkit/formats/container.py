"""The safetensors container with limits: everything in its header is checked before a tensor is allocated.

The layout is an unsigned 64-bit little-endian length, that many bytes of JSON (tensor name -> dtype, shape and
offsets, and `__metadata__`: strings), and the tensors' bytes without gaps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from adapterkit.errors import CorruptFileError, UnsupportedFileError
from adapterkit.formats import strict_json
from adapterkit.formats.files import SIZE_LIMIT, open_plain, write_atomically
from adapterkit.formats.strict_json import StrictJSONError

HEADER_LIMIT = 16 << 20
TENSOR_LIMIT = 1 << 15
"""Checking a header with this many entries takes less than a second and about 45 MB."""
DIMENSION_LIMIT = 16
_LENGTH = 8

_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}

_PICKLE = (
    "a pickle, which can run code when it is opened; adapterkit never opens one. Convert it where you trust it: "
    "torch.load(..., weights_only=True), then safetensors.torch.save_file"
)
_FOREIGN = (
    (b"PK\x03\x04", f"a zip archive; torch.save makes these around {_PICKLE}"),
    *((b"\x80" + bytes([protocol]), _PICKLE) for protocol in range(2, 6)),
    (b"\x1f\x8b", "a gzip archive"),
    (b"\x89HDF", "an HDF5 file"),
    (b"GGUF", "a GGUF file"),
    (b"version ", "a Git LFS pointer; fetch the file itself with git lfs pull"),
)


@dataclass(frozen=True)
class Container:
    """A file's tensors by name, and the strings of its `__metadata__`."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]


def read(path: Path) -> Container:
    """The whole file, read once into memory, so that nothing that happens to it later matters.

    Raises:
        NotRegularFileError, UnsupportedFileError, CorruptFileError, CheckpointError: See `open_plain` and this module.
    """
    with open_plain(path) as (file, size):
        length, header = _read_header(path, file, size)
        metadata = _check_header(path, header, size - _LENGTH - len(header))
        data = b"".join((length, header, file.read()))
    try:
        return Container(safetensors.torch.load(data), metadata)
    except (SafetensorError, ValueError, TypeError, AssertionError, RuntimeError) as error:
        raise CorruptFileError(f"is damaged: {error}", path) from error


def read_metadata(path: Path) -> Mapping[str, str]:
    """`__metadata__` alone; the tensors' bytes are neither read nor checked."""
    with open_plain(path) as (file, size):
        _, header = _read_header(path, file, size)
    return _metadata(path, _parse(path, header))


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes the file atomically. With one entry of metadata equal arguments give equal bytes (more have no order).

    Raises:
        UnsupportedFileError: There is more than `read` would accept.
        NotRegularFileError, CheckpointError: See `write_atomically`.
    """
    data = safetensors.torch.save(dict(tensors), dict(metadata))
    header = int.from_bytes(data[:_LENGTH], "little")
    if header > HEADER_LIMIT or len(tensors) > TENSOR_LIMIT or len(data) > SIZE_LIMIT:
        message = f"{len(data):,} bytes, {header:,} of them header, and {len(tensors):,} tensors would not be read back"
        raise UnsupportedFileError(message, path)
    write_atomically(path, data)


def _read_header(path: Path, file: BinaryIO, size: int) -> tuple[bytes, bytes]:
    """The header's length as it stands in the file, and the header."""
    start = file.read(_LENGTH)
    length = int.from_bytes(start, "little")
    if len(start) < _LENGTH or length > size - _LENGTH:
        raise _foreign(path, start) or CorruptFileError(
            f"is cut short or no safetensors file: {size:,} bytes, of which {length:,} would be the header", path
        )
    if length > HEADER_LIMIT:
        raise UnsupportedFileError(f"has a header of {length:,} bytes; the limit is {HEADER_LIMIT:,}", path)
    header = file.read(length)
    if len(header) < length or not header.startswith(b"{"):
        raise _foreign(path, start) or CorruptFileError("is no safetensors file, or is damaged: no header", path)
    if header.count(b'"data_offsets"') > TENSOR_LIMIT:  # counted first: parsing takes far more memory than the text
        raise UnsupportedFileError(f"holds more than {TENSOR_LIMIT:,} tensors", path)
    return start, header


def _foreign(path: Path, start: bytes) -> UnsupportedFileError | None:
    """What a file that is no safetensors file is instead; ask no sooner, for a header's length may start alike."""
    name = next((name for magic, name in _FOREIGN if start.startswith(magic)), None)
    if start.lstrip()[:1] in (b"{", b"[") and 0 not in start:  # a length has zeros
        name = "a JSON file, which holds no tensors; give the .safetensors file that belongs to it"
    return UnsupportedFileError(f"is {name}", path) if name else None


def _check_header(path: Path, header: bytes, size: int) -> Mapping[str, str]:
    """Checks every entry against the size of the data, and returns the metadata."""
    entries = _parse(path, header)
    metadata = _metadata(path, entries)
    ranges = sorted(_check_entry(path, name, entry) for name, entry in entries.items() if name != "__metadata__")
    end = 0
    for start, stop, name in ranges:
        if start != end:
            raise CorruptFileError(f"is damaged: its bytes start at {start}, expected {end}", path, name)
        end = stop
    if end != size:
        raise CorruptFileError(f"is cut short or damaged: {size:,} bytes of tensors, expected {end:,}", path)
    return metadata


def _parse(path: Path, header: bytes) -> dict[str, Any]:
    try:
        return strict_json.loads(header)  # starts with a brace, so it is an object
    except StrictJSONError as error:
        raise CorruptFileError(f"is damaged: its header is {error}", path) from error


def _metadata(path: Path, entries: Mapping[str, Any]) -> Mapping[str, str]:
    metadata = entries.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CorruptFileError("is damaged: must map names to strings", path, "__metadata__")
    return metadata


def _check_entry(path: Path, name: str, entry: Any) -> tuple[int, int, str]:
    """Start and end of the tensor's bytes, and its name."""
    name = name if len(name) <= 200 else f"{name[:200]}..."
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CorruptFileError("is damaged: expected dtype, shape and data_offsets", path, name)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise UnsupportedFileError(f"has the dtype {str(dtype)[:40]!r}, which is unknown", path, name)
    if not _sizes(shape) or len(shape) > DIMENSION_LIMIT:
        raise CorruptFileError(f"is damaged: its shape is {str(shape)[:80]}", path, name)
    if not _sizes(offsets) or len(offsets) != 2:
        raise CorruptFileError(f"is damaged: its offsets are {str(offsets)[:80]}", path, name)
    size, expected = offsets[1] - offsets[0], math.prod(shape) * _BITS[dtype] // 8
    if size != expected:
        raise CorruptFileError(f"is damaged: {size} bytes, but {dtype} {shape} takes {expected}", path, name)
    return offsets[0], offsets[1], name


def _sizes(values: Any) -> bool:
    """Whether this is a list of non-negative integers that fit 63 bits."""
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 63 for value in values)
