"""Native files without a handle."""

from __future__ import annotations

from pathlib import Path

from adapterkit.checkpoint import Checkpoint, ReadOptions, WriteOptions
from adapterkit.formats import registry
from adapterkit.formats.native import NativeFormat
from adapterkit.formats.source import Source
from adapterkit.points import Points

NONE = Points([])


def read(path: Path) -> Checkpoint:
    """The one adapter in a file."""
    [found] = NativeFormat().read(Source.of(path), NONE, ReadOptions())[0].values()
    return found


def write(checkpoint: Checkpoint, path: Path) -> Path:
    """Writes one adapter."""
    NativeFormat().write({"": checkpoint}, path, NONE, WriteOptions())
    return path


def recognised(path: Path) -> bool:
    """Whether a file is taken for a native one."""
    return registry.named_format("native").recognises(Source.of(path))
