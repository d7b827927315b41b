"""What `make` says before it installs: what CUDA builds cost where nothing needs them, and of a disk without room."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / ".ci/room.py"


@pytest.fixture(scope="module")
def room() -> Any:
    spec = importlib.util.spec_from_file_location("room", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def plan(folder: Path, **sizes: int) -> dict[str, Any]:
    """What pip would report: wheels of these sizes, by `file:` addresses."""
    items = []
    for name, size in sizes.items():
        wheel = folder / f"{name}.whl"
        with wheel.open("wb") as file:
            file.truncate(size)  # takes no disk
        items.append({"metadata": {"name": name.replace("_", "-")}, "download_info": {"url": wheel.as_uri()}})
    return {"install": items}


def test_builds_for_cpus_are_installed_without_a_word(room: Any, tmp_path: Path):
    assert room.advice(plan(tmp_path, torch=200 << 20, numpy=1), 4 * room.GIB, "test", gpu=False) == (True, "")


def test_cuda_builds_without_a_gpu_are_told_with_their_cost(room: Any, tmp_path: Path):
    found = plan(tmp_path, torch=1 << 30, nvidia_cublas=1 << 30, triton=1 << 29, numpy=1 << 20)
    fits, said = room.advice(found, 20 * room.GIB, "demo", gpu=False)
    assert fits
    assert "about 2.5 GiB are downloaded and 10.5 GiB of disk used" in said
    assert "make demo TORCH_INDEX=<url" in said
    assert room.advice(found, 20 * room.GIB, "demo", gpu=True) == (True, "")


def test_a_disk_without_room_stops_it(room: Any, tmp_path: Path):
    found = plan(tmp_path, torch=1 << 30, nvidia_cublas=1 << 30)
    for gpu in (True, False):
        fits, said = room.advice(found, 8 * room.GIB, "test", gpu=gpu)
        assert not fits
        assert "needs about 9.0 GiB of disk, and 8.0 GiB are free" in said
        assert "make test TORCH_INDEX=" in said
        assert "make test ANY_DISK=1" in said
    fits, said = room.advice(plan(tmp_path, torch=1 << 20), 1 * room.GIB, "test", gpu=False)
    assert (fits, "TORCH_INDEX" in said) == (False, False)


def test_an_index_that_says_no_length_is_guessed(room: Any):
    item = {"metadata": {"name": "nvidia-nccl"}, "download_info": {"url": "file:///there/is/none"}}
    assert room.size_of(item) == room.OTHER


def test_the_script_ends_as_make_expects(tmp_path: Path):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan(tmp_path, numpy=1)))
    done = subprocess.run([sys.executable, SCRIPT, path, tmp_path, "test"], capture_output=True, text=True, check=False)
    assert done.returncode == (1 if "are free" in done.stderr else 0)
