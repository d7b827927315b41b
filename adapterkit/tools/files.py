"""Adapters out of files and into files, with a model at hand or without."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from adapterkit.checkpoint import Checkpoint, ReadReport, WriteReport
from adapterkit.errors import BaseNeededError
from adapterkit.formats.registry import find_format, named_format, only
from adapterkit.formats.source import Readable, Source
from adapterkit.points import Points
from adapterkit.tools.modules import base_needed, modules

NATIVE = "native"


@dataclass(frozen=True)
class Loaded:
    """What a file holds.

    Attributes:
        adapters: By name; "" for one without.
        report: What the format says.
        points: The model's; None where none was at hand, so that ids are the file's own.
        where: The file.
    """

    adapters: Mapping[str, Checkpoint]
    report: ReadReport
    points: Points | None
    where: object

    @property
    def checkpoint(self) -> Checkpoint:
        """The one adapter.

        Raises:
            UnsupportedFileError: There are several.
        """
        return only(self.adapters, self.where)

    @property
    def dtype(self) -> torch.dtype:
        """The widest floating-point dtype of its tensors."""
        dtypes = {
            tensor.dtype
            for one in self.adapters.values()
            for part in one.parts
            for own in part.tensors.values()
            for tensor in own.values()
            if tensor.is_floating_point()
        }
        widest = torch.float16
        for number, dtype in enumerate(sorted(dtypes, key=str)):
            widest = dtype if not number else torch.promote_types(widest, dtype)
        return widest if dtypes else torch.float32


def read(
    file: Readable,
    points: Points | None = None,
    *,
    format: str | None = None,
    strict: bool = True,
    allow_pickle: bool = False,
) -> Loaded:
    """Reads a file or folder of any format.

    Args:
        file: As for `Adapters.load`.
        points: The model's, as `tools.points` gives them. Without them ids are the file's own.
        format: A format's name; by default the content tells.
        strict: Whether what nothing receives is an error.
        allow_pickle: Whether a pickle of tensors may be opened, with torch's `weights_only`.

    Raises:
        CheckpointError: It cannot be read.
    """
    source = Source.of(file, allow_pickle=allow_pickle)
    reader = find_format(source, format)
    found, report = reader.read(
        source, Points([]) if points is None else points, reader.reading(strict=strict, allow_pickle=allow_pickle)
    )
    return Loaded(found, report, points, source.where)


def write(
    checkpoint: Checkpoint,
    target: Path,
    *,
    format: str = NATIVE,
    points: Points | None = None,
    came_from: str = NATIVE,
    dtype: torch.dtype | None = None,
    approximate: bool = False,
) -> WriteReport:
    """Writes an adapter.

    Args:
        checkpoint: The adapter.
        target: The file, or the folder where the format writes one.
        format: A format's name.
        points: The model's. Without them the names of modules are those of the file that the adapter came from, so
            that it can be written in that file's format, or in our own, alone.
        came_from: That file's format.
        dtype: What floating-point tensors are written as; by default as they are.
        approximate: Whether what the format cannot say may be written as the nearest that it can.

    Raises:
        BaseNeededError: The format calls modules otherwise, and how, the model tells.
        CheckpointError: The format cannot express it, or the place cannot be written.
    """
    writer = named_format(format)
    if points is None and format not in (NATIVE, came_from):
        raise BaseNeededError(
            f"{came_from} and {format} call modules by names of their own, which the model tells: --base MODEL",
            target,
        )
    if points is None:
        points = Points([]) if format == NATIVE else made_up(checkpoint, target)
    return writer.write({"": checkpoint}, target, points, writer.writing(dtype=dtype, approximate=approximate))


def made_up(checkpoint: Checkpoint, source: object = None) -> Points:
    """The points that an adapter has, as its tensors tell.

    Raises:
        BaseNeededError: They do not tell all of them.
    """
    found = list(modules(checkpoint))
    for placed in found:
        if placed.point is None or not placed.sized:
            raise base_needed("of which shape the weight is there its tensors do not tell", source, placed.key)
    return Points(placed.point for placed in found if placed.point is not None)
