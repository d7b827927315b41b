"""A model on the bench of a proof: its calls, what the base gives for them, and who is in doubt when a check fails."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.errors import ProofError
from adapterkit.points import InjectionPoint
from adapterkit.testing.proofs.verdicts import Verdict

NAME = "probe"
TIGHT, NEAR = 1e-10, 1e-6
"""Relative tolerances, of the largest value compared: for what is equal, and for what is so in a limit."""

ROUNDING = 1e-13
"""Of the largest value: what changes less may be the order of a sum, and no effect."""

Calls = Mapping[str, Callable[[], Tensor]]
Outputs = dict[str, Tensor]


class Refuted(Exception):  # noqa: N818 - what a check finds, not a failure of the check
    """A claim does not hold; the text says in what."""


@dataclass
class Bench:
    """What every check of a proof works with.

    Attributes:
        model: In evaluation mode, without grad.
        calls: Label -> what runs it.
        base: Label -> what the base gives.
        backend: Name of the one that maps it, where it is not found by class.
        ran: Paths of the modules that some call runs.
    """

    model: nn.Module
    calls: Calls
    backend: str | None = None
    base: Outputs = field(default_factory=dict[str, Tensor])
    ran: set[str] = field(default_factory=set[str])

    def __post_init__(self) -> None:
        with _watching(self.model, self.ran):
            self.base = self.outputs()
        for label, output in self.outputs().items():
            if not bool(torch.isfinite(output).all()):
                raise ProofError(f"call {label!r} gives values that are not finite")
            if not torch.equal(output, self.base[label]):
                raise ProofError(f"call {label!r} does not give the same twice")

    @torch.no_grad()
    def outputs(self) -> Outputs:
        """What the calls give now, without grad."""
        return {label: self._run(label, call) for label, call in self.calls.items()}

    def _run(self, label: str, call: Callable[[], Tensor]) -> Tensor:
        try:
            return call()
        except Exception as error:
            if not self.base:  # of the base, and no adapter's fault
                raise ProofError(f"call {label!r} fails: {brief(error)}") from error
            raise

    @contextlib.contextmanager
    def adapted(self, config: ak.AdapterConfig, points: Sequence[InjectionPoint]) -> Iterator[ak.Adapters]:
        """A handle with an adapter at these points, which acts and is gone after."""
        adapters = ak.Adapters(self.model, backend=self.backend)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nobody saves it
            adapters.add(NAME, config, settings={point.id: {} for point in points}, train=False)
        try:
            yield adapters
        finally:
            adapters.detach()

    def same(self, expected: Outputs, told: str, tolerance: float = TIGHT) -> None:
        """Raises Refuted where the outputs are not these."""
        for label, output in self.outputs().items():
            if (distance := difference(output, expected[label])) > tolerance:
                raise Refuted(f"{told}: other by {distance:.1e} of the largest value, in call {label!r}")

    def changes(self) -> bool:
        """Whether the outputs are other than the base's, by more than rounding."""
        return self.changed_in(self.outputs())

    def changed_in(self, outputs: Outputs) -> bool:
        """Whether these are other than the base's, by more than rounding."""
        return any(difference(output, self.base[label]) > ROUNDING for label, output in outputs.items())


def difference(one: Tensor, other: Tensor) -> float:
    """The largest difference over the largest value of the second; infinite where the shapes are not the same."""
    if one.shape != other.shape or not bool(torch.isfinite(one).all()):
        return float("inf")
    if not one.numel():
        return 0.0
    return float((one - other).abs().max()) / max(float(other.abs().max()), 1e-30)


@contextlib.contextmanager
def _watching(model: nn.Module, ran: set[str]) -> Iterator[None]:
    def watch(path: str) -> Callable[..., None]:
        return lambda *_: ran.add(path)

    hooks = [module.register_forward_pre_hook(watch(path)) for path, module in model.named_modules()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


Check = Callable[[Sequence[InjectionPoint]], None]
"""Raises, whatever it raises, where what it checks does not hold at all of these points at once."""


def convicted(points: Sequence[InjectionPoint], check: Check) -> dict[str, str]:
    """Point id -> what does not hold there, for the points without which a check would pass; halves are tried."""
    if not points:
        return {}
    try:
        check(points)
    except Refuted as error:
        told = str(error)
    except Exception as error:  # noqa: BLE001 - whatever a wrong map makes of a forward
        told = brief(error)
    else:
        return {}
    if len(points) == 1:
        return {points[0].id: told}
    middle = len(points) // 2
    found = convicted(points[:middle], check) | convicted(points[middle:], check)
    return found or {point.id: f"only together with others: {told}" for point in points}


def brief(error: BaseException) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


def judged(
    points: Sequence[InjectionPoint], wrong: Mapping[str, str], idle: Mapping[str, str], how: Callable[[Any], str]
) -> list[Verdict]:
    """Verdicts: false where something is wrong, not reached where it is idle, proven elsewhere."""
    made: list[Verdict] = []
    for point in points:
        if point.id in wrong:
            made.append(Verdict(point, "false", wrong[point.id]))
        elif point.id in idle:
            made.append(Verdict(point, "not reached", idle[point.id]))
        else:
            made.append(Verdict(point, "proven", how(point)))
    return made
