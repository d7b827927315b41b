"""Which formats can say an adapter: asked by writing a small part of it, of which every kind of point has one."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from adapterkit.checkpoint import Checkpoint, Part
from adapterkit.errors import AdapterKitError, BaseNeededError
from adapterkit.handle.building import SHARED
from adapterkit.plugins import get_plugin_manager
from adapterkit.points import Points
from adapterkit.tools.files import write


@dataclass(frozen=True)
class Verdict:
    """Whether a format can say an adapter.

    Attributes:
        reason: Why not; "" where it can.
        notes: What its readers must know.
        asked: Whether it could be asked: without a model at hand, most cannot.
    """

    reason: str = ""
    notes: Sequence[str] = ()
    asked: bool = True


def verdicts(checkpoint: Checkpoint, came_from: str, points: Points | None = None) -> dict[str, Verdict]:
    """Format -> whether it can say the adapter.

    Args:
        checkpoint: The adapter.
        came_from: The format that it was read from.
        points: The model's, where it is at hand; without them few formats can be asked.
    """
    small = dataclasses.replace(checkpoint, parts=[_thinned(part) for part in checkpoint.parts])
    return {name: _asked(small, name, came_from, points) for name in get_plugin_manager().formats()}


def _asked(checkpoint: Checkpoint, name: str, came_from: str, points: Points | None) -> Verdict:
    with tempfile.TemporaryDirectory() as folder:
        try:
            report = write(checkpoint, Path(folder) / "a", format=name, points=points, came_from=came_from)
        except BaseNeededError as error:
            return Verdict(str(error), asked=False)
        except AdapterKitError as error:
            return Verdict(str(error).replace(f"{folder}/a: ", ""))
    return Verdict(notes=report.notes)


def _thinned(part: Part) -> Part:
    """One point of each kind: of equal settings, and tensors of equal shapes and dtypes."""
    kept: dict[str, str] = {}
    for key, own in part.tensors.items():
        shapes = sorted((name, str(tensor.dtype), tuple(tensor.shape)) for name, tensor in own.items())
        kept.setdefault(repr((key == SHARED, key.partition("@")[0], part.settings.get(key), shapes)), key)
    keys = {*kept.values()}
    return dataclasses.replace(part, tensors=_of(part.tensors, keys), settings=_of(part.settings, keys))


def _of(values: Mapping[str, Mapping[str, object]], keys: set[str]) -> dict[str, Mapping[str, object]]:
    return {key: own for key, own in values.items() if key in keys}
