"""Pickles of tensors: by permission, and never more than tensors."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

import adapterkit as ak
from adapterkit.errors import CheckpointError, CorruptFileError, UnsupportedFileError
from adapterkit.formats.source import Source

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3, dtype=torch.bfloat16)}


class Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.marker),))


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_by_permission(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "x.bin"
    nested = {"state": TENSORS, "step": 3, "name": "me", "none": None}
    torch.save(nested, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UnsupportedFileError, match="pickle"):
        assert Source.of(path).entries
    source = Source.of(path, allow_pickle=True)
    assert {name: entry.shape for name, entry in source.entries.items()} == {"state.a": (2, 3), "state.b": (3,)}
    assert source.metadata == {"step": "3", "name": "me", "none": "null"}
    found = source.tensors()
    assert torch.equal(found["state.a"], TENSORS["a"])
    assert list(source.tensors(["state.b"])) == ["state.b"]
    found["state.a"].zero_()
    assert torch.equal(source.tensors()["state.a"], TENSORS["a"])


@pytest.mark.parametrize("zipped", [True, False])
def test_code_is_never_run(tmp_path: Path, zipped: bool) -> None:
    marker, path = tmp_path / "executed", tmp_path / "x.bin"
    torch.save({"a": Payload(marker)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UnsupportedFileError, match="no pickle of tensors alone"):
        assert Source.of(path, allow_pickle=True).entries
    assert not marker.exists()


def test_a_tensor_that_says_that_it_is_larger_than_its_memory(tmp_path: Path) -> None:
    for size in (500, 1 << 40):  # of 4 bytes each; the file has about 1200
        torch.save({"a": torch.zeros(1).expand(size)}, tmp_path / "x.bin")
        with pytest.raises(CorruptFileError, match="more than the file"):
            assert Source.of(tmp_path / "x.bin", allow_pickle=True).entries


def test_the_permitted_depth(tmp_path: Path) -> None:
    value: Any = torch.ones(1)
    for depth in range(1, 10):
        value = {"a": value}
        torch.save(value, tmp_path / "x.bin")
        source = Source.of(tmp_path / "x.bin", allow_pickle=True)
        if depth == 9:
            with pytest.raises(UnsupportedFileError, match="nested deeper than 8"):
                assert source.entries
        else:
            assert list(source.entries) == [".".join("a" * depth)]


def test_an_archive_that_unpacks_to_more(tmp_path: Path) -> None:
    path, packed = tmp_path / "x.bin", tmp_path / "packed.bin"
    torch.save({"a": torch.zeros(1 << 20)}, path)
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    with pytest.raises(UnsupportedFileError, match="unpacks to"):
        assert Source.of(packed, allow_pickle=True).entries


def test_of_what_torch_says_the_first_line_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise RuntimeError("x" * 300 + "\nmore")

    torch.save(TENSORS, tmp_path / "x.bin")
    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(UnsupportedFileError) as caught:
        assert Source.of(tmp_path / "x.bin", allow_pickle=True).entries
    assert f"damaged: {'x' * 200}" in str(caught.value)
    assert "x" * 201 not in str(caught.value)


@pytest.mark.parametrize("zipped", [True, False])
def test_damage_is_a_typed_error(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "x.bin"
    torch.save(TENSORS, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    for length in {5, 64, len(whole) // 2, len(whole) - 1}:
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            assert Source.of(path, allow_pickle=True).entries
    for place in range(0, len(whole), max(len(whole) // 100, 1)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x5A]) + whole[place + 1 :])
        try:
            Source.of(path, allow_pickle=True).tensors()
        except CheckpointError:
            continue


@pytest.mark.parametrize("value", [[torch.ones(1)], {"a": {"b": [1]}}, torch.ones(2).to_sparse()])
def test_what_is_no_dict_of_tensors_is_refused(tmp_path: Path, value: Any) -> None:
    torch.save(value, tmp_path / "x.bin")
    with pytest.raises(UnsupportedFileError):
        assert Source.of(tmp_path / "x.bin", allow_pickle=True).entries


def test_permission_comes_through_the_handle(tmp_path: Path, adapters: ak.Adapters) -> None:
    torch.save(TENSORS, tmp_path / "x.bin")
    with pytest.raises(UnsupportedFileError, match="which can run code"):
        adapters.load(tmp_path / "x.bin", "new")
    with pytest.raises(UnsupportedFileError, match="of no format that is installed"):
        adapters.load(tmp_path / "x.bin", "new", allow_pickle=True)
