"""The house that CONTRIBUTING.md shows is the one that stands."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text().partition("## The house")[2].partition("## Writing")[0]
PACKAGE = ROOT / "adapterkit"


def test_every_file_that_is_named_is_there() -> None:
    named = re.findall(r"`([\w/]+\.py)`", TEXT)
    assert len(named) >= 10
    assert [name for name in named if not (PACKAGE / name).is_file()] == []


def test_every_room_has_a_floor() -> None:
    rooms = {
        name.rstrip("/")
        for row in re.findall(r"^\| \d+ \| (.*?) \|", TEXT, re.M)
        for name in re.findall(r"`([\w/]+)`", row)
    }
    there = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()} - {"contract"}
    there |= {path.stem for path in PACKAGE.glob("*.py") if not path.stem.startswith("__")}
    there |= {f"contract/{path.stem}" for path in (PACKAGE / "contract").glob("[!_]*.py")}  # on several floors
    assert rooms == there
