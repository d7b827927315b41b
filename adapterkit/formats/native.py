"""The native format: one safetensors file that says what it is and proves that it is whole.

Tensors are keyed `<point id>/<parameter>`. `__metadata__` has one entry, `adapterkit`: JSON with the fields of a
`Checkpoint` and its one part. Its `tensors` is the index, point id -> parameter -> checksum of the bytes, so that a
tensor that is missing, strange or differs by one bit is named. What no checksum covers, the rest of the header, is
validated. Equal adapters give equal bytes.

Of a file with several adapters, file version 2, `adapters` maps names to such headers, and keys are
`<name>/<point id>/<parameter>`. File version 3 says all: `adapters` maps names, or "" for the one without, to what an
adapter's types have in common and to `parts`, one for each type with its `settings`; keys are
`<name>/<place>/<point id>/<parameter>`, without the first where there is no name. A file is of the lowest version that
can say it.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from adapterkit.checkpoint import Checkpoint, Format, Part, ReadOptions, ReadReport, WriteOptions
from adapterkit.errors import (
    CorruptFileError,
    DtypeMismatchError,
    MissingKeysError,
    NonFiniteError,
    UnexpectedKeysError,
    UnsupportedFileError,
    did_you_mean,
)
from adapterkit.formats import container, native_header
from adapterkit.formats.native_header import ENTRY, KEY_LIMIT, AdapterHeader, Header, Index
from adapterkit.formats.source import Source
from adapterkit.kernels.finite import all_finite, not_finite
from adapterkit.points import Points

_log = logging.getLogger(__name__)

_WEIGHTS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# For buffers, such as a batch norm's count. Whether one stands where a weight should is known to whoever installs it.
_OTHERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)


class NativeFormat(Format):
    """Keeps everything that a `Checkpoint` holds, bit for bit."""

    def recognises(self, source: Source) -> bool:
        """Whether there is an adapterkit header, of whatever version."""
        return ENTRY in source.metadata

    def diagnose(self, source: Source) -> None:
        """What is not a plain file, a pickle, a container cut short, or tensors of which nothing says what they are."""
        assert source.entries is not None
        if source.path is None and not source.metadata:
            told = "its tensors alone do not say which adapter they are of, and no other format knows their names"
            raise UnsupportedFileError(
                f"{told}; give a file, or Source.of(tensors, metadata) with the metadata of one", source.where
            )

    def read(self, source: Source, points: Points, options: ReadOptions) -> tuple[dict[str, Checkpoint], ReadReport]:
        """The adapters in the file, checked against its index; `points` serve for suggestions only.

        Raises:
            NotRegularFileError: Not a plain file.
            UnsupportedFileError: Of another format, of a later version, or beyond the limits.
            CorruptFileError: Truncated, malformed, or changed after it was written.
            InvalidHeaderError: A part of the header is missing, unknown or of the wrong type.
            MissingKeysError, UnexpectedKeysError: The tensors are not those of the index.
            DtypeMismatchError, NonFiniteError: A tensor cannot be an adapter's weight.
        """
        where = source.where
        header = native_header.parse(where, source.metadata)
        checksums = _checksums(where, header)
        _check_keys(where, source.entries, checksums, [*_points_of(header), *points.ids])
        for key, entry in source.entries.items():
            _check_dtype(where, key, entry.dtype)
        tensors = source.tensors()
        if not all_finite(tensors.values()):
            _check_finite(where, tensors)
        for key, checksum in checksums.items():
            if _checksum(tensors[key]) != checksum:
                message = "was changed or damaged after it was saved: its checksum does not match"
                raise CorruptFileError(message, where, key)
        found = {name: _checkpoint(where, one, tensors) for name, one in header.adapters.items()}
        fresh = source.path is not None
        report = ReadReport(
            [*checksums], tool="adapterkit", version=header.release, base=_base(found), finite=True, fresh=fresh
        )
        return found, report

    def write(self, checkpoints: Mapping[str, Checkpoint], target: Path, points: Points, options: WriteOptions) -> None:
        """Writes them atomically. NaN and infinity are written, so that no work is lost, but not read back.

        Raises:
            InvalidHeaderError: A part of the header is no JSON value, or a point's or parameter's name cannot be a key.
            DtypeMismatchError: A tensor's dtype would not be read back.
            NotRegularFileError: The path is a folder or a device.
            CheckpointError: The file cannot be written.
        """
        version = native_header.version_of(checkpoints)
        tensors: dict[str, Tensor] = {}
        index: dict[tuple[str, int], Index] = {}
        for name, checkpoint in checkpoints.items():
            for place, part in enumerate(checkpoint.parts):
                own = _writable(target, part, options)
                prefix = native_header.prefix_of(version, name, place)
                tensors |= {prefix + native_header.key_of(target, *key): tensor for key, tensor in own.items()}
                index[name, place] = _index(part, own)
        text = native_header.make(target, checkpoints, index)
        container.write(target, tensors, {ENTRY: text})


def _base(found: Mapping[str, Checkpoint]) -> str:
    """The models that the adapters were made for, as the header says."""
    families = dict.fromkeys(str(own.get("family")) for one in found.values() for own in one.base.values())
    return f"{', '.join(families)} (its header)" if families else ""


def _checksums(where: object, header: Header) -> dict[str, str]:
    """Key -> checksum of every tensor, in the order of the index: it has one, the container has none."""
    parts = [part for one in header.adapters.values() for part in one.parts]
    return {key: part.index[point][name] for part in parts for point, name, key in part.keys(where)}


def _points_of(header: Header) -> list[str]:
    return [point for one in header.adapters.values() for part in one.parts for point in part.index]


def _checkpoint(where: object, header: AdapterHeader, tensors: Mapping[str, Tensor]) -> Checkpoint:
    parts: list[Part] = []
    for part in header.parts:
        own: dict[str, dict[str, Tensor]] = {point: {} for point in part.index}
        for point, name, key in part.keys(where):
            own[point][name] = tensors[key]
        parts.append(Part(tensors=own, **part.values))
    return Checkpoint(parts, **header.common)


def _writable(target: Path, part: Part, options: WriteOptions) -> dict[tuple[str, str], Tensor]:
    """(Point, parameter) -> each tensor as it is written."""
    tensors: dict[tuple[str, str], Tensor] = {}
    for point, own in part.tensors.items():
        for name, tensor in own.items():
            key = native_header.key_of(target, point, name)
            try:
                tensors[point, name] = tensor = options.cast(tensor)
            except NonFiniteError as error:
                raise NonFiniteError(f"{error}; save it in a wider dtype", target, key) from None
            _check_dtype(target, key, tensor.dtype)
            if not_finite(tensor):
                _log.warning("%s: %r holds NaN or infinity: the file will be refused when it is loaded", target, key)
    return tensors


def _index(part: Part, tensors: Mapping[tuple[str, str], Tensor]) -> Index:
    return {
        point: {name: _checksum(tensors[point, name]) for name in sorted(own)}
        for point, own in sorted(part.tensors.items())
    }


def _check_keys(where: object, tensors: Iterable[str], index: Iterable[str], points: Iterable[str]) -> None:
    present, expected = set(tensors), set(index)
    if extra := sorted(present - expected):
        missing = sorted(expected - present)
        wrong = extra[0][:KEY_LIMIT]
        hint = did_you_mean(wrong, missing or expected) or did_you_mean(wrong.partition("/")[0], points)
        message = f"is not in the file's index, which has {len(expected):,} tensors; {len(extra):,} such keys.{hint}"
        raise UnexpectedKeysError(message, where, extra[0][:200])
    if missing := sorted(expected - present):
        message = f"is missing, and {len(missing) - 1:,} more of the {len(expected):,} tensors of the file's index"
        raise MissingKeysError(message, where, missing[0])


def _check_dtype(where: object, key: str, dtype: torch.dtype) -> None:
    if dtype not in _WEIGHTS + _OTHERS:
        names = ", ".join(str(known).removeprefix("torch.") for known in _WEIGHTS)
        raise DtypeMismatchError(f"{dtype} cannot hold an adapter's weights; expected {names}", where, key)


def _check_finite(where: object, tensors: Mapping[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        if bad := not_finite(tensor):
            message = f"holds {bad:,} NaN or infinite values of {tensor.numel():,}"
            raise NonFiniteError(f"{message}: the training diverged, or the file is damaged", where, key)


def _checksum(tensor: Tensor) -> str:
    """The first 128 bits of the bytes' SHA-256, in hex. Dtype and shape are for the model and the config to check."""
    if tensor.requires_grad or not tensor.is_cpu or not tensor.is_contiguous():
        tensor = tensor.detach().cpu().contiguous()
    return hashlib.sha256(container.memory(tensor)).hexdigest()[:32]
