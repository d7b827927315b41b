"""One architecture: what its map offers, and which of that the numbers prove. Kept as JSON, so that a sweep resumes."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

import adapterkit as ak
from adapterkit.errors import AdapterKitError, TargetNotFoundError
from adapterkit.points import AttentionPoint, InjectionPoint, OutputPoint, Points, WeightPoint
from adapterkit.selectors import Selector
from adapterkit.testing.proof import Proof, prove
from adapterkit.testing.proofs.attentions import BY_LIMITS
from adapterkit.testing.specimens import NoSpecimen, specimen
from tests.architectures import catalogue, commits

FOLDER = Path(os.environ.get("ARCHITECTURES", "/tmp/adapterkit_architectures"))
"""Where rows are kept."""

CLAIMS = ("attention", "prefixes", "outputs")
"""What the table counts: the preset, attention points, sublayers' outputs."""

UNFINISHED = "the proof has not come to its end"

_MOST_FALSE = 40


@dataclass
class Row:
    """What is known of one architecture.

    Attributes:
        line, name, model: Its line, its name there, and its class.
        broken: Why the library's own default cannot be built; then nothing else is known.
        crashed: An error of ours that has no type, or one that says that the model has no points.
        attention: Whether it has modules that are called attentions, with parameters.
        offered: Kind and role, as `weight attn.q` -> number of points, of the full size.
        unproven: Why there is no proof; "" where there is one.
        counts: Kind -> result -> points, of the specimen.
        wrong, unreached: Some points with the reasons, of the specimen.
        claims: Of `CLAIMS`: "proven", "false", "not reached", "listed" (there is no proof) or "none".
        limited: Attention points that are proven in the limits alone, and not by the equation.
        commit: At which it was made; "" of rows from before this was kept.
        seconds: It took.
    """

    line: str
    name: str
    model: str = ""
    broken: str = ""
    crashed: str = ""
    attention: bool = False
    offered: dict[str, int] = field(default_factory=dict[str, int])
    unproven: str = ""
    counts: dict[str, dict[str, int]] = field(default_factory=dict[str, dict[str, int]])
    wrong: dict[str, str] = field(default_factory=dict[str, str])
    unreached: dict[str, str] = field(default_factory=dict[str, str])
    claims: dict[str, str] = field(default_factory=dict[str, str])
    limited: int = 0
    commit: str = ""
    seconds: float = 0.0

    @property
    def by_limits(self) -> bool:
        """Whether prefixes are proven, and of no point by the equation."""
        proven = self.counts.get("attention", {}).get("proven", 0)
        return self.claims.get("prefixes") == "proven" and self.limited == proven

    @property
    def path(self) -> Path:
        """Where it is kept."""
        return FOLDER / self.line / f"{self.name.replace('/', '_')}.json"

    def write(self) -> None:
        """Keeps it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")


def kept(line: str, name: str) -> Row | None:
    """A row that was made before."""
    path = Row(line, name).path
    return Row(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def made(line: str, name: str) -> Row:
    """Maps an architecture, and proves its map on a specimen; what the map offers is kept before it is proven."""
    row, start = Row(line, name, commit=commits.now()), time.monotonic()
    _fill(row, start)
    row.seconds = round(time.monotonic() - start, 1)
    return row


def _fill(row: Row, start: float) -> None:
    try:
        model = catalogue.skeleton(row.line, row.name)
    except catalogue.BrokenDefaultError as error:
        row.broken = str(error)
        return
    row.model, row.attention = type(model).__name__, any(_is_attention(module) for module in model.modules())
    try:
        points = ak.points(model)
    except Exception as error:  # noqa: BLE001 - what crashes is what is looked for
        row.crashed = f"{type(error).__name__}: {error}"
        row.claims = dict.fromkeys(CLAIMS, "none")
        return
    for point in points:
        key = f"{point.kind} {point.role}"
        row.offered[key] = row.offered.get(key, 0) + 1
    row.claims = {claim: "listed" if _chosen(claim, points) else "none" for claim in CLAIMS}
    row.unproven, row.seconds = UNFINISHED, round(time.monotonic() - start, 1)
    row.write()
    try:
        made = specimen(model)
        row.unproven = ""
        _judge(row, prove(made.model, made.calls))
    except (NoSpecimen, AdapterKitError) as error:
        row.unproven = str(error)
    except Exception as error:  # noqa: BLE001 - of one architecture
        row.unproven = f"{type(error).__name__}: {error}"[:500]


def _judge(row: Row, proof: Proof) -> None:
    row.counts = proof.counts()
    row.wrong = {one.point.id: one.why for one in proof.false[:_MOST_FALSE]}
    row.unreached = {one.point.id: one.why for one in proof.unreached[:_MOST_FALSE]}
    row.limited = sum(one.why == BY_LIMITS for one in proof.proven)
    results = {one.point.id: one.result for one in proof}
    points = Points(one.point for one in proof)
    for claim, said in row.claims.items():
        if said != "none":
            row.claims[claim] = _result([results[point.id] for point in _chosen(claim, points)])


def _result(results: Sequence[str]) -> str:
    if not results:
        return "not reached"
    return next((one for one in ("false", "proven") if one in results), "not reached")


def _is_attention(module: nn.Module) -> bool:
    name = type(module).__name__.lower()
    return ("attention" in name or "attn" in name) and any(True for _ in module.parameters())


def _preset(points: Points) -> list[InjectionPoint]:
    try:
        return list(Selector("attention").select([point for point in points if isinstance(point, WeightPoint)], ""))
    except TargetNotFoundError:
        return []


_CHOOSERS: Mapping[str, Callable[[Points], list[InjectionPoint]]] = {
    "attention": _preset,
    "prefixes": lambda points: [point for point in points if isinstance(point, AttentionPoint)],
    "outputs": lambda points: [point for point in points if isinstance(point, OutputPoint) and not point.is_block],
}


def _chosen(claim: str, points: Points) -> list[InjectionPoint]:
    return _CHOOSERS[claim](points)


def lines_of(row: Row) -> list[str]:
    """A row for people."""
    told = row.broken or row.crashed or row.unproven
    claims: Any = " ".join(f"{claim}={said}" for claim, said in row.claims.items())
    head = f"{row.name} ({row.model}) {claims} {row.counts or ''} {row.seconds}s{f'  {told[:300]}' if told else ''}"
    return [
        head,
        *(f"    false {key}: {why}" for key, why in list(row.wrong.items())[:6]),
        *(f"    not reached {key}: {why}" for key, why in list(row.unreached.items())[:3]),
    ]
