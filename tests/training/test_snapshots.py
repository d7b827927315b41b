from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from adapterkit.errors import CorruptFileError
from adapterkit.training.snapshots import ADAPTER, Snapshots


def save(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def made(folder: Path, *steps: int, keep: int = 9) -> Snapshots:
    snapshots = Snapshots(folder / "checkpoints", keep)
    for step in steps:
        tensors = {"optimizer": {"a|m": torch.full((3,), float(step)), "a|step": torch.tensor(float(step))}}
        snapshots.write(step, {"seed": 1, "scaler": None}, tensors, save(f"adapter {step}".encode()))
    return snapshots


def test_what_is_read_is_what_was_written(tmp_path: Path):
    snapshot = made(tmp_path, 3).newest()
    assert snapshot is not None
    assert (snapshot.step, snapshot.values) == (3, {"seed": 1, "scaler": None})
    assert torch.equal(snapshot.tensors["optimizer"]["a|m"], torch.full((3,), 3.0))
    assert snapshot.tensors["optimizer"]["a|step"].shape == ()
    assert (snapshot.folder / ADAPTER).read_bytes() == b"adapter 3"


def test_only_the_newest_are_kept_and_none_is_none(tmp_path: Path):
    assert Snapshots(tmp_path / "absent", 2).newest() is None
    assert made(tmp_path, 5, 10, 15, 1000000, keep=2).steps() == [15, 1000000]


def test_stale_temporary_folders_are_swept(tmp_path: Path):
    snapshots = made(tmp_path, 1)
    (snapshots.folder / ".tmp-000002-77").mkdir()
    made(tmp_path, 2)
    assert sorted(path.name for path in snapshots.folder.iterdir()) == ["step-000001", "step-000002"]


def test_a_step_can_be_written_again(tmp_path: Path):
    made(tmp_path, 4)
    assert made(tmp_path, 4).steps() == [4]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "adapter flipped": lambda folder: flip(folder / ADAPTER),
    "adapter absent": lambda folder: (folder / ADAPTER).unlink(),
    "optimizer flipped": lambda folder: flip(folder / "optimizer.safetensors"),
    "optimizer cut short": lambda folder: (folder / "optimizer.safetensors").write_bytes(b"12"),
    "state absent": lambda folder: (folder / "state.json").unlink(),
    "state no JSON": lambda folder: (folder / "state.json").write_text("{"),
    "state no object": lambda folder: (folder / "state.json").write_text("[]"),
    "state of another version": lambda folder: edit(folder / "state.json", version=99),
    "state leads out of the folder": lambda folder: edit(folder / "state.json", files={"../x": "", ADAPTER: ""}),
    "state without adapter": lambda folder: edit(folder / "state.json", files={}),
    "state is a folder": lambda folder: ((folder / "state.json").unlink(), (folder / "state.json").mkdir()),
}


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_gives_way_to_the_one_before_with_a_warning(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
):
    snapshots = made(tmp_path, 1, 2)
    DAMAGES[damage](snapshots.path(2))
    with pytest.raises(CorruptFileError) as caught:
        snapshots.read(2)
    assert "step-000002" in str(caught.value)
    with caplog.at_level(logging.WARNING):
        newest = snapshots.newest()
    assert newest is not None
    assert newest.step == 1
    assert "checkpoint skipped" in caplog.text
    DAMAGES[damage](snapshots.path(1))
    with pytest.raises(CorruptFileError, match=r"no checkpoint is whole.*--overwrite"):
        snapshots.newest()
