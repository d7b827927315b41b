"""Several adapters in one file: of different types, with what a fusion combines, strictly checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import adapterkit as ak
from adapterkit import errors
from adapterkit.checkpoint import Checkpoint, Format, ReadReport, WriteOptions, single
from adapterkit.formats.source import Source
from adapterkit.testing import toys
from tests.values import randomize

X = toys.ids()
CONFIGS: dict[str, ak.AdapterConfig] = {
    "lora": ak.LoRA(rank=2, targets="all"),
    "kv": ak.Prefix(length=2),
    "neck": ak.Bottleneck(width=3),
    "norms": ak.Trainable("norm"),
    "edits": ak.ReFT(rank=2),
}


@pytest.fixture
def model() -> toys.ToyModel:
    toys.register()
    return toys.ToyModel().double().eval()


@pytest.fixture
def adapters(model: toys.ToyModel) -> ak.Adapters:
    adapters = ak.Adapters(model)
    for i, (name, config) in enumerate(CONFIGS.items()):
        adapters.add(name, config)
        randomize(adapters, name, i)
    return adapters


def test_different_types_in_one_file(model: toys.ToyModel, adapters: ak.Adapters, tmp_path: Path) -> None:
    adapters.activate(list(CONFIGS))
    y = model(X)
    path = adapters.save(list(CONFIGS), tmp_path / "all.safetensors")
    adapters.detach()
    reports = adapters.load_all(path)
    assert list(reports) == list(CONFIGS)
    assert {name: adapters.config(name) for name in adapters} == CONFIGS
    adapters.activate(list(CONFIGS))
    assert torch.equal(model(X), y)
    again = adapters.save(list(CONFIGS), tmp_path / "again.safetensors")
    assert again.read_bytes() == path.read_bytes()


def test_a_fusion_takes_its_parts_along(model: toys.ToyModel, tmp_path: Path) -> None:
    adapters = ak.Adapters(model)
    for name in ("a", "b"):
        adapters.add(name, ak.Bottleneck(width=3))
        randomize(adapters, name)
    adapters.add("fusion", ak.Fuse(parts=("a", "b")))
    randomize(adapters, "fusion")
    y = model(X)
    path = adapters.save("fusion", tmp_path / "fusion.safetensors")
    adapters.detach()
    assert list(adapters.load_all(path)) == ["a", "b", "fusion"]
    adapters.activate("fusion")
    assert torch.equal(model(X), y)
    with pytest.raises(errors.UnsupportedFileError, match=r"several adapters \(a, b, fusion\); Adapters.load_all"):
        adapters.load(path, "other")


def test_a_file_of_one_adapter_is_one_too(adapters: ak.Adapters, tmp_path: Path) -> None:
    path = adapters.save("kv", tmp_path / "mine.safetensors")
    adapters.detach()
    assert list(adapters.load_all(path)) == ["mine"]
    path = adapters.save(["mine"], tmp_path / "named.safetensors")
    adapters.detach()
    assert list(adapters.load_all(path)) == ["mine"]


def test_all_of_it_or_none(model: toys.ToyModel, adapters: ak.Adapters, tmp_path: Path) -> None:
    path = adapters.save(["lora", "kv", "neck"], tmp_path / "three.safetensors")
    adapters.remove("lora"), adapters.remove("kv")
    with pytest.raises(errors.InvalidNameError, match="'neck' exists already"):
        adapters.load_all(path)
    assert "lora" not in adapters
    other = ak.Adapters(toys.ToyModel(layers=1).double())
    with pytest.raises(errors.CheckpointError):
        other.load_all(path)
    assert not len(other)


def test_formats_that_hold_one_say_so(adapters: ak.Adapters, tmp_path: Path) -> None:
    class Single(Format):
        def recognises(self, source: Source) -> bool:
            return False

        def read(self, source: Source, points: object, options: object) -> tuple[dict[str, Checkpoint], ReadReport]:
            raise NotImplementedError

        def write(
            self, checkpoints: Mapping[str, Checkpoint], target: Path, points: object, options: WriteOptions
        ) -> None:
            single(checkpoints, target)

    with pytest.raises(errors.CheckpointError, match=r"holds one adapter, not 2 \(kv, lora\); native holds any"):
        Single().write(
            {name: adapters.checkpoint(name) for name in ("kv", "lora")},
            tmp_path / "x",
            adapters.points(),
            WriteOptions(),
        )
    with pytest.raises(errors.ConfigError, match="at least one"):
        adapters.save([], tmp_path / "none.safetensors")
    with pytest.raises(errors.UnknownNameError, match="nope"):
        adapters.save(["kv", "nope"], tmp_path / "none.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fault", ["a tensor gone", "a tensor more", "a bit changed", "a part gone", "a strange part"])
def test_damaged_bundles(adapters: ak.Adapters, tmp_path: Path, fault: str) -> None:
    path = adapters.save(["lora", "kv"], tmp_path / "two.safetensors")
    tensors, metadata = load_file(path), dict(Source.of(path).metadata)
    header = json.loads(metadata["adapterkit"])
    key = next(iter(tensors))
    if fault == "a tensor gone":
        del tensors[key]
    elif fault == "a tensor more":
        tensors["other/x@y/z"] = torch.zeros(1)
    elif fault == "a bit changed":
        tensors[key] = tensors[key] + 1
    elif fault == "a part gone":
        del header["adapters"]["kv"]
    else:
        header["adapters"]["kv"]["more"] = 1
    metadata["adapterkit"] = json.dumps(header)
    save_file(tensors, path, metadata)
    before = list(adapters)
    with pytest.raises(errors.CheckpointError):
        adapters.load_all(path)
    assert list(adapters) == before


@pytest.mark.parametrize("fault", ["an entry more", "a list of parts", "a number for a part", "a slash in a name"])
def test_damaged_headers_of_bundles(adapters: ak.Adapters, tmp_path: Path, fault: str) -> None:
    path = adapters.save(["lora", "kv"], tmp_path / "two.safetensors")
    tensors, metadata = load_file(path), dict(Source.of(path).metadata)
    header = json.loads(metadata["adapterkit"])
    if fault == "an entry more":
        message, header["more"] = "'more': is unknown. Known: adapterkit, adapters, file_version", 1
    elif fault == "a list of parts":
        message, header["adapters"] = "adapters", list(header["adapters"].values())
    else:
        message = "must be an object"
        header["adapters"].update({"kv": 3} if fault == "a number for a part" else {"k/v": header["adapters"]["kv"]})
    metadata["adapterkit"] = json.dumps(header)
    save_file(tensors, path, metadata)
    with pytest.raises(errors.InvalidHeaderError, match=message):
        adapters.load_all(path)
