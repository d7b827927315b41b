"""What formats read: files, folders, tensors in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import adapterkit as ak
from adapterkit.errors import (
    CheckpointError,
    ConfigError,
    CorruptFileError,
    InvalidHeaderError,
    InvalidNameError,
    NotRegularFileError,
)
from adapterkit.formats import container
from adapterkit.formats.source import Source

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3, dtype=torch.bfloat16), "c": torch.tensor(5)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "my.adapter").mkdir()
    save_file(TENSORS, tmp_path / "my.adapter" / "weights.safetensors", {"who": "me"})
    (tmp_path / "my.adapter" / "config.json").write_text('{"rank": 2}')
    (tmp_path / "my.adapter" / ".hidden").touch()
    (tmp_path / "secret.json").write_text("{}")
    return tmp_path / "my.adapter"


def test_a_file(folder: Path) -> None:
    source = Source.of(folder / "weights.safetensors")
    assert {name: (entry.dtype, entry.shape) for name, entry in source.entries.items()} == {
        name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()
    }
    assert (source.metadata, source.name, source.is_folder) == ({"who": "me"}, "weights", False)
    assert source.head == (folder / "weights.safetensors").read_bytes()[:64]
    found = source.tensors()
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    assert list(source.tensors(["b", "none"])) == ["b"]
    assert source.json("config.json") == {"rank": 2}


def test_a_folder(folder: Path) -> None:
    source = Source.of(folder)
    assert (source.name, source.is_folder, source.files) == ("my.adapter", True, ("config.json", "weights.safetensors"))
    assert source.json("config.json") == {"rank": 2}
    assert list(source.file("weights.safetensors").entries) == list(Source.of(folder / "weights.safetensors").entries)
    for ask in ("entries", "metadata", "head"):
        if ask != "head":
            with pytest.raises(NotRegularFileError, match="is a folder"):
                getattr(source, ask)
    assert source.head == b""
    with pytest.raises(NotRegularFileError, match="is a folder"):
        source.tensors()


@pytest.mark.parametrize("name", ["../secret.json", "..", ".", "", "/etc/passwd", "a\0b", "..\\secret.json"])
def test_a_folder_hands_out_nothing_from_elsewhere(folder: Path, name: str) -> None:
    for source in (Source.of(folder), Source.of(folder / "config.json")):
        with pytest.raises(CheckpointError, match="is no file of its folder"):
            source.file(name)
    (folder / "link.json").symlink_to(folder.parent / "secret.json")
    with pytest.raises(NotRegularFileError, match="out of its folder"):
        Source.of(folder).json("link.json")


def test_a_missing_file_of_a_folder_has_near_matches(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no such file. Did you mean 'config.json'"):
        Source.of(folder).json("confg.json")


@pytest.mark.parametrize("text", ["", "{", '{"a": 1, "a": 2}', "[NaN]", "\xff"])
def test_json_is_read_strictly(folder: Path, text: str) -> None:
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InvalidHeaderError) as caught:
        Source.of(folder).json("config.json")
    assert caught.value.path == folder / "config.json"


def test_a_json_file_without_end_is_not_read(folder: Path) -> None:
    with (folder / "config.json").open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(InvalidHeaderError, match="the limit is"):
        Source.of(folder).json("config.json")


def test_tensors_in_memory_are_neither_changed_nor_kept() -> None:
    given = {name: tensor.clone() for name, tensor in TENSORS.items()}
    source = Source.of(given, {"who": "me"})
    assert (source.metadata, source.name, source.path, source.files) == ({"who": "me"}, "", None, ())
    assert source.entries["a"].shape == (2, 3)
    for tensor in source.tensors().values():
        tensor.fill_(7)
    given["d"] = torch.zeros(1)
    assert list(source.entries) == ["a", "b", "c"]
    assert all(torch.equal(given[name], tensor) for name, tensor in TENSORS.items())
    assert torch.equal(source.tensors(["a"])["a"], TENSORS["a"])
    with pytest.raises(CheckpointError, match=r"an adapter in memory: 'config\.json' is expected with it"):
        source.json("config.json")
    with pytest.raises(NotRegularFileError), source.open():
        pass
    wrong: Any = {"a": 1}
    with pytest.raises(ConfigError, match="'a' has int"):
        Source.of(wrong)


def test_a_file_that_is_replaced_while_it_is_read(folder: Path) -> None:
    path = folder / "weights.safetensors"
    source = Source.of(path)
    assert source.entries
    save_file({"a": torch.zeros(2, 3)}, path)
    with pytest.raises(CorruptFileError, match="was replaced while it was read"):
        source.tensors()


def test_a_file_that_is_cut_while_it_is_read(folder: Path) -> None:
    path = folder / "weights.safetensors"
    source = Source.of(path)
    assert source.entries
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)
    with pytest.raises(CorruptFileError, match="was cut short while it was read"):
        source.tensors()


def test_the_header_is_parsed_once_whoever_asks(
    tmp_path: Path, adapters: ak.Adapters, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Path] = []
    read = container.read_header
    monkeypatch.setattr(container, "read_header", lambda path: calls.append(path) or read(path))
    adapters.load(file, "again")
    assert calls == [file]


def test_an_adapter_in_memory_is_loaded_as_its_file_is(adapters: ak.Adapters, file: Path) -> None:
    tensors = load_file(file)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    report = adapters.load(Source.of(tensors, dict(Source.of(file).metadata)), "again")
    assert report.read.format == "native"
    with torch.no_grad():
        for parameter in adapters.parameters("again"):
            parameter.zero_()
    assert tensors.keys() == before.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in before.items())
    with pytest.raises(InvalidNameError):
        adapters.load(Source.of(tensors, dict(Source.of(file).metadata)))
    with pytest.raises(CheckpointError, match=r"an adapter in memory: its tensors alone do not say .*Source\.of"):
        adapters.load(tensors, "new")


def test_what_is_written_is_what_the_library_writes(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    container.write(one, TENSORS | {"ü": torch.zeros(0, 2), "turned": torch.ones(2, 3).t()}, {"who": 'ü"\n'})
    save_file(TENSORS | {"ü": torch.zeros(0, 2), "turned": torch.ones(3, 2)}, other, {"who": 'ü"\n'})
    assert one.read_bytes() == other.read_bytes()
    container.write(one, TENSORS, {"b": "1", "a": "2"})
    text = one.read_bytes()
    container.write(one, TENSORS, {"a": "2", "b": "1"})
    assert one.read_bytes() == text
    assert json.loads(text[8 : 8 + int.from_bytes(text[:8], "little")])["__metadata__"] == {"a": "2", "b": "1"}


@pytest.mark.parametrize("given", [5, None])
def test_what_is_no_place_and_no_tensors_is_told(given: object) -> None:
    with pytest.raises(ConfigError, match=rf"expected a file, a folder or tensors by name, not {given}"):
        Source.of(given)  # type: ignore[arg-type]


def test_a_folder_that_is_no_adapters_says_which_files_are_in_it(folder: Path) -> None:
    with pytest.raises(NotRegularFileError, match=r"is a folder; .* such as weights.safetensors in it"):
        Source.of(folder).tensors()
    with pytest.raises(NotRegularFileError, match="or an adapter's own folder"):
        Source.of(folder.parent).tensors()


@pytest.mark.parametrize("address", ["https://some.where/a.safetensors", "http://some.where/a"])
def test_an_address_is_no_path(address: str) -> None:
    with pytest.raises(CheckpointError, match="is an address; download it, and give the file"):
        _ = Source.of(address).entries


@pytest.mark.parametrize("text", ["<!DOCTYPE html><html></html>", "\n<html>"])
def test_a_page_that_was_saved_as_a_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.safetensors").write_text(text)
    with pytest.raises(CheckpointError, match="is a page of HTML"):
        _ = Source.of(tmp_path / "a.safetensors").entries


def test_tensors_in_memory_need_a_name() -> None:
    with pytest.raises(InvalidNameError, match=r"no name of their own; give one: load\(tensors, 'style'\)"):
        ak.Adapters(torch.nn.Linear(2, 2)).load(TENSORS)
