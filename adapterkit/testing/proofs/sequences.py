"""Token points: what is seen there is a sequence, and a change of it, or further positions, arrive."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

import adapterkit as ak
from adapterkit.mapping.model import map_model
from adapterkit.points import InjectionPoint, Kind, TokensPoint
from adapterkit.testing.proofs.bench import NAME, Bench, Refuted, convicted, difference, judged
from adapterkit.testing.proofs.verdicts import Verdict
from adapterkit.testing.subject import randomise

_LENGTH = 2


class ShiftModule(ak.AdapterModule):
    """Adds noise to an embedded sequence, and keeps its shape."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, x: Any, base: ak.adapter.Base) -> Tensor:
        """`base(x)` and the same noise at every position."""
        y = base(x)
        self.shapes.append(tuple(y.shape))
        return y + torch.linspace(-0.5, 1, y.shape[-1], dtype=y.dtype).sin()


@dataclass(frozen=True)
class Shift(ak.AdapterConfig):
    """Changes embedded sequences."""

    kinds: ClassVar[frozenset[Kind]] = frozenset({"tokens"})
    targets: str = "*"

    def build(self, point: InjectionPoint) -> ShiftModule:
        return ShiftModule()


def prove_tokens(bench: Bench, points: Sequence[InjectionPoint]) -> list[Verdict]:
    """Verdicts on token points."""
    found = [point for point in points if isinstance(point, TokensPoint)]
    idle: dict[str, str] = {}

    def check(some: Sequence[InjectionPoint]) -> None:
        (_lengthened if some[0].lengthens else _shifted)(bench, some[0], idle)

    wrong: dict[str, str] = {}
    for point in found:
        wrong |= convicted([point], check)
    return judged(found, wrong, idle, lambda point: "longer" if point.lengthens else "a change arrives")


def _shifted(bench: Bench, point: InjectionPoint, idle: dict[str, str]) -> None:
    with bench.adapted(Shift(), [point]) as adapters:
        changed = bench.changes()
        modules: Any = adapters.modules(NAME)
    shapes = modules[point.id].shapes
    if not shapes:
        idle[point.id] = "no call embeds tokens here"
        return
    if bad := [shape for shape in shapes if len(shape) != 3 or shape[-1] != point.out_features]:
        raise Refuted(f"says [batch, length, {point.out_features}], and the sequence is {bad[0]}")
    if not changed:
        idle[point.id] = "a change of the sequence changes nothing"


def _lengthened(bench: Bench, point: InjectionPoint, idle: dict[str, str]) -> None:
    kept = bool(map_model(bench.model, bench.backend).reach(point).attending)
    with bench.adapted(ak.Prompt(length=_LENGTH), [point]) as adapters:
        randomise(adapters, NAME)
        found = bench.outputs()
    for label, output in found.items():
        added = output.numel() - bench.base[label].numel()
        # An encoder's positions stay in the states that it hands to a decoder, and returns.
        if output.shape != bench.base[label].shape and not (kept and added % (_LENGTH * point.out_features) == 0):
            raise Refuted(f"the output is {tuple(output.shape)}, and the base's {tuple(bench.base[label].shape)}")
        if not bool(torch.isfinite(output).all()):
            raise Refuted("the output is not finite")
    if all(difference(output, bench.base[label]) == 0 for label, output in found.items()):
        idle[point.id] = "further positions change nothing"
