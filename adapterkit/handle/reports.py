"""What the handle tells about itself."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from adapterkit.checkpoint import ReadReport
from adapterkit.errors import printable, shown
from adapterkit.handle.effects import Effects, Watched
from adapterkit.mapping.targets import some


@dataclass(frozen=True)
class AdapterReport:
    """One adapter on a model.

    Attributes:
        name, type: What it is called and what it is.
        points: Role -> number of points.
        parameters: Numbers in all its parameters.
        bytes: Their size.
        weight: The weight with which it acts now, one for each row inside `routed`; None where it does not.
        trainable: Whether any of it requires grad.
        merged: Whether it is folded into the weights.
    """

    name: str
    type: str
    points: Mapping[str, int]
    parameters: int
    bytes: int
    weight: float | Sequence[float] | None
    trainable: bool
    merged: bool

    def _strength(self) -> str:
        if self.weight is None:
            return "inactive"
        return "routed" if isinstance(self.weight, Sequence) else f"weight {self.weight:g}"

    def __str__(self) -> str:
        roles = ", ".join(f"{role} x{count}" for role, count in self.points.items())
        marks = [self._strength()]
        marks += ["trainable"] * self.trainable + ["merged"] * self.merged
        size = f"{self.bytes / 2**20:.2f} MiB"
        return f"{self.name} ({self.type}; {', '.join(marks)}): {self.parameters:,} parameters, {size}, at {roles}"


@dataclass(frozen=True)
class Report:
    """Every adapter on a model, and the size of the base. Prints as a table.

    Attributes:
        model: The model's class, or the pipeline's.
        base_parameters, trainable_parameters: Numbers in all parameters, and in those that require grad.
        adapters: Those of this handle.
        beside: In how many modules other handles have adapters, on models that share a part with this one.
    """

    model: str
    base_parameters: int
    trainable_parameters: int
    adapters: Sequence[AdapterReport] = field(default_factory=tuple)
    beside: int = 0

    def __str__(self) -> str:
        head = f"{self.model}: {self.base_parameters:,} parameters, {self.trainable_parameters:,} trainable"
        others = [f"  beside adapters of other handles, in {self.beside} modules"] if self.beside else []
        return "\n".join([head, *(f"  {adapter}" for adapter in self.adapters), *others])


@dataclass(frozen=True)
class LoadReport:
    """What a load did. Prints as a few lines, and is JSON by `to_dict()`.

    Attributes:
        name, type: The adapter as it is called now, and its type; several types are joined by ` + `.
        points: Ids of the points that received tensors.
        parameters: Numbers loaded.
        notes: What was left out or looked past; empty after a strict load of a file made for this base.
        metadata: What the file says beside the tensors.
        read: What its format has found: which keys matched, which did not, and who wrote the file for which base.
        adapter: How the adapter is found when its effect is asked for.
    """

    name: str
    type: str
    points: Sequence[str]
    parameters: int
    notes: Sequence[str] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    read: ReadReport = field(default_factory=ReadReport)
    adapter: Watched | None = field(default=None, repr=False, compare=False)

    @functools.cached_property
    def effects(self) -> Effects | None:
        """Ranks, scales, and norms of what is added to the weights, block by block; computed when first asked for.

        None where the adapter was removed before.
        """
        return None if self.adapter is None else self.adapter.effects()

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON values, the effect too."""
        read = {name: _plain(getattr(self.read, name)) for name in _READ}
        own = {name: _plain(getattr(self, name)) for name in ("name", "type", "points", "parameters", "notes")}
        effects = None if self.effects is None else self.effects.to_dict()
        return {**own, "metadata": dict(self.metadata), "read": read, "effects": effects}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "effects": self.effects, "adapter": None}  # the adapter stays with its model

    def __str__(self) -> str:
        head = f"{self.name} ({self.type}): {self.parameters:,} parameters at {len(self.points)} points"
        return printable("\n  ".join([head, *self._origin(), *self._strength(), *self.notes]))

    def _origin(self) -> Iterator[str]:
        read = self.read
        if read.format:
            yield f"from {read.format}" + (f", written by {read.tool} {read.version}".rstrip() if read.tool else "")
        if read.base:
            yield f"made for {read.base}"
        if read.matched:
            yield f"matched {len(read.matched):,} keys, as {shown(read.matched[0])}"
        for keys, what in ((read.unmatched, "that belong to no point here"), (read.left_over, "that are unknown")):
            if keys:
                yield f"left out {len(keys):,} keys {what}: {some(keys)}"

    def _strength(self) -> Iterator[str]:
        if self.effects is None:
            return
        for name, counts in (("rank", self.effects.ranks), ("scale", self.effects.scales)):
            if counts:
                yield f"{name} " + ", ".join(f"{value:g} at {count}" for value, count in counts.items())
        norms = self.effects.norms
        if norms:
            strongest = sorted(norms, key=lambda block: -norms[block])[:_BLOCKS]
            rest = len(norms) - len(strongest)
            told = ", ".join(f"{block} {norms[block]:.3g}" for block in strongest)
            yield f"norm {self.effects.norm:.4g}: {told}" + (f", and {rest} weaker blocks" if rest else "")
        for reason, count in self.effects.unknown.items():
            yield f"no norm at {count}: {reason}"


_READ = ("format", "tool", "version", "base", "matched", "unmatched", "left_over", "notes")
_BLOCKS = 6


def _plain(value: Any) -> Any:
    return value if isinstance(value, (str, int)) else list(value)
