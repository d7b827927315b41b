"""Makes safetensors files that no library would write."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

Header = dict[str, Any]
Tensors = dict[str, Tensor]


def raw(header: bytes, body: bytes = b"") -> bytes:
    """A container around any header."""
    return len(header).to_bytes(8, "little") + header + body


def entry(start: int, stop: int, shape: list[int] | None = None, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(stop - start) // 4] if shape is None else shape, "data_offsets": [start, stop]}


def native_header(data: bytes) -> Header:
    """The `adapterkit` entry of a file."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["adapterkit"])


def header_text(path: Path, change: Callable[[str], str]) -> None:
    """Rewrites the text of the `adapterkit` entry; the tensors' bytes stay."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + length])
    entries["__metadata__"]["adapterkit"] = change(entries["__metadata__"]["adapterkit"])
    path.write_bytes(raw(json.dumps(entries).encode(), data[8 + length :]))


def header(path: Path, change: Callable[[Header], object]) -> None:
    """Edits the parts of the `adapterkit` entry in place."""

    def edit(text: str) -> str:
        parts = json.loads(text)
        change(parts)
        return json.dumps(parts)

    header_text(path, edit)


def tensors(path: Path, change: Callable[[Tensors], object], *, reindex: bool = True) -> None:
    """Edits the tensors in place; with `reindex` the file's index and checksums are made to fit, as a forger would."""
    data = path.read_bytes()
    found, parts = safetensors.torch.load(data), native_header(data)
    change(found)
    if reindex:
        parts["tensors"] = index(found)
    metadata = {"adapterkit": json.dumps(parts)}
    path.write_bytes(safetensors.torch.save(found, metadata))


def index(found: Mapping[str, Tensor]) -> dict[str, dict[str, str]]:
    """The index as the format defines it, computed independently."""
    result: dict[str, dict[str, str]] = {}
    for key, tensor in found.items():
        point, name = key.split("/", 1)
        raw_bytes = bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())
        result.setdefault(point, {})[name] = hashlib.sha256(raw_bytes).hexdigest()[:32]
    return result
