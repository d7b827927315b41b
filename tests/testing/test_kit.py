"""The kit without pytest: its reports, what they show, and what moves an adapter away from its start."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import adapterkit as ak
from adapterkit.testing import check_adapter
from adapterkit.testing.case import Case
from adapterkit.testing.effects import EffectChecks
from adapterkit.testing.models import EXAMPLES
from adapterkit.testing.placements import chosen, placements, points_of
from adapterkit.testing.reports import CheckReport, run_checks
from adapterkit.testing.states import StateChecks
from adapterkit.testing.subject import subjects
from tests.testing.shift import Good, Shift, broken


class EffectAtStart(Good):
    def delta(self, x: Tensor) -> Tensor:
        return super().delta(x) + 1


class Unpicklable(Good):
    def __init__(self, point: ak.InjectionPoint) -> None:
        super().__init__(point)
        self.function = lambda y: y


class Scaled(Good):
    factor = 1.0

    def delta(self, x: Tensor) -> Tensor:
        return super().delta(x) * self.factor


def run(checks: type[Case], config: ak.AdapterConfig) -> CheckReport:
    """Some of the checks on a type."""
    return run_checks("Broken", type("Checks", (checks,), {"config": config})())


@pytest.mark.slow
def test_a_right_type_passes() -> None:
    report = check_adapter(Shift())
    assert report, str(report)
    assert "failed" not in str(report)
    assert str(report).splitlines()[-1].startswith("Shift: ")
    assert report.to_dict()["ok"] is True


def test_a_report_shows_failures_and_errors() -> None:
    report = run(EffectChecks, broken(module=EffectAtStart))
    assert not report
    assert {"merged_equals_unmerged", "zero_effect"} <= {result.name for result in report.failures}
    assert "failed  zero_effect" in str(report)
    report = run(StateChecks, broken(module=Unpicklable))
    assert "error" in {result.status for result in report.failures}
    with pytest.raises(ak.errors.ConfigError, match="call check_adapter with one"):
        check_adapter("fuse")
    with pytest.raises(ak.errors.UnknownNameError, match="Did you mean 'lora'"):
        check_adapter("lorra")


def test_an_error_in_a_check_is_reported_and_threads_are_given_back() -> None:
    threads = torch.get_num_threads()
    seen: list[int] = []

    def fail(case: Any) -> None:
        seen.append(torch.get_num_threads())
        raise ZeroDivisionError

    report = run_checks("nothing", type("Case", (), {"test_it": fail})())
    assert not report
    assert (seen, torch.get_num_threads()) == ([1], threads)


@pytest.mark.parametrize("factor", [1e-4, 1.0, 1e5])
def test_moving_an_adapter_changes_an_output_by_about_its_size(factor: float) -> None:
    for subject in subjects(broken(module=type("Scaled", (Scaled,), {"factor": factor}))):
        change, base = (subject.bits() - subject.bits(None)).abs().max(), subject.bits(None).abs().max()
        assert 0.01 <= change / base <= 1, subject.label


@pytest.mark.parametrize("targets", ["attn.q", "mlp.up conv", "*"])
def test_a_types_own_points_are_among_every_point(targets: str) -> None:
    """So what holds at every point holds at its own."""
    config = ak.LoRA(rank=2, targets=targets)
    for example in EXAMPLES:
        places = [{p.id for p in chosen(one.config, points_of(example))} for one in placements(config, example)]
        assert all(own <= places[-1] for own in places)
        assert len(places) == (2 if places[0] < places[-1] else 1)


def test_what_moves_a_type_is_found_once_whatever_is_checked_first() -> None:
    first, other = Shift(), Shift()
    moved = [[subject.move for subject in subjects(first, dtype)] for dtype in (torch.bfloat16, torch.float64)]
    assert moved[0] == moved[1] == [subject.move for subject in subjects(other)]


def test_a_type_without_an_effect_can_be_moved_too() -> None:
    for subject in subjects(broken(module=type("Idle", (Scaled,), {"factor": 0.0}))):
        assert subject.move > 0
