from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from adapterkit.errors import DataError
from adapterkit.training.pictures import identity
from adapterkit.training.pictures import store as store_module
from adapterkit.training.pictures.identity import identity_of
from adapterkit.training.pictures.store import FolderStore, MemoryStore, key_of, make

ENTRY = {"mean": torch.randn(4, 3, 2), "mask": torch.arange(6, dtype=torch.uint8), "half": torch.ones(2).bfloat16()}


def entries(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def same(one: object, other: object) -> bool:
    assert isinstance(one, dict)
    assert isinstance(other, dict)
    return one.keys() == other.keys() and all(
        one[key].dtype == other[key].dtype and torch.equal(one[key], other[key]) for key in one
    )


def test_what_is_kept_in_a_folder_comes_back_bit_for_bit(tmp_path: Path):
    FolderStore(tmp_path / "cache").put(key_of("a", 1), ENTRY)
    again = FolderStore(tmp_path / "cache")
    assert same(again.get(key_of("a", 1)), ENTRY)
    assert again.get(key_of("a", 2)) is None
    assert again.damaged == []
    memory = MemoryStore()
    memory.put("a", ENTRY)
    assert memory.get("a") is ENTRY
    assert memory.get("b") is None


def test_memory_may_keep_what_was_used_last():
    memory = MemoryStore(most=2)
    for key in "ab":
        memory.put(key, ENTRY)
    memory.get("a")
    memory.put("c", ENTRY)
    assert [memory.get(key) is not None for key in "abc"] == [True, False, True]
    memory.put("a", {"one": torch.zeros(5)})
    assert memory.held == 4 * 5 + sum(tensor.nbytes for tensor in ENTRY.values())


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "other"])
def test_a_damaged_entry_is_told_and_can_be_made_anew(tmp_path: Path, damage: str):
    store = FolderStore(tmp_path)
    for key in ("ab", "cd"):
        store.put(key, ENTRY)
    path = entries(tmp_path)[0]
    data = path.read_bytes()
    flipped = data[:-3] + bytes([data[-3] ^ 1]) + data[-2:]
    path.write_bytes({"flip": flipped, "cut": data[:-1], "empty": b"", "other": b"x" * 400}[damage])
    assert store.get("ab") is None
    assert store.damaged == [path]
    store.damaged.clear()
    told: list[str] = []
    made: list[int] = []

    def make_one(number: int) -> dict[str, torch.Tensor]:
        made.append(number)
        return ENTRY

    make(store, "latents", ["cd", "ab", "ab"], make_one, told.append)
    assert len(made) == 1
    assert told == ["cache: 1 of 2 latents are there already", f"cache: {path} is damaged, and is made anew"]
    assert same(store.get("ab"), ENTRY)


def test_what_takes_long_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch):
    clock = iter(range(0, 1000, 6))
    monkeypatch.setattr(store_module, "monotonic", lambda: next(clock))
    told: list[str] = []
    make(MemoryStore(), "latents", list("abcde"), lambda number: ENTRY, told.append)
    assert told == ["latents: 2 of 5 are ready", "latents: 4 of 5 are ready"]


def test_a_write_that_fails_leaves_nothing_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store = FolderStore(tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(DataError, match=r"cannot be written \(No space left on device\); set options\.cache"):
        store.put("ab", ENTRY)
    assert entries(tmp_path) == []
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="cannot be written"):
        FolderStore(tmp_path / "file").put("ab", ENTRY)


@pytest.mark.parametrize(("rank", "order"), [(0, "abcde"), (1, "bcdea"), (2, "deabc")])
def test_processes_make_their_own_share_first_and_nothing_twice(monkeypatch: pytest.MonkeyPatch, rank: int, order: str):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    store, made = MemoryStore(), []

    def make_one(number: int) -> dict[str, torch.Tensor]:
        made.append("abcde"[number])
        if len(made) == 2:  # another process is as fast
            store.put(order[2], ENTRY)
        return ENTRY

    make(store, "latents", list("abcde"), make_one, print)
    assert "".join(made) == order[:2] + order[3:]


def model(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def test_a_model_is_known_by_its_weights(monkeypatch: pytest.MonkeyPatch):
    known = identity_of(model())
    assert identity_of(model()) == known
    assert identity_of(model(1)) != known
    assert identity_of(model().bfloat16()) != known
    assert identity_of(nn.Sequential(*model())) == known
    changed = [model() for _ in range(4)]
    with torch.no_grad():
        changed[0][0].weight[1, 2] = torch.nextafter(changed[0][0].weight[1, 2], torch.tensor(9.0))
        changed[1][0].weight.copy_(changed[1][0].weight.flip(0))
        changed[2][1].running_mean += 1
        changed[3].config = {"scaling_factor": 0.2, "_name_or_path": "here"}
    assert len({known, *map(identity_of, changed)}) == 5
    moved = model()
    moved.config = {"scaling_factor": 0.2, "_name_or_path": "there"}
    assert identity_of(moved) == identity_of(changed[3])
    monkeypatch.setattr(identity, "_AT_ONCE", 5)
    swapped = model()
    with torch.no_grad():
        weight = swapped[0].weight.view(-1)
        weight[:10] = torch.cat([weight[5:10], weight[:5]])
    assert identity_of(swapped) != identity_of(model())
