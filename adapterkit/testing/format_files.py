"""What the checks of a format compare, and files of no adapter's format."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from adapterkit.checkpoint import Checkpoint, Part
from adapterkit.errors import CheckpointError
from adapterkit.formats.source import Source
from adapterkit.testing.models import EXAMPLES, Example
from adapterkit.testing.subject import assert_same


def example_of(name: str) -> Example:
    """The example that a name ends in."""
    return next(one for one in EXAMPLES if name.endswith(f" on {one.name}"))


def copied(checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint with tensors of its own."""
    return checkpoint.replace(
        config=json.loads(json.dumps(checkpoint.config)),
        tensors={key: {n: t.clone() for n, t in own.items()} for key, own in checkpoint.tensors.items()},
    )


def assert_equal(name: str, one: Checkpoint, other: Checkpoint) -> None:
    """The one parts of two checkpoints hold the same bits."""
    assert one.tensors.keys() == other.tensors.keys(), f"{name}: other points: {', '.join(one.tensors)}"
    for key, own in other.tensors.items():
        assert one.tensors[key].keys() == own.keys(), f"{name}: other tensors at {key}"
        for part, tensor in own.items():
            found: Tensor = one.tensors[key][part]
            assert found.dtype == tensor.dtype, f"{name}: {key}/{part} became {found.dtype}"
            assert_same(found, tensor, f"{name}: {key}/{part}")


def assert_parts(name: str, one: Checkpoint, other: Checkpoint) -> None:
    """All parts of two checkpoints hold the same bits."""
    assert len(one.parts) == len(other.parts), f"{name}: {len(one.parts)} types instead of {len(other.parts)}"
    for own, expected in zip(one.parts, other.parts, strict=True):
        assert_equal(name, Checkpoint([own]), Checkpoint([expected]))


def in_halves(checkpoint: Checkpoint) -> list[Part]:
    """A checkpoint's points in two parts; fewer where it has no two points, or what its points share."""
    tensors = checkpoint.tensors
    keys = [] if "shared" in tensors else list(tensors)
    chunks = [keys[: len(keys) // 2], keys[len(keys) // 2 :]]
    return [dataclasses.replace(checkpoint.part, tensors={k: tensors[k] for k in c}) for c in chunks if c]


def dtypes_in(path: Path, read: Checkpoint) -> set[torch.dtype]:
    """The floating-point dtypes in a file, or else of what was read from it."""
    with contextlib.suppress(CheckpointError):
        return {entry.dtype for entry in Source.of(path).entries.values() if entry.dtype.is_floating_point}
    tensors = [t for part in read.parts for own in part.tensors.values() for t in own.values()]
    return {tensor.dtype for tensor in tensors if tensor.is_floating_point()}


def foreign_files(folder: Path) -> list[Path]:
    """Files of no adapter's format."""
    contents: Mapping[str, bytes] = {
        "empty": b"",
        "text": b"not an adapter\n",
        "json": b'{"type": "lora"}',
        "zeros": bytes(64),
        "ones": b"\xff" * 64,
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    save_file({"weight": torch.ones(2)}, folder / "tensors")
    with zipfile.ZipFile(folder / "archive", "w") as archive:
        archive.writestr("data.pkl", b"\x80\x02.")
    return [folder / name for name in (*contents, "tensors", "archive")]
