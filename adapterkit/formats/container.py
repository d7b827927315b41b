"""The safetensors container with limits: everything in its header is checked before a tensor is allocated.

The layout is an unsigned 64-bit little-endian length, that many bytes of JSON (tensor name -> dtype, shape and
offsets, and `__metadata__`: strings), and the tensors' bytes without gaps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from adapterkit.errors import CorruptFileError, UnsupportedFileError
from adapterkit.formats import strict_json
from adapterkit.formats.files import SIZE_LIMIT, open_plain, write_atomically
from adapterkit.formats.strict_json import StrictJSONError

HEADER_LIMIT = 16 << 20
TENSOR_LIMIT = 1 << 14
"""Bytes of a header and tensors that need hold nothing: checking so many takes half a second and about 25 MB.
What holds more may have more of both, in proportion to the bytes of its tensors."""
_HEADER_MOST = 100_000_000  # the safetensors library reads no longer ones
DIMENSION_LIMIT = 16
_LENGTH = 8

_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
_TORCH = "bool uint8 int8 float8_e5m2 float8_e4m3fn float8_e8m0fnu uint16 int16 float16 bfloat16 uint32 int32 float32"
_DTYPES: dict[str, Any] = {
    name: getattr(torch, own, None)
    for name, own in zip(_BITS, f"{_TORCH} uint64 int64 float64 complex64".split(), strict=True)
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items() if dtype is not None}

_PICKLE = (
    "a pickle, which can run code when it is opened. With allow_pickle=True (--allow-pickle) a pickle of tensors is "
    "read, by torch's weights_only; or convert it: torch.load(..., weights_only=True), then safetensors.torch.save_file"
)
_FOREIGN = (
    (b"PK\x03\x04", f"a zip archive; torch.save makes these around {_PICKLE}"),
    *((b"\x80" + bytes([protocol]), _PICKLE) for protocol in range(2, 6)),
    (b"\x1f\x8b", "a gzip archive"),
    (b"\x89HDF", "an HDF5 file"),
    (b"GGUF", "a GGUF file"),
    (b"version ", "a Git LFS pointer; fetch the file itself with git lfs pull"),
)


class Entry(NamedTuple):
    """What the header says of one tensor: its dtype, its shape, and where its bytes lie in the data."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int = 0
    stop: int = 0


_NUMPY = frozenset({torch.float32, torch.float64, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool})
"""The usual dtypes that numpy has too."""


@dataclass(frozen=True)
class Header:
    """A file's tensors by name, in the order of their bytes, the strings of its `__metadata__`, and its own bytes."""

    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    text: bytes


def read_header(path: Path, limit: int = SIZE_LIMIT) -> Header:
    """The header, every entry checked against the size of the file.

    Args:
        path: The file.
        limit: Bytes; a larger file is refused.

    Raises:
        NotRegularFileError, UnsupportedFileError, CorruptFileError, CheckpointError: See `open_plain` and this module.
    """
    with open_plain(path, limit) as (file, size):
        text = _read_text(path, file, size)
    entries = _parse(path, text)
    metadata = _metadata(path, entries.pop("__metadata__", {}))
    return Header(_checked_entries(path, entries, size - len(text)), metadata, text)


def read_tensors(
    path: Path, header: Header, names: Collection[str] | None = None, limit: int = SIZE_LIMIT
) -> dict[str, Tensor]:
    """The tensors of these names, or all, each in memory of its own, so that nothing that happens to the file matters.

    Raises:
        CorruptFileError: The file is another by now than that whose header was read.
        NotRegularFileError, UnsupportedFileError, CheckpointError: See `open_plain`.
    """
    found: dict[str, Tensor] = {}
    place = 0  # they follow one another, and a seek would drop what is buffered
    with open_plain(path, limit) as (file, _):
        if file.read(len(header.text)) != header.text:
            raise CorruptFileError("was replaced while it was read; read it again", path)
        for name, entry in header.entries.items():
            if names is None or name in names:
                if entry.start != place:
                    file.seek(len(header.text) + entry.start)
                found[name] = _read_tensor(path, file, name, entry)
                place = entry.stop
    return found


def _read_tensor(path: Path, file: BinaryIO, name: str, entry: Entry) -> Tensor:
    tensor = torch.empty(entry.shape, dtype=entry.dtype)
    size = entry.stop - entry.start
    if size and file.readinto(memory(tensor)) != size:  # type: ignore[attr-defined]
        raise CorruptFileError("was cut short while it was read", path, name)
    return tensor


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes the file atomically; see `pieces`.

    Raises:
        UnsupportedFileError: See `pieces`.
        NotRegularFileError, CheckpointError: See `write_atomically`.
    """
    write_atomically(path, *pieces(path, tensors, metadata))


def pieces(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> list[bytes | memoryview]:
    """The bytes of a file, one piece after another; the tensors are not copied. `path` is named in errors.

    Equal arguments give equal bytes: those of the safetensors library, whose order of metadata is by chance.

    Raises:
        UnsupportedFileError: There is more than would be read back, or a dtype that the layout does not know.
    """
    own = body(path, tensors)
    return [own.header(metadata), *own.pieces]


@dataclass(frozen=True)
class Body:
    """What follows a file's header, for those who put something in the header that they compute from it.

    Attributes:
        path: Named in errors.
        tensors: In the order of the file.
        pieces: Their bytes, one after another; not copied.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    pieces: Sequence[memoryview]

    def header(self, metadata: Mapping[str, str]) -> bytes:
        """The header with its length in front; errors as for `pieces`."""
        text, size = _header_text(self.path, self.tensors, metadata)
        length, count = len(text) - _LENGTH, len(self.tensors)
        if length > _header_limit(size) or count > _tensor_limit(size) or len(text) + size > SIZE_LIMIT:
            message = f"{size:,} bytes in {count:,} tensors, and {length:,} of header, would not be read back"
            raise UnsupportedFileError(message, self.path)
        return text


def body(path: Path, tensors: Mapping[str, Tensor]) -> Body:
    """The tensors of a file as it has them; arguments and errors as for `pieces`."""
    dense = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    if strange := [name for name, tensor in dense.items() if tensor.dtype not in _NAMES]:
        raise UnsupportedFileError(f"{dense[strange[0]].dtype} cannot be written", path, strange[0])
    if deep := [name for name, tensor in dense.items() if tensor.ndim > DIMENSION_LIMIT]:
        message = f"{dense[deep[0]].ndim} dimensions would not be read back; the limit is {DIMENSION_LIMIT}"
        raise UnsupportedFileError(message, path, deep[0])
    order = sorted(dense, key=lambda name: (-_BITS[_NAMES[dense[name].dtype]], name))
    return Body(path, {name: dense[name] for name in order}, [memoryview(_bytes(dense[name])) for name in order])


def _header_text(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[bytes, int]:
    """The header with its length in front, and the number of bytes that follow."""
    entries: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": [*tensor.shape], "data_offsets": [start, end]}
    try:
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise UnsupportedFileError(f"a name or the metadata cannot be written: {error}", path) from error
    text += b" " * (-len(text) % _LENGTH)
    return len(text).to_bytes(_LENGTH, "little") + text, end


def _bytes(tensor: Tensor) -> Any:
    """A tensor's memory, as an array of bytes."""
    return tensor.reshape(-1).view(torch.uint8).numpy()


def memory(tensor: Tensor) -> Any:
    """The memory of a dense tensor on the CPU, as an array, which has its bytes."""
    # One call where numpy knows the dtype: files hold hundreds of small tensors.
    return tensor.numpy() if tensor.dtype in _NUMPY and tensor.ndim else _bytes(tensor)


def _header_limit(data: int) -> int:
    """Bytes that the header may have in front of so many bytes of tensors: what is checked grows with what is held."""
    return min(HEADER_LIMIT + 4 * data, _HEADER_MOST)


def _tensor_limit(data: int) -> int:
    """Tensors that so many bytes may hold."""
    return TENSOR_LIMIT + data // 16


def _read_text(path: Path, file: BinaryIO, size: int) -> bytes:
    """The header with its length in front, as they stand in the file."""
    start = file.read(_LENGTH)
    length = int.from_bytes(start, "little")
    data = size - _LENGTH - length
    if len(start) < _LENGTH or data < 0:
        raise _foreign(path, start) or CorruptFileError(
            f"is cut short or no safetensors file: {size:,} bytes, of which {length:,} would be the header", path
        )
    if length > _header_limit(data):
        message = (
            f"has a header of {length:,} bytes; the limit is {_header_limit(data):,} for {data:,} bytes of tensors"
        )
        raise UnsupportedFileError(message, path)
    header = file.read(length)
    if len(header) < length or not header.startswith(b"{"):
        raise _foreign(path, start) or CorruptFileError("is no safetensors file, or is damaged: no header", path)
    if header.count(b'"data_offsets"') > _tensor_limit(data):  # counted first: parsing takes far more memory
        raise UnsupportedFileError(f"holds more than {_tensor_limit(data):,} tensors in {data:,} bytes", path)
    return start + header


def _foreign(path: Path, start: bytes) -> UnsupportedFileError | None:
    """What a file that is no safetensors file is instead; ask no sooner, for a header's length may start alike."""
    name = next((name for magic, name in _FOREIGN if start.startswith(magic)), None)
    if start.lstrip()[:1] in (b"{", b"[") and 0 not in start:  # a length has zeros
        name = "a JSON file, which holds no tensors; give the .safetensors file that belongs to it"
    if start.lstrip()[:1] == b"<" and 0 not in start:
        name = "a page of HTML or XML; download the file itself"
    return UnsupportedFileError(f"is {name}", path) if name else None


def _checked_entries(path: Path, entries: Mapping[str, Any], size: int) -> dict[str, Entry]:
    """What the header says of each tensor, in the order of their bytes, which must fill the data without gaps."""
    found = {name: _entry(path, name, entry) for name, entry in entries.items()}
    ordered = sorted(found.items(), key=lambda item: (item[1].start, item[1].stop, item[0]))
    end = 0
    for name, entry in ordered:
        if entry.start != end:
            raise CorruptFileError(f"is damaged: its bytes start at {entry.start}, expected {end}", path, name[:200])
        end = entry.stop
    if end != size:
        raise CorruptFileError(f"is cut short or damaged: {size:,} bytes of tensors, expected {end:,}", path)
    return dict(ordered)


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    try:
        return strict_json.loads(text[_LENGTH:])  # starts with a brace, so it is an object
    except StrictJSONError as error:
        raise CorruptFileError(f"is damaged: its header is {error}", path) from error


def _metadata(path: Path, metadata: object) -> Mapping[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CorruptFileError("is damaged: must map names to strings", path, "__metadata__")
    return metadata


_FACTS = {"dtype", "shape", "data_offsets"}


def _entry(path: Path, name: str, entry: Any) -> Entry:
    if len(name) > 200:
        name = f"{name[:200]}..."
    if not isinstance(entry, dict) or entry.keys() != _FACTS:
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
    if _DTYPES.get(dtype) is None:
        raise UnsupportedFileError(f"has the dtype {dtype}, which this torch does not have", path, name)
    return Entry(_DTYPES[dtype], tuple(shape), *offsets)


def _sizes(values: Any) -> bool:
    """Whether this is a list of non-negative integers that fit 63 bits."""
    # Asked twice for each tensor of a file, whose shape has few numbers: the list takes half the time of a generator.
    return isinstance(values, list) and all([type(value) is int and 0 <= value < 1 << 63 for value in values])  # noqa: C419
