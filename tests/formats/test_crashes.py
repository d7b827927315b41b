"""kill -9 at any moment of a save leaves the old file or the new one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import adapterkit


@pytest.mark.parametrize("kills", [30, pytest.param(1000, marks=[pytest.mark.slow, pytest.mark.timeout(600)])])
def test_killed_saves(tmp_path: Path, kills: int) -> None:
    # A process of its own, because a fork of one that has used torch's threads may hang.
    harness = Path(__file__).with_name("crash_harness.py")
    environment = {**os.environ, "PYTHONPATH": str(Path(adapterkit.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(harness), str(tmp_path), str(kills)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    print(report)
    assert (report["kills"], report["corrupt"], report["backwards"]) == (kills, 0, 0)
    assert report["most_left"] <= 1
    assert report["left_after_a_save"] == 0
    # The kills did fall into saves, and saves did get through.
    assert report["interrupted"] > kills / 10
    assert report["versions"] > kills / 10
