"""The native format: one safetensors file that says what it is and proves that it is whole.

Tensors are keyed `<point id>/<parameter>`. `__metadata__` has one entry, `adapterkit`: JSON with the
parts of `_SCHEMA`; of a file with several adapters, file version 2, `adapters` maps names to such parts, and keys are
`<name>/<point id>/<parameter>`. Its `tensors` is the index, point id -> parameter -> checksum of the bytes, so that a
tensor that is missing, strange or differs by one bit is named. What no checksum covers, the rest of the header, is
validated.
Equal adapters give equal bytes.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import adapterkit
from adapterkit.checkpoint import Checkpoint, Format
from adapterkit.errors import (
    AdapterKitError,
    CorruptFileError,
    DtypeMismatchError,
    InvalidHeaderError,
    MissingKeysError,
    NonFiniteError,
    UnexpectedKeysError,
    UnsupportedFileError,
    did_you_mean,
)
from adapterkit.formats import container, strict_json
from adapterkit.formats.strict_json import StrictJSONError
from adapterkit.points import Points

_log = logging.getLogger(__name__)

FILE_VERSION, BUNDLE_VERSION = 1, 2
KEY_LIMIT = 1000
CONFIG_LIMIT = 1 << 16
_ENTRY = "adapterkit"
_WEIGHTS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# For buffers, such as a batch norm's count. Whether one stands where a weight should is known to whoever installs it.
_OTHERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
_SCHEMA: dict[str, type] = {
    "adapterkit": str,
    "backends": dict,
    "base": dict,
    "config": dict,
    "distribution": str,
    "file_version": int,
    "metadata": dict,
    "tensors": dict,
    "type": str,
    "version": str,
}


class NativeFormat(Format):
    """Keeps everything that a `Checkpoint` holds, bit for bit."""

    def recognises(self, path: Path) -> bool:
        """Whether the file is a safetensors file with an adapterkit header, of whatever version."""
        try:
            return _ENTRY in container.read_metadata(path)
        except (AdapterKitError, MemoryError):  # `read` says what is wrong
            return False

    def diagnose(self, path: Path) -> None:
        """See `Format.diagnose`: what is not a plain file, a pickle, or a container cut short."""
        container.read_metadata(path)

    def read(self, path: Path, points: Points) -> Checkpoint:
        """The adapter in the file, checked against itself; `points` serve for suggestions only.

        Raises:
            NotRegularFileError: Not a plain file.
            UnsupportedFileError: Of another format, of a later version, or beyond the limits.
            CorruptFileError: Truncated, malformed, or changed after it was written.
            InvalidHeaderError: A part of the header is missing, unknown or of the wrong type.
            MissingKeysError, UnexpectedKeysError: The tensors are not those of the index.
            DtypeMismatchError, NonFiniteError: A tensor cannot be an adapter's weight.
        """
        contents = container.read(path)
        return _checked(path, _parse_header(path, contents.metadata), contents.tensors, points)

    def read_many(self, path: Path, points: Points) -> dict[str, Checkpoint]:
        """See `Format.read_many`; errors as for `read`."""
        contents = container.read(path)
        header = _header(path, contents.metadata)
        if header.get("file_version") != BUNDLE_VERSION:
            return {"": self.read(path, points)}
        found: dict[str, Checkpoint] = {}
        own: dict[str, dict[str, Tensor]] = {name: {} for name in _bundled(path, header)}
        for key, tensor in contents.tensors.items():
            name, _, inner = key.partition("/")
            if name not in own:
                raise UnexpectedKeysError("belongs to none of the file's adapters", path, key[:200])
            own[name][inner] = tensor
        for name, part in header["adapters"].items():
            _check_schema(path, part)
            found[name] = _checked(path, part, own[name], points)
        return found

    def write(self, checkpoint: Checkpoint, path: Path, points: Points) -> None:
        """Writes the adapter atomically. NaN and infinity are written, so that no work is lost, but not read back.

        Raises:
            InvalidHeaderError: A part of the header is no JSON value, or a point's or parameter's name cannot be a key.
            DtypeMismatchError: A tensor's dtype would not be read back.
            NotRegularFileError: The path is a folder or a device.
            CheckpointError: The file cannot be written.
        """
        tensors = _writable(path, checkpoint)
        text = _dumped(path, _make_header(checkpoint))
        _parse_header(path, {_ENTRY: text})
        container.write(path, tensors, {_ENTRY: text})

    def write_many(self, checkpoints: Mapping[str, Checkpoint], path: Path, points: Points) -> None:
        """See `Format.write_many`; errors as for `write`."""
        tensors = {f"{name}/{key}": t for name, one in checkpoints.items() for key, t in _writable(path, one).items()}
        parts = {name: _make_header(one) for name, one in checkpoints.items()}
        for part in parts.values():
            _check_schema(path, json.loads(_dumped(path, part)))
        whole = {"adapterkit": adapterkit.__version__, "adapters": parts, "file_version": BUNDLE_VERSION}
        container.write(path, tensors, {_ENTRY: _dumped(path, whole)})


def _checked(path: Path, header: Mapping[str, Any], tensors: Mapping[str, Tensor], points: Points) -> Checkpoint:
    """One adapter's tensors, checked against the index in its header."""
    index = {_key(path, i, name): digest for i, own in header["tensors"].items() for name, digest in own.items()}
    _check_keys(path, tensors, index, [*header["tensors"], *points.ids])
    found: dict[str, dict[str, Tensor]] = {point: {} for point in header["tensors"]}
    for key, checksum in index.items():  # the index has an order, the container has none
        _check_tensor(path, key, tensors[key], checksum)
        point, _, name = key.partition("/")
        found[point][name] = tensors[key]
    kept = ("type", "config", "distribution", "version", "base", "backends", "metadata")
    return Checkpoint(tensors=found, **{name: header[name] for name in kept})


def _writable(path: Path, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Key -> a copy of every tensor."""
    tensors = {_key(path, i, name): t for i, own in checkpoint.tensors.items() for name, t in own.items()}
    for key, tensor in tensors.items():
        _check_dtype(path, key, tensor)
        if not torch.isfinite(tensor).all():
            _log.warning("%s: %r holds NaN or infinity: the file will be refused when it is loaded", path, key)
    return {key: t.detach().cpu().clone(memory_format=torch.contiguous_format) for key, t in tensors.items()}


def _dumped(path: Path, header: Mapping[str, Any]) -> str:
    try:
        return strict_json.dumps(header)
    except StrictJSONError as error:
        raise InvalidHeaderError(f"cannot be saved: {error}", path, _ENTRY) from error


def _bundled(path: Path, header: Mapping[str, Any]) -> Mapping[str, Any]:
    """Name -> header of every adapter in a file of several."""
    if set(header) != {"adapterkit", "adapters", "file_version"} or not isinstance(header["adapters"], dict):
        raise InvalidHeaderError("must have adapterkit, adapters and file_version", path, _ENTRY)
    for name, part in header["adapters"].items():
        if not isinstance(part, dict) or "/" in name:
            raise InvalidHeaderError(f"must be an object, not {str(part)[:80]!r}", path, f"adapters.{name[:200]}")
    return header["adapters"]


def _make_header(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "adapterkit": adapterkit.__version__,
        "backends": dict(checkpoint.backends),
        "base": {component: dict(fingerprint) for component, fingerprint in checkpoint.base.items()},
        "config": dict(checkpoint.config),
        "distribution": checkpoint.distribution,
        "file_version": FILE_VERSION,
        "metadata": dict(checkpoint.metadata),
        "tensors": {
            i: {n: _checksum(t) for n, t in sorted(own.items())} for i, own in sorted(checkpoint.tensors.items())
        },
        "type": checkpoint.type,
        "version": checkpoint.version,
    }


def _parse_header(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """The header of a file with one adapter, each of its parts of the right type."""
    header = _header(path, metadata)
    if header.get("file_version") == BUNDLE_VERSION and "adapters" in header:
        names = ", ".join(_bundled(path, header))
        raise UnsupportedFileError(f"holds several adapters ({names[:200]}); Adapters.load_all() reads them", path)
    _check_version(path, header)
    _check_schema(path, header)
    return header


def _header(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    if _ENTRY not in metadata:
        hint = "expected the entry 'adapterkit' in its metadata; name another format with format="
        raise UnsupportedFileError(f"is a safetensors file, but not of adapterkit's native format: {hint}", path)
    try:
        header = strict_json.loads(metadata[_ENTRY])
    except StrictJSONError as error:
        raise InvalidHeaderError(f"is {error}", path, _ENTRY) from error
    if not isinstance(header, dict):
        raise InvalidHeaderError(f"must be an object, not {str(header)[:80]!r}", path, _ENTRY)
    return header


def _check_version(path: Path, header: Mapping[str, Any]) -> None:
    version = header.get("file_version")
    if type(version) is not int or version < 1:
        raise InvalidHeaderError(f"must be a whole number from 1, not {version!r}", path, "file_version")
    if version != FILE_VERSION:
        writer = str(header.get("adapterkit", "an unknown release"))[:40]
        message = f"is of file version {version}, written by adapterkit {writer}"
        hint = f"this release, {adapterkit.__version__}, reads version {FILE_VERSION}: pip install -U adapterkit"
        raise UnsupportedFileError(f"{message}; {hint}", path)


def _check_schema(path: Path, header: Mapping[str, Any]) -> None:
    if missing := sorted(set(_SCHEMA) - set(header)):
        raise InvalidHeaderError("is missing from the header", path, missing[0])
    if unknown := sorted(set(header) - set(_SCHEMA)):
        raise InvalidHeaderError(f"is unknown.{did_you_mean(unknown[0], _SCHEMA)}", path, unknown[0][:200])
    for name, expected in _SCHEMA.items():
        if type(header[name]) is not expected:
            raise InvalidHeaderError(f"must be {expected.__name__}, not {str(header[name])[:80]!r}", path, name)
    if not header["type"]:
        raise InvalidHeaderError("must be the name of an adapter type, not ''", path, "type")
    if len(strict_json.dumps(header["config"])) > CONFIG_LIMIT:
        raise InvalidHeaderError(f"is longer than {CONFIG_LIMIT:,} bytes", path, "config")
    for name, expected in (("metadata", str), ("backends", str), ("base", dict), ("tensors", dict)):
        _check_values(path, name, header[name], expected)
    for point, own in header["tensors"].items():
        _check_values(path, f"tensors.{point[:200]}", own, str)


def _check_values(path: Path, name: str, values: Mapping[str, Any], expected: type) -> None:
    for key, value in values.items():
        if type(value) is not expected:
            message = f"must be {expected.__name__}, not {str(value)[:80]!r}"
            raise InvalidHeaderError(message, path, f"{name}.{key[:200]}")


def _check_keys(path: Path, tensors: Iterable[str], index: Iterable[str], points: Iterable[str]) -> None:
    present, expected = set(tensors), set(index)
    if extra := sorted(present - expected):
        missing = sorted(expected - present)
        wrong = extra[0][:KEY_LIMIT]
        hint = did_you_mean(wrong, missing or expected) or did_you_mean(wrong.partition("/")[0], points)
        message = f"is not in the file's index, which has {len(expected):,} tensors; {len(extra):,} such keys.{hint}"
        raise UnexpectedKeysError(message, path, extra[0][:200])
    if missing := sorted(expected - present):
        message = f"is missing, and {len(missing) - 1:,} more of the {len(expected):,} tensors of the file's index"
        raise MissingKeysError(message, path, missing[0])


def _key(path: Path, point: str, parameter: str) -> str:
    key = f"{point}/{parameter}"
    if not point or not parameter or "/" in point or len(key) > KEY_LIMIT or not key.isprintable():
        message = "cannot be a key: expected <point id>/<parameter> in printable characters"
        raise InvalidHeaderError(message, path, key[:200])
    return key


def _check_dtype(path: Path, key: str, tensor: Tensor) -> None:
    if tensor.dtype not in _WEIGHTS + _OTHERS:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in _WEIGHTS)
        raise DtypeMismatchError(f"{tensor.dtype} cannot hold an adapter's weights; expected {names}", path, key)


def _check_tensor(path: Path, key: str, tensor: Tensor, checksum: str) -> None:
    _check_dtype(path, key, tensor)
    if bad := tensor.numel() - int(torch.isfinite(tensor).sum()):
        message = f"holds {bad:,} NaN or infinite values of {tensor.numel():,}"
        raise NonFiniteError(f"{message}: the training diverged, or the file is damaged", path, key)
    if _checksum(tensor) != checksum:
        raise CorruptFileError("was changed or damaged after it was saved: its checksum does not match", path, key)


def _checksum(tensor: Tensor) -> str:
    """The first 128 bits of the bytes' SHA-256, in hex. Dtype and shape are for the model and the config to check."""
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(raw.numpy().data).hexdigest()[:32]
