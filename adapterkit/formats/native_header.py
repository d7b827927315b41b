"""The header of the native format: what each file version holds, checked, in one form for all of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import adapterkit
from adapterkit.checkpoint import Checkpoint, Part
from adapterkit.errors import InvalidHeaderError, UnsupportedFileError, did_you_mean
from adapterkit.formats import strict_json
from adapterkit.formats.strict_json import StrictJSONError

ENTRY = "adapterkit"
ONE, BUNDLE, FULL = 1, 2, 3
"""File versions: one adapter of one type; several of one type each; all that a checkpoint can say."""
KEY_LIMIT = 1000
CONFIG_LIMIT = 1 << 16
PART_LIMIT = 64

_COMMON: dict[str, type] = {"backends": dict, "base": dict, "metadata": dict}
_PART: dict[str, type] = {"config": dict, "distribution": str, "tensors": dict, "type": str, "version": str}
_WHOLE: dict[str, type] = {"adapterkit": str, "file_version": int}

Index = Mapping[str, Mapping[str, str]]


@dataclass(frozen=True)
class PartHeader:
    """One type of an adapter.

    Attributes:
        prefix: What its keys begin with.
        values: The fields of a `Part` other than its tensors.
        index: Point id -> parameter -> checksum.
    """

    prefix: str
    values: Mapping[str, Any]
    index: Index

    def keys(self, where: object) -> Iterator[tuple[str, str, str]]:
        """Point, parameter and the key of each tensor.

        Raises:
            InvalidHeaderError: One cannot be a key.
        """
        for point, own in self.index.items():
            for name in own:
                yield point, name, self.prefix + key_of(where, point, name)


@dataclass(frozen=True)
class AdapterHeader:
    """One adapter: the fields of a `Checkpoint`, with headers as parts."""

    common: Mapping[str, Any]
    parts: Sequence[PartHeader]


@dataclass(frozen=True)
class Header:
    """A file: which release wrote it, and its adapters by name."""

    release: str
    adapters: Mapping[str, AdapterHeader]


def key_of(where: object, point: str, parameter: str) -> str:
    """`<point id>/<parameter>`.

    Raises:
        InvalidHeaderError: It cannot be read back, or is not to be shown.
    """
    key = f"{point}/{parameter}"
    if not point or not parameter or "/" in point or len(key) > KEY_LIMIT or not key.isprintable():
        message = "cannot be a key: expected <point id>/<parameter> in printable characters"
        raise InvalidHeaderError(message, where, key[:200])
    return key


def parse(where: object, metadata: Mapping[str, str]) -> Header:
    """The header in a file's metadata, every part of it of the right type.

    Raises:
        UnsupportedFileError: There is none, or it is of a later version.
        InvalidHeaderError: A part of it is missing, unknown or of the wrong type.
    """
    header = _object(where, metadata)
    version = _version(where, header)
    if version == ONE:
        _check_schema(where, header, _COMMON | _PART | _WHOLE)
        return Header(header["adapterkit"], {"": _of_one_type(where, header, "")})
    _check_schema(where, header, _WHOLE | {"adapters": dict})
    adapters: dict[str, AdapterHeader] = {}
    for name, one in header["adapters"].items():
        prefix = f"{name}/" if name else ""
        if not isinstance(one, dict) or "/" in name or (not name and len(header["adapters"]) > 1):
            message = f"must be an object under a name without '/', not {str(one)[:80]!r}"
            raise InvalidHeaderError(message, where, f"adapters.{name[:200]}")
        if version == BUNDLE:
            _check_schema(where, one, _COMMON | _PART | _WHOLE)
        adapters[name] = (_of_one_type if version == BUNDLE else _of_types)(where, one, prefix)
    return Header(header["adapterkit"], adapters)


def make(where: object, checkpoints: Mapping[str, Checkpoint], index: Mapping[tuple[str, int], Index]) -> str:
    """The text of a header; what could not be read back is an error.

    Args:
        where: Named in errors.
        checkpoints: The adapters by name.
        index: (adapter, place of the part) -> the part's index.

    Raises:
        InvalidHeaderError: Something in it is no JSON value, or not what it should be.
    """
    whole: dict[str, Any] = {"adapterkit": adapterkit.__version__, "file_version": version_of(checkpoints)}
    if whole["file_version"] == FULL:
        whole["adapters"] = {
            name: _common(one) | {"parts": [_part(part, index[name, place]) for place, part in enumerate(one.parts)]}
            for name, one in checkpoints.items()
        }
    else:
        plain = {
            name: dict(
                sorted({**whole, **_common(one), **_part(one.part, index[name, 0]), "file_version": ONE}.items())
            )
            for name, one in checkpoints.items()
        }
        for one in plain.values():
            del one["settings"]  # there are none
        whole = plain[""] if whole["file_version"] == ONE else whole | {"adapters": plain}
    try:
        text = strict_json.dumps(dict(sorted(whole.items())))
    except StrictJSONError as error:
        raise InvalidHeaderError(f"cannot be saved: {error}", where, ENTRY) from error
    parse(where, {ENTRY: text})
    return text


def version_of(checkpoints: Mapping[str, Checkpoint]) -> int:
    """The lowest file version that can say it."""
    if any(len(one.parts) != 1 or one.settings for one in checkpoints.values()):
        return FULL
    return ONE if list(checkpoints) == [""] else BUNDLE


def prefix_of(version: int, name: str, place: int) -> str:
    """What the keys of an adapter's part begin with."""
    return (f"{name}/" if name else "") + (f"{place}/" if version == FULL else "")


def _common(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "backends": dict(checkpoint.backends),
        "base": {component: dict(fingerprint) for component, fingerprint in checkpoint.base.items()},
        "metadata": dict(checkpoint.metadata),
    }


def _part(part: Part, index: Index) -> dict[str, Any]:
    return {
        "config": dict(part.config),
        "distribution": part.distribution,
        "settings": {point: dict(own) for point, own in part.settings.items()},
        "tensors": index,
        "type": part.type,
        "version": part.version,
    }


def _of_one_type(where: object, header: Mapping[str, Any], prefix: str) -> AdapterHeader:
    return AdapterHeader(_checked_common(where, header), [_checked_part(where, {**header, "settings": {}}, prefix)])


def _of_types(where: object, header: Mapping[str, Any], prefix: str) -> AdapterHeader:
    _check_schema(where, header, _COMMON | {"parts": list})
    if not 1 <= (count := len(header["parts"])) <= PART_LIMIT:
        raise InvalidHeaderError(f"must have 1 to {PART_LIMIT} of them, not {count:,}", where, "parts")
    parts: list[PartHeader] = []
    for place, part in enumerate(header["parts"]):
        if not isinstance(part, dict):
            raise InvalidHeaderError(f"must be an object, not {str(part)[:80]!r}", where, f"parts.{place}")
        _check_schema(where, part, _PART | {"settings": dict})
        parts.append(_checked_part(where, part, f"{prefix}{place}/"))
    return AdapterHeader(_checked_common(where, header), parts)


def _checked_common(where: object, header: Mapping[str, Any]) -> dict[str, Any]:
    for name, expected in (("metadata", str), ("backends", str), ("base", dict)):
        _check_values(where, name, header[name], expected)
    return {name: header[name] for name in _COMMON}


def _checked_part(where: object, header: Mapping[str, Any], prefix: str) -> PartHeader:
    if not header["type"]:
        raise InvalidHeaderError("must be the name of an adapter type, not ''", where, "type")
    if len(strict_json.dumps(header["config"])) > CONFIG_LIMIT:
        raise InvalidHeaderError(f"is longer than {CONFIG_LIMIT:,} bytes", where, "config")
    _check_values(where, "tensors", header["tensors"], dict)
    _check_settings(where, header["settings"], header["tensors"])
    for point, own in header["tensors"].items():
        _check_values(where, f"tensors.{point[:200]}", own, str)
    values = {name: header[name] for name in ("config", "distribution", "settings", "type", "version")}
    return PartHeader(prefix, values, header["tensors"])


def _check_settings(where: object, settings: Mapping[str, Any], points: Mapping[str, object]) -> None:
    _check_values(where, "settings", settings, dict)
    if strange := [point for point in settings if point not in points]:
        near = did_you_mean(strange[0][:KEY_LIMIT], points)
        raise InvalidHeaderError(f"names a point without tensors.{near}", where, f"settings.{strange[0][:200]}")
    for point, own in settings.items():
        if len(repr(own)) > CONFIG_LIMIT:
            raise InvalidHeaderError(f"is longer than {CONFIG_LIMIT:,} bytes", where, f"settings.{point[:200]}")


def _object(where: object, metadata: Mapping[str, str]) -> dict[str, Any]:
    if ENTRY not in metadata:
        hint = "expected the entry 'adapterkit' in its metadata; name another format with format="
        raise UnsupportedFileError(f"is a safetensors file, but not of adapterkit's native format: {hint}", where)
    try:
        header = strict_json.loads(metadata[ENTRY])
    except StrictJSONError as error:
        raise InvalidHeaderError(f"is {error}", where, ENTRY) from error
    if not isinstance(header, dict):
        raise InvalidHeaderError(f"must be an object, not {str(header)[:80]!r}", where, ENTRY)
    return header


def _version(where: object, header: Mapping[str, Any]) -> int:
    version = header.get("file_version")
    if type(version) is not int or version < 1:
        raise InvalidHeaderError(f"must be a whole number from 1, not {version!r}", where, "file_version")
    if version > FULL:
        writer = " ".join(str(header.get("adapterkit", "an unknown release"))[:40].split())
        message = f"is of file version {version}, written by adapterkit {writer}"
        hint = f"this release, {adapterkit.__version__}, reads versions up to {FULL}: pip install -U adapterkit"
        raise UnsupportedFileError(f"{message}; {hint}", where)
    return version


def _check_schema(where: object, header: Mapping[str, Any], schema: Mapping[str, type]) -> None:
    if missing := sorted(set(schema) - set(header)):
        raise InvalidHeaderError("is missing from the header", where, missing[0])
    if unknown := sorted(set(header) - set(schema)):
        raise InvalidHeaderError(f"is unknown.{did_you_mean(unknown[0], schema)}", where, unknown[0][:200])
    for name, expected in schema.items():
        if type(header[name]) is not expected:
            raise InvalidHeaderError(f"must be {expected.__name__}, not {str(header[name])[:80]!r}", where, name)


def _check_values(where: object, name: str, values: Mapping[str, Any], expected: type) -> None:
    for key, value in values.items():
        if type(value) is not expected:
            message = f"must be {expected.__name__}, not {str(value)[:80]!r}"
            raise InvalidHeaderError(message, where, f"{name}.{key[:200]}")
