"""plugins/FORMATS.md says what the code does."""

from __future__ import annotations

import pytest

import adapterkit as ak
from tests import format_table


def test_every_format_and_type_is_in_the_table() -> None:
    text = format_table.PATH.read_text(encoding="utf-8")
    specs = ak.get_plugin_manager().formats()
    own = {name for name, spec in specs.items() if spec.origin is not None and spec.origin.distribution == "adapterkit"}
    assert {*format_table.FORMATS} == own
    assert not [name for name in format_table.types() if f"| `{name}` |" not in text]


@pytest.mark.slow
def test_the_table_is_up_to_date() -> None:
    written = format_table.PATH.read_text(encoding="utf-8").splitlines()
    made = format_table.table().splitlines()
    changed = [line for line in made if line not in written]
    assert not changed, "run: python -m tests.format_table"
    assert written == made
