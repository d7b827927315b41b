"""Running checks without pytest, and what came of it."""

from __future__ import annotations

import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal
from unittest import SkipTest

import torch


@dataclass(frozen=True)
class CheckResult:
    """What came of one check.

    Attributes:
        name: Of the check.
        status: `failed` where it does not hold, `error` where it could not be finished.
        detail: Why it failed or was skipped.
        equation: What it checks.
        seconds: What it took.
    """

    name: str
    status: Literal["passed", "failed", "error", "skipped"]
    detail: str
    equation: str
    seconds: float


@dataclass(frozen=True)
class CheckReport:
    """What came of all checks. Prints as a table; true where none failed."""

    subject: str
    results: tuple[CheckResult, ...]

    @property
    def failures(self) -> tuple[CheckResult, ...]:
        """Those that failed or could not be finished."""
        return tuple(result for result in self.results if result.status in ("failed", "error"))

    def __bool__(self) -> bool:
        return not self.failures

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"subject": self.subject, "ok": bool(self), "checks": [vars(result) for result in self.results]}

    def __str__(self) -> str:
        width = max((len(result.name) for result in self.results), default=0)
        lines = [
            f"{result.status:<8}{result.name:<{width}}  {result.detail or result.equation}" for result in self.results
        ]
        counts = {s: sum(r.status == s for r in self.results) for s in ("passed", "skipped", "failed", "error")}
        told = ", ".join(f"{count} {status}" for status, count in counts.items() if count or status == "passed")
        return "\n".join([*lines, f"{self.subject}: {told}, in {sum(r.seconds for r in self.results):.1f} s"])


def run_checks(subject: str, case: object) -> CheckReport:
    """Calls every method of a case whose name begins with `test_`, on one thread of torch: the models are tiny."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return CheckReport(subject, tuple(_results(case)))
    finally:
        torch.set_num_threads(threads)


def _results(case: object) -> Iterator[CheckResult]:
    for name in sorted(name for name in dir(case) if name.startswith("test_")):
        check = getattr(case, name)
        equation = " ".join((check.__doc__ or "").split())
        began = time.perf_counter()
        status, detail = _outcome(check)
        yield CheckResult(name.removeprefix("test_"), status, detail, equation, round(time.perf_counter() - began, 3))


def _outcome(check: Any) -> tuple[Literal["passed", "failed", "error", "skipped"], str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check()
    except SkipTest as reason:
        return "skipped", str(reason)
    except AssertionError as failure:
        return "failed", str(failure) or "an assertion without a message: " + traceback.format_exc().splitlines()[-3]
    except Exception as error:  # noqa: BLE001  a type under test may raise anything, and the other checks go on
        where = traceback.extract_tb(error.__traceback__)[-1]
        return "error", f"{type(error).__name__}: {error} ({where.filename.rsplit('/', 1)[-1]}:{where.lineno})"
    return "passed", ""
