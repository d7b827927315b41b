"""Every example runs as a newcomer would run it, without a warning from our side, and what it claims holds."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


def run(script: str, tmp_path: Path) -> str:
    """What the script prints; it runs in a folder of its own, into which it writes nothing."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / script)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr, done.stderr
    assert not list(tmp_path.iterdir())
    return done.stdout


def rows(printed: str) -> dict[str, list[str]]:
    """First cell -> the other cells of a table's rows."""
    cells = [[cell.strip() for cell in line.strip("│ ").split("│")] for line in printed.splitlines() if "│" in line]
    return {row[0]: row[1:] for row in cells}


def test_new_adapter(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    pytest.importorskip("diffusers")
    printed = run("new_adapter.py", tmp_path)
    lines = re.search(r"in (\d+) lines", printed)
    assert lines is not None
    assert int(lines[1]) <= 40
    table = rows(printed)
    assert set(table) == {"Llama", "timm ViT", "UNet"}
    for _, before, after, error, _ in table.values():
        assert float(after) < float(before)
        assert float(error) < 1e-5


def test_vision_digits(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    pytest.importorskip("sklearn")
    accuracy = {name: float(row[0].rstrip("%")) for name, row in rows(run("vision_digits.py", tmp_path)).items()}
    assert set(accuracy) == {"linear probe", "LoRA", "Bottleneck", "Prefix", "full fine-tuning"}
    assert accuracy["LoRA"] > accuracy["linear probe"] + 10
    assert accuracy["Bottleneck"] > accuracy["linear probe"] + 10


def test_language_domains(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    pytest.importorskip("sklearn")
    table = rows(run("language_domains.py", tmp_path))
    perplexity = {name: [float(cell) for cell in row[2:4]] for name, row in table.items()}
    assert set(perplexity) == {"base", "LoRA", "Prefix"}
    assert perplexity["LoRA"][1] < 0.7 * perplexity["base"][1]
    assert perplexity["Prefix"][1] < perplexity["base"][1]
