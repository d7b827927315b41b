"""Every architecture of the installed libraries: none crashes, nothing that is said is false, and enough is offered."""

from __future__ import annotations

import pytest

from tests.architectures import catalogue, rows, sweep, table

_LIMIT = 240.0


@pytest.mark.parametrize("line", catalogue.LINES)
def test_the_page_names_every_architecture(line: str) -> None:
    """The next release of a library shows up here: run `python -m tests.architectures.sweep`, then `.table`."""
    named, there = set(table.written()[line]), set(catalogue.names(line))
    assert not there - named, f"new, and not in {table.PATH.name}: {sorted(there - named)}"
    assert not named - there, f"gone: {sorted(named - there)}"


@pytest.fixture(scope="module", params=catalogue.LINES)
def line(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def found(line: str) -> list[rows.Row]:
    """The rows of a line: minutes to an hour, where no sweep has kept them."""
    return [sweep.row(line, name, _LIMIT) for name in catalogue.names(line)]


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_none_crashes(found: list[rows.Row]) -> None:
    assert not {one.name: one.crashed for one in found if one.crashed}


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_nothing_that_is_said_is_false(found: list[rows.Row]) -> None:
    assert not {one.name: one.wrong for one in found if one.wrong}


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_enough_is_proven(line: str, found: list[rows.Row]) -> None:
    having = [one for one in found if one.attention]
    shares = {claim: table.share(having, claim) for claim in rows.CLAIMS}
    bars = dict(zip(rows.CLAIMS, sweep.BARS[line], strict=True))
    assert not {claim: (shares[claim], bar) for claim, bar in bars.items() if shares[claim] < bar}
