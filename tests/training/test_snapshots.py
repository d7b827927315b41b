from __future__ import annotations

import errno
import json
import logging
import math
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from adapterkit.errors import CheckpointError, CorruptFileError, TrainingError
from adapterkit.training.snapshots import ADAPTER, Snapshots, read_tensors, write_tensors


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
    "state of another step": lambda folder: edit(folder / "state.json", step=3),
    "state of another seed": lambda folder: edit(folder / "state.json", values={"seed": 2, "scaler": None}),
    "state of a step that is no number": lambda folder: edit(folder / "state.json", step=True),
    "state nested deeply": lambda folder: (folder / "state.json").write_text("[" * 200_000),
    "state with NaN": lambda folder: edit(folder / "state.json", values={"seed": math.nan}),
    "state twice": lambda folder: twice(folder / "state.json"),
    "state is a pipe": lambda folder: ((folder / "state.json").unlink(), os.mkfifo(folder / "state.json")),
    "optimizer is a pipe": lambda folder: pipe(folder / "optimizer.safetensors"),
    "adapter is a link out of the folder": lambda folder: link(folder / ADAPTER),
    "state is that of another folder": lambda folder: borrow(folder),
    "state is a folder": lambda folder: ((folder / "state.json").unlink(), (folder / "state.json").mkdir()),
}


def twice(path: Path) -> None:
    path.write_text(path.read_text().replace('"version": 2', '"version": 2, "version": 2'))


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def link(path: Path) -> None:
    path.rename(path.parents[2] / "elsewhere")
    path.symlink_to(path.parents[2] / "elsewhere")


def borrow(folder: Path) -> None:
    """The checkpoint of another step, whole, under this step's name."""
    other = made(folder.parent / "other", 7).path(7)
    for file in other.iterdir():
        file.replace(folder / file.name)
    shutil.rmtree(folder.parent / "other")


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_gives_way_to_the_one_before_with_a_warning(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
):
    snapshots = made(tmp_path, 1, 2)
    DAMAGES[damage](snapshots.path(2))
    with pytest.raises(CheckpointError) as caught:
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


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def adapter_on_a_full_disk(path: Path) -> None:
    raise CheckpointError("cannot be written: No space left on device", path)


@pytest.mark.parametrize("fails", ["adapter", "write_bytes", "write_text", "mkdir", "rename"])
def test_on_a_full_disk_the_earlier_ones_stay_and_the_way_on_is_told(
    tmp_path: Path, fails: str, monkeypatch: pytest.MonkeyPatch
):
    snapshots = made(tmp_path, 1)
    if fails != "adapter":
        monkeypatch.setattr(Path, fails, full)
    tensors = {"optimizer": {"a": torch.zeros(3)}}
    save_adapter = adapter_on_a_full_disk if fails == "adapter" else Path.touch
    with pytest.raises(TrainingError, match=r"No space left on device\. .* with --resume") as caught:
        snapshots.write(2, {}, tensors, save_adapter)
    monkeypatch.undo()
    assert "000002" in str(caught.value)
    assert [path.name for path in snapshots.folder.iterdir()] == ["step-000001"]
    assert snapshots.newest() is not None


def test_a_state_of_an_earlier_release_is_told_by_its_version(tmp_path: Path):
    snapshots = made(tmp_path, 1)
    edit(snapshots.path(1) / "state.json", version=1)
    with pytest.raises(CorruptFileError, match=r"version 1 is not one that this release reads \(2\)"):
        snapshots.read(1)


def test_a_file_of_tensors_is_for_those_who_may_read_the_old_one(tmp_path: Path):
    file, mask = tmp_path / "head.safetensors", os.umask(0o027)
    try:
        write_tensors(file, {"a": torch.ones(2)})
        assert stat.S_IMODE(file.stat().st_mode) == 0o640
        file.chmod(0o600)
        write_tensors(file, {"a": torch.zeros(2)})
    finally:
        os.umask(mask)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert torch.equal(read_tensors(file)["a"], torch.zeros(2))
