"""An adapter that is being written as AdapterHub keeps it: where each tensor stands, and what a config says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from adapterkit.contract.view import ComponentView
from adapterkit.errors import UnsupportedFileError
from adapterkit.formats.adapterhub_keys import ROLES
from adapterkit.formats.adapterhub_names import FAMILIES, FUSED, FUSED_PARTS, HIDDEN, Block, Places
from adapterkit.formats.adapterhub_schemas import ARCHITECTURES
from adapterkit.points import InjectionPoint, Points

VERSION = "adapters.1.3.0"
"""The release of the tool whose files these are."""
OTHERS = "native holds any adapter, and peft many"
_WIDTHS = ("hidden_size", "d_model", "n_embd", "dim")
_NOT_WRITTEN = frozenset(
    {
        *("invertible_adapter", "new_attention_norm", "attention_type", "subtract_projection", "random_uniform_scale"),
        *("n_up_projection", "task_specific_matrix_type", "weights_sharpness", "task_names"),
    }
)
"""Fields of other releases, and of none."""


@dataclass
class Child:
    """One method of a config.

    Attributes:
        architecture: The tool's word.
        fields: Those that are not what is left out.
    """

    architecture: str
    fields: dict[str, Any]

    def json(self) -> dict[str, Any]:
        """All fields, as the tool writes them."""
        schema = ARCHITECTURES[self.architecture][1]
        found = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in schema.items()
            if name not in _NOT_WRITTEN
        }
        own = {} if self.architecture == "bottleneck" else {"architecture": self.architecture}
        return dict(sorted({**found, **own, **self.fields}.items()))


@dataclass
class Writing:
    """What is known of the model, and what is written so far.

    Attributes:
        where: Named in errors.
        name: The adapter's, which stands in the keys.
        model: The model.
        places: Its blocks.
        points: Its points.
        tensors: By key.
        notes: For the report.
    """

    where: object
    name: str
    model: ComponentView
    places: Places
    points: Points
    tensors: dict[str, Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        base = self.places.family.base
        self.base = f"{base}." if any(point.path.startswith(f"{base}.") for point in self.points) else ""
        self._by_id = {point.id: point for point in self.points}
        self._at: dict[str, tuple[str, Block]] = {}
        for block in self.places.blocks:
            fused = (*FUSED_PARTS, "fused.attn") if FUSED in block.stack.names else ()
            for role in (*block.stack.names, *fused, HIDDEN):
                if found := self.places.point(role, block):
                    self._at[found.id] = (role, block)

    def note(self, told: str) -> None:
        """Keeps a sentence for the report, once."""
        if told not in self.notes:
            self.notes.append(told)

    def refused(self, told: str, point: str | None = None) -> UnsupportedFileError:
        """The error for what the tool cannot say."""
        return UnsupportedFileError(f"AdapterHub {told}; {OTHERS}", self.where, point)

    def point(self, id: str) -> InjectionPoint:
        """A point of the model.

        Raises:
            UnsupportedFileError: It is none.
        """
        if id not in self._by_id:
            raise self.refused("files are written for a model, and this one has no such point", id)
        return self._by_id[id]

    def place(self, id: str, roles: Sequence[str]) -> tuple[str, Block]:
        """Role and block of a point.

        Raises:
            UnsupportedFileError: The tool does not act there, or not in this way.
        """
        role, block = self._at.get(id, ("", None))
        if block is None or role not in roles:
            raise self.refused(f"does not act at {self.point(id).role!r} in this way", id)
        return role, block

    def path(self, role: str, block: Block) -> str:
        """The tool's path of a place."""
        inside = f"{self.base}{block.stack.path}.{block.number}"
        if role == HIDDEN:
            return inside
        names, point = block.stack.names.get(role, ()), self.places.point(role, block)
        if not names:
            raise self.refused(f"does not act at {role!r} in this way", None if point is None else point.id)
        ends = [name for name in names if point is not None and point.path.endswith(f".{name}")]
        return f"{inside}.{ends[0] if ends else names[0]}"

    def put(self, kind: str, role: str, block: Block, tensors: Mapping[str, Tensor], below: str = "") -> None:
        """Tensors at a place in a block."""
        assert kind in ROLES
        path = f"{self.path(role, block)}.{below}" if below else self.path(role, block)
        self.tensors |= {f"{path}.{kind}.{self.name}.{name}": tensor for name, tensor in tensors.items()}

    def put_whole(self, path: str, tensors: Mapping[str, Tensor]) -> None:
        """Tensors outside of all blocks."""
        self.tensors |= {f"{self.base}{path}.{self.name}.{name}": tensor for name, tensor in tensors.items()}

    def left_out(self, layers: Sequence[int], roles: Sequence[str]) -> list[int]:
        """The layers with one of these roles that are not among those."""
        return [
            block.layer
            for block in self.places.blocks
            if block.layer not in layers and any(self.places.point(role, block) for role in roles)
        ]

    def about(self) -> dict[str, Any]:
        """What every config says of the model."""
        config = self.model.config
        return {
            "hidden_size": next((config[name] for name in _WIDTHS if isinstance(config.get(name), int)), None),
            "model_class": self.model.classes[0].rpartition(":")[2] if self.model.classes else "",
            "model_name": config.get("_name_or_path") or None,
            "model_type": config["model_type"],
            "version": VERSION,
        }


def begun(name: str, points: Points, ids: Sequence[str], where: object) -> Writing:
    """What is needed to write an adapter that acts at these points.

    Raises:
        UnsupportedFileError: The tool does not know the model, or the adapter is of several.
    """
    here = {point.id: point.model for point in points}
    components = dict.fromkeys(here[id] for id in ids if id in here)
    if len(components) > 1:
        told = f"AdapterHub's adapters are one model's, and this one acts in {', '.join(components)}"
        raise UnsupportedFileError(f"{told}; {OTHERS}", where)
    component = next(iter(components), "")
    model = points.model.components.get(component) if points.model is not None else None
    if model is None or points.model is None:
        raise UnsupportedFileError(f"AdapterHub's files are written for a model that is at hand; {OTHERS}", where)
    kind = model.config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        told = f"AdapterHub is written for these types of models: {', '.join(FAMILIES)}; this one is {kind or 'none'}"
        raise UnsupportedFileError(f"{told}; {OTHERS}", where)
    own = Points(point for point in points if point.model == component).of(points.model)
    return Writing(where, name, model, Places(FAMILIES[kind], own), own)


def number(value: float) -> float | int:
    """A number as the tool writes it: whole ones without a point."""
    return int(value) if float(value).is_integer() else float(value)


def factor(features: int, width: int, given: float | None = None) -> float | int:
    """The reduction factor by which the tool makes a width from this many features: the given one where it does."""
    if given and int(features / given) == width:
        return number(given)
    return number(features / width) if features % width == 0 else features / (width + 0.5)
