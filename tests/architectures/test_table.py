"""What the page says of rows: which are old, and which prefixes are proven in the limits alone."""

from __future__ import annotations

import pytest

from tests.architectures import commits, rows, sweep, table

PROVEN: dict[str, str] = dict.fromkeys(rows.CLAIMS, "proven")


def row(limited: int, commit: str = "") -> rows.Row:
    counts = {"attention": {"proven": 2, "false": 0, "not reached": 0}}
    return rows.Row(
        "masked", "bert", "Bert", attention=True, counts=counts, claims=PROVEN, limited=limited, commit=commit
    )


@pytest.mark.parametrize(("limited", "said"), [(0, "proven"), (1, "proven"), (2, "in limits")])
def test_prefixes_that_no_equation_proves_are_told_apart(limited: int, said: str) -> None:
    assert f"| bert | Bert | proven | {said} | proven |" in table.table({"masked": [row(limited)]})


def test_rows_of_another_state_of_the_maps_are_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commits, "is_old", lambda commit: commit != "new")
    page = table.table({"masked": [row(0, "before"), row(0, "new")]})
    told, other = (line for line in page.splitlines() if line.startswith("| bert"))
    assert told.endswith("numeric: 2 proven (old: at before) |")
    assert other.endswith("numeric: 2 proven |")
    assert "| transformers, masked LMs | 2 | 2 | 1 | 2 |" in page


@pytest.mark.parametrize("commit", ["", "0123456789+", "not-a-commit"])
def test_what_cannot_be_compared_is_old(commit: str) -> None:
    assert commits.is_old(commit)


def test_a_row_keeps_its_commit(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "FOLDER", tmp_path)
    row(1, "abc").write()
    assert rows.kept("masked", "bert") == row(1, "abc")


def test_a_proof_that_does_not_end_leaves_what_the_map_offers(
    tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "FOLDER", tmp_path)

    def endless(model: object) -> object:
        raise SystemExit(3)

    monkeypatch.setattr(rows, "specimen", endless)
    found = sweep.row("image_classification", "levit", 120.0)
    assert found.unproven == "the process ended with 3"
    assert found.claims["attention"] == "listed"
    assert found.attention
