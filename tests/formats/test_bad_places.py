"""Bad inputs, rows 32 to 35 and 39 to 42: other bases, impossible names, and what is no plain file."""

from __future__ import annotations

import os
import re
import socket
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import adapterkit as ak
from adapterkit.errors import (
    BaseMismatchError,
    CheckpointError,
    InvalidNameError,
    NotRegularFileError,
    ShapeMismatchError,
    UnsupportedFileError,
)
from adapterkit.testing import toys
from tests.formats import forge
from tests.formats.spoiling import Refusal, snapshot, with_adapter


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "lenient"])
def test_row32_a_base_of_other_shapes(tmp_path: Path, refused: Refusal, strict: bool) -> None:
    path = with_adapter(toys.ToyModel(width=16)).save("good", tmp_path / "wide")
    if strict:
        error = refused(path, BaseMismatchError)
        assert error.key == "base"
    else:
        refused(path, ShapeMismatchError, strict=False)


def test_row33_another_family_of_the_same_shapes(file: Path, refused: Refusal) -> None:
    forge.header(file, lambda h: h["base"]["toy"].update(family="elsewhere:OtherModel"))
    assert "elsewhere:OtherModel" in str(refused(file, BaseMismatchError))


@pytest.mark.parametrize("layers", [1, 3])
def test_row34_fewer_or_more_layers(tmp_path: Path, refused: Refusal, layers: int) -> None:
    path = with_adapter(toys.ToyModel(layers=layers)).save("good", tmp_path / "other")
    refused(path, BaseMismatchError)


def test_a_component_that_the_model_lacks(file: Path, refused: Refusal) -> None:
    forge.header(file, lambda h: h["base"].update(unet={"family": "diffusers:UNet2DConditionModel"}))
    assert "unet" in str(refused(file, BaseMismatchError))


def test_row35_paths_and_repositories_are_text(file: Path, adapters: ak.Adapters, tmp_path: Path) -> None:
    """Nothing named in a file is opened, fetched or imported."""
    named = tmp_path / "never_opened"
    extra = {
        "base_model": str(named),
        "repository": "https://example.invalid/x",
        "revision": "main",
        "module": "antigravity",
    }
    forge.header(file, lambda h: (h["metadata"].update(extra), h["base"]["toy"].update(extra)))
    events: list[tuple[str, str]] = []
    watching = [True]
    sys.addaudithook(lambda name, args: events.append((name, repr(args))) if watching[0] else None)
    adapters.load(file, "new")
    watching[0] = False
    assert not [e for e in events if e[0].startswith(("socket", "subprocess", "os.exec", "os.system"))]
    assert not [e for e in events if "never_opened" in e[1] or "antigravity" in e[1]]


NAMES = [
    "../evil",
    "..",
    "/abs",
    "a/b",
    "a\\b",
    "a.b",
    "",
    "x" * 65,
    "x" * 300,
    "a\0b",
    "CON",
    "con",
    "lpt1",
    "-rf",
    "_a",
]
NAMES += ["a b", "a\n", "é", "good", None, 3, b"a", ["a"]]


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_row39_names(file: Path, adapters: ak.Adapters, model: nn.Module, tmp_path: Path, name: Any) -> None:
    before, files = snapshot(model), sorted(tmp_path.iterdir())
    attempts: list[Callable[[], object]] = [
        lambda: adapters.add(name, ak.LoRA(rank=1)),
        lambda: adapters.install(name, adapters.checkpoint("good")),
    ]
    if name is not None:  # load() takes the file's name then
        attempts.append(lambda: adapters.load(file, name))
    for attempt in attempts:
        with pytest.raises(InvalidNameError):
            attempt()
    assert snapshot(model) == before
    assert sorted(tmp_path.iterdir()) == files
    assert list(adapters) == ["good"]


@pytest.mark.parametrize("name", ["a.b.safetensors", "-rf.safetensors", "CON.safetensors"])
def test_row39_a_file_whose_name_is_no_adapter_name(file: Path, adapters: ak.Adapters, name: str) -> None:
    with pytest.raises(InvalidNameError):
        adapters.load(file.rename(file.with_name(name)))
    assert list(adapters) == ["good"]


def _pipe(path: Path, good: Path) -> None:
    os.mkfifo(path)


def _folder(path: Path, good: Path) -> None:
    path.mkdir()


def _link_out(path: Path, good: Path) -> None:
    path.symlink_to(good)


def _link_to_device(path: Path, good: Path) -> None:
    path.symlink_to("/dev/zero")


def _ring(path: Path, good: Path) -> None:
    path.symlink_to(path)


def _socket(path: Path, good: Path) -> None:
    folder = os.open(path.parent, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"/proc/self/fd/{folder}/{path.name}")  # a socket's path has 107 bytes at most
    os.close(folder)


@pytest.mark.parametrize("format", ["native", None])
@pytest.mark.parametrize("make", [_pipe, _folder, _link_out, _link_to_device, _ring, _socket])
def test_row40_not_a_plain_file(
    file: Path, refused: Refusal, make: Callable[[Path, Path], None], format: str | None
) -> None:
    inside = file.parent / "in"
    inside.mkdir()
    path = inside / "x.safetensors"
    make(path, file)
    expected = (NotRegularFileError, CheckpointError) if make is _ring else NotRegularFileError
    refused(path, expected, format=format)


def test_row40_links_that_are_allowed(file: Path, adapters: ak.Adapters) -> None:
    """Inside the folder, and as a download cache has them."""
    beside = file.parent / "beside"
    beside.symlink_to(file.name)
    cache = file.parent / "models--x--y"
    snapshot_folder = cache / "snapshots" / "0123abc"
    (cache / "blobs").mkdir(parents=True)
    snapshot_folder.mkdir(parents=True)
    (cache / "blobs" / "ff00").write_bytes(file.read_bytes())
    cached = snapshot_folder / "x.safetensors"
    cached.symlink_to("../../blobs/ff00")
    for number, path in enumerate((beside, cached)):
        assert adapters.load(path, f"new{number}").points


@pytest.mark.parametrize(("store", "own"), [("blobs", "elsewhere"), ("other", "snapshots")])
def test_row40_links_that_look_like_a_cache_alone(
    file: Path, refused: Refusal, tmp_path: Path, store: str, own: str
) -> None:
    """A folder of the one name is not enough, nor is the other's."""
    folder = tmp_path / "cache" / own / "0123abc"
    folder.mkdir(parents=True)
    (tmp_path / "cache" / store).mkdir()
    (tmp_path / "cache" / store / "ff00").write_bytes(file.read_bytes())
    (folder / "x.safetensors").symlink_to(f"../../{store}/ff00")
    refused(folder / "x.safetensors", NotRegularFileError, format="native")


def test_row40_missing_files(tmp_path: Path, refused: Refusal, file: Path) -> None:
    refused(tmp_path / "none" / "x", CheckpointError, format="native")
    error = refused(tmp_path / "bat.safetensors", CheckpointError, format="native")
    assert "bad.safetensors" in str(error)
    dangling = tmp_path / "dangling"
    dangling.symlink_to(tmp_path / "nothing")
    refused(dangling, CheckpointError, format="native")
    refused(Path("a\0b"), CheckpointError, format="native")


@pytest.fixture
def closed(file: Path) -> None:
    file.chmod(0)


@pytest.mark.usefixtures("closed", "nobody")
def test_an_unreadable_file(file: Path, refused: Refusal) -> None:
    assert "Permission" in str(refused(file, CheckpointError, format="native"))


def test_row41_a_file_that_changes_after_it_was_loaded(file: Path, adapters: ak.Adapters) -> None:
    adapters.load(file, "new")
    with file.open("r+b") as opened:
        opened.write(b"\xff" * 300)
        opened.truncate(400)
    for key, tensor in adapters.state_dict("new").items():
        assert torch.equal(tensor, adapters.state_dict("good")[key])


def test_row42_archives(file: Path, refused: Refusal) -> None:
    packed, tarred = file.with_name("x.zip"), file.with_name("x.tar.gz")
    with zipfile.ZipFile(packed, "w") as archive:
        archive.write(file, "../evil.safetensors")
    with tarfile.open(tarred, "w:gz") as archive:
        archive.add(file, "/abs.safetensors")
    assert "zip" in str(refused(packed, UnsupportedFileError, format="native"))
    assert "gzip" in str(refused(tarred, UnsupportedFileError, format="native"))


def test_the_rows_are_all_here() -> None:
    """Every row of the acceptance list has a test that is named after it."""
    text = "".join(path.read_text() for path in Path(__file__).parent.glob("test_bad_*.py"))
    assert {int(number) for number in re.findall(r"row(\d+)", text)} == set(range(1, 43))
