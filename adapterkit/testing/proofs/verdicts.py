"""What is known of each point after a proof."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from adapterkit.points import InjectionPoint

Result = Literal["proven", "false", "not reached"]
RESULTS: tuple[Result, ...] = ("proven", "false", "not reached")

_SHOWN, _LONGEST = 3, 300


@dataclass(frozen=True)
class Verdict:
    """Of one point.

    Attributes:
        point: Whose.
        result: proven, false, or not reached: no call runs it, or nothing that it makes arrives in an output.
        why: How it is proven, in what it is false, or why nothing reaches it.
    """

    point: InjectionPoint
    result: Result
    why: str = ""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        point = self.point
        names = {"id": point.id, "role": point.role, "kind": point.kind, "path": point.path}
        return {**names, "result": self.result, "why": self.why}


class Proof(Sequence[Verdict]):
    """The verdicts, in model order. Prints as a line for each role."""

    def __init__(self, verdicts: Iterable[Verdict]) -> None:
        self._verdicts = tuple(verdicts)

    def __getitem__(self, index: Any) -> Any:
        return self._verdicts[index]

    def __len__(self) -> int:
        return len(self._verdicts)

    def __iter__(self) -> Iterator[Verdict]:
        return iter(self._verdicts)

    @property
    def proven(self) -> list[Verdict]:
        """Points that do what the map says."""
        return self._of("proven")

    @property
    def false(self) -> list[Verdict]:
        """Points that do not."""
        return self._of("false")

    @property
    def unreached(self) -> list[Verdict]:
        """Points of which these calls tell nothing."""
        return self._of("not reached")

    def counts(self) -> dict[str, dict[str, int]]:
        """Kind -> result -> number of points."""
        found: dict[str, Counter[str]] = defaultdict(Counter)
        for verdict in self:
            found[verdict.point.kind][verdict.result] += 1
        return {kind: {result: one[result] for result in RESULTS} for kind, one in found.items()}

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"counts": self.counts(), "points": [verdict.to_dict() for verdict in self]}

    def __str__(self) -> str:
        by_role: dict[tuple[str, str], list[Verdict]] = defaultdict(list)
        for verdict in self:
            by_role[verdict.point.kind, verdict.point.role].append(verdict)
        lines = [line for (kind, role), found in by_role.items() for line in _lines(kind, role, found)]
        return "\n".join([*lines, _numbers(Counter(verdict.result for verdict in self)) or "no points"])

    __repr__ = __str__

    def _of(self, result: Result) -> list[Verdict]:
        return [verdict for verdict in self if verdict.result == result]


def _lines(kind: str, role: str, found: Sequence[Verdict]) -> Iterator[str]:
    ways = sorted({verdict.why for verdict in found if verdict.result == "proven" and verdict.why})
    told = f" ({'; '.join(ways)})" if ways else ""
    yield f"{role}  {kind}  {_numbers(Counter(verdict.result for verdict in found))}{told}"
    reasons: Mapping[str, list[Verdict]] = defaultdict(list)
    for verdict in found:
        if verdict.result != "proven":
            reasons[f"{verdict.result}: {verdict.why[:_LONGEST]}"].append(verdict)
    for reason, same in list(reasons.items())[:_SHOWN]:
        yield f"    {reason}  [{same[0].point.id}{f', and {len(same) - 1} more' if len(same) > 1 else ''}]"


def _numbers(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{counts[result]} {result}" for result in RESULTS if counts.get(result))
