from __future__ import annotations

import sys
from typing import Any

import click
import pytest

from adapterkit.cli.tables import show

ROWS = [
    {"name": "adamw_of_a_long_name", "kinds": "weight", "summary": "decoupled weight decay"},
    {"name": "sgd", "kinds": "", "summary": "momentum"},
]
COLUMNS = ("name", "kinds", "summary")


def shown(columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    rows: Any = ROWS
    show(rows, COLUMNS, as_json=False)
    return [line.rstrip() for line in click.unstyle(capsys.readouterr().out).splitlines()]


def test_a_wide_terminal_has_a_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    assert shown(80, capsys, monkeypatch) == [
        "name                   kinds    summary",
        "adamw_of_a_long_name   weight   decoupled weight decay",
        "sgd                             momentum",
    ]


def test_words_wrap_where_columns_are_narrow(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    assert shown(45, capsys, monkeypatch)[1:3] == [
        "adamw_of_a_long_name   weight   decoupled",
        "                                weight decay",
    ]


def test_no_word_is_broken_where_the_columns_do_not_fit(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    assert shown(35, capsys, monkeypatch) == [
        "adamw_of_a_long_name",
        "  kinds: weight",
        "  summary: decoupled weight decay",
        "sgd",
        "  summary: momentum",
    ]
