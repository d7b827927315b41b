"""How much a file may hold: as many tensors as its bytes carry, and no more that hold nothing."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import adapterkit as ak
from adapterkit.checkpoint import Checkpoint
from adapterkit.errors import UnsupportedFileError, did_you_mean
from adapterkit.formats import container
from adapterkit.formats.files import open_plain
from adapterkit.formats.source import Source
from adapterkit.testing import toys
from tests.formats import forge
from tests.formats.reading import read, write

EXPERTS = [f"moe.{role}@language.{i}:e{j}" for i in range(48) for j in range(128) for role in ("gate", "up", "down")]


def of_experts(count: int) -> Checkpoint:
    """A LoRA of the smallest size at so many experts."""
    values = torch.arange(float(2 * count * 8)).reshape(count, 2, 8)
    tensors = {key: {"A": own[:1], "B": own[1:].t()} for key, own in zip(EXPERTS[:count], values, strict=True)}
    return Checkpoint.of("lora", {"rank": 1}, tensors)


def test_a_lora_on_all_experts_is_written_and_read(tmp_path: Path) -> None:
    written = of_experts(len(EXPERTS))
    path = write(written, tmp_path / "x")
    found = read(path)
    assert sum(map(len, found.tensors.values())) == 36_864
    for key in EXPERTS[:: len(EXPERTS) // 50]:
        assert all(torch.equal(found.tensors[key][name], tensor) for name, tensor in written.tensors[key].items())


def test_four_times_as_many_take_four_times_as_long(tmp_path: Path) -> None:
    seconds: list[float] = []
    for count in (1000, 4000):
        path = write(of_experts(count), tmp_path / str(count))
        took: list[float] = []
        for _ in range(3):  # the quickest: others were disturbed
            start = time.process_time()
            assert len(Source.of(path).entries) == 2 * count
            took.append(time.process_time() - start)
        seconds.append(min(took))
    assert seconds[1] < 12 * seconds[0]  # a quadratic check would take 16 times as long; the rest is for noise


def _header(count: int, size: int) -> bytes:
    """Many tensors of nothing, and one of some bytes."""
    entries = {str(i): forge.entry(0, 0) for i in range(count)}
    return json.dumps({**entries, "x": forge.entry(0, size, [size], dtype="U8")}).encode()


def test_what_holds_nothing_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "x"
    for size, accepted in ((15, False), (160, True)):
        count = container.TENSOR_LIMIT + size // 16 - (1 if accepted else 0)
        path.write_bytes(forge.raw(_header(count, size), bytes(size)))
        if accepted:
            assert len(Source.of(path).entries) == count + 1
            continue
        with pytest.raises(UnsupportedFileError, match=r"more than 16,384 tensors in 15 bytes"):
            assert Source.of(path).entries


def test_a_header_may_be_as_long_as_its_tensors_are_large(tmp_path: Path) -> None:
    path, long = tmp_path / "x", b" " * (container.HEADER_LIMIT + 1000)
    for size, accepted in ((0, False), (1000, True)):
        path.write_bytes(forge.raw(_header(0, size) + long, bytes(size)))
        if accepted:
            assert list(Source.of(path).entries) == ["x"]
            continue
        with pytest.raises(UnsupportedFileError, match="the limit is 16,777,216 for 0 bytes"):
            assert Source.of(path).entries


def test_what_would_not_be_read_back_is_not_written(tmp_path: Path) -> None:
    nothing = {str(i): torch.zeros(0) for i in range(container.TENSOR_LIMIT + 1)}
    with pytest.raises(UnsupportedFileError, match="would not be read back"):
        container.write(tmp_path / "x", nothing, {})
    assert not list(tmp_path.iterdir())


def sparse(path: Path, size: int, start: bytes = b"") -> Path:
    """A file of so many bytes, which the disk does not hold."""
    path.write_bytes(start)
    os.truncate(path, size)
    return path


def test_the_largest_file(tmp_path: Path) -> None:
    most = 4 << 30
    with open_plain(sparse(tmp_path / "x", most)) as (_, size):
        assert size == most
    with pytest.raises(UnsupportedFileError, match="4,294,967,297 bytes are more than the limit of 4,294,967,296"):
        assert Source.of(sparse(tmp_path / "x", most + 1)).entries


def test_the_largest_json(tmp_path: Path) -> None:
    """Blanks are JSON too."""
    path, most = tmp_path / "x.json", 16 << 20
    source = Source.of(path)
    path.write_bytes(b"1".ljust(most))
    assert source.json("x.json") == 1
    path.write_bytes(b"1".ljust(most + 1))
    with pytest.raises(ak.InvalidHeaderError, match="16,777,217 bytes of JSON; the limit is 16,777,216"):
        source.json("x.json")


@pytest.mark.parametrize("size", [0, 3])
def test_the_longest_header_of_so_many_bytes(tmp_path: Path, size: int) -> None:
    path, most = tmp_path / "x", (16 << 20) + 4 * size
    path.write_bytes(forge.raw(_header(0, size).ljust(most), bytes(size)))
    assert list(Source.of(path).entries) == ["x"]
    path.write_bytes(forge.raw(_header(0, size).ljust(most + 1), bytes(size)))
    with pytest.raises(UnsupportedFileError, match=f"has a header of {most + 1:,} bytes"):
        assert Source.of(path).entries


def test_the_longest_header_that_is_written(tmp_path: Path) -> None:
    """The very one that is read: without tensors 16 MiB, in steps of eight bytes."""
    room = (16 << 20) - len('{"__metadata__":{"a":""}}')
    (text,) = container.pieces(tmp_path / "x", {}, {"a": " " * room})
    assert len(text) == 8 + (16 << 20)
    with pytest.raises(UnsupportedFileError, match="and 16,777,224 of header, would not be read back"):
        container.pieces(tmp_path / "x", {}, {"a": " " * (room + 1)})


def test_no_header_is_longer_than_the_safetensors_library_reads(tmp_path: Path) -> None:
    most, data = 100_000_000, 1 << 25
    for length, words in ((most, "no header"), (most + 1, "the limit is 100,000,000")):
        path = sparse(tmp_path / "x", 8 + length + data, length.to_bytes(8, "little"))
        with pytest.raises(ak.CheckpointError, match=words):
            assert Source.of(path).entries


def test_the_largest_file_that_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {"a": torch.zeros(100)}
    size = sum(len(piece) for piece in container.pieces(tmp_path / "x", tensors, {}))
    monkeypatch.setattr(container, "SIZE_LIMIT", size)
    assert container.pieces(tmp_path / "x", tensors, {})
    monkeypatch.setattr(container, "SIZE_LIMIT", size - 1)
    with pytest.raises(UnsupportedFileError, match="400 bytes in 1 tensors"):
        container.pieces(tmp_path / "x", tensors, {})


def test_the_most_tensors_of_nothing_that_are_written(tmp_path: Path) -> None:
    most = {str(i): torch.zeros(0) for i in range(1 << 14)}
    assert len(container.pieces(tmp_path / "x", most, {})) == 1 + (1 << 14)


def test_the_most_dimensions(tmp_path: Path) -> None:
    path = tmp_path / "x"
    container.write(path, {"a": torch.ones([1] * 16)}, {})
    assert Source.of(path).tensors()["a"].ndim == 16
    before = path.read_bytes()
    with pytest.raises(UnsupportedFileError, match="17 dimensions would not be read back; the limit is 16"):
        container.write(path, {"a": torch.ones([1] * 17)}, {})
    assert path.read_bytes() == before
    save_file({"a": torch.ones([1] * 17)}, path)
    with pytest.raises(ak.CorruptFileError, match="its shape is"):
        assert Source.of(path).entries


def test_the_most_types_and_the_longest_config(tmp_path: Path) -> None:
    part = of_experts(1).part
    for count in (64, 65):
        parts = [dataclasses.replace(part, tensors={key: part.tensors[EXPERTS[0]]}) for key in EXPERTS[:count]]
        if count == 64:
            assert len(read(write(Checkpoint(parts), tmp_path / "x")).parts) == 64
            continue
        with pytest.raises(ak.CheckpointError, match="must have 1 to 64 of them, not 65"):
            read(write(Checkpoint(parts), tmp_path / "x"))
    room = (1 << 16) - len('{"x":""}')
    longest = Checkpoint.of("lora", {"x": "a" * room}, part.tensors)
    assert read(write(longest, tmp_path / "x")).config == longest.config
    with pytest.raises(ak.CheckpointError, match="is longer than 65,536 bytes"):
        read(write(Checkpoint.of("lora", {"x": "a" * (room + 1)}, part.tensors), tmp_path / "x"))


def _with_header(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Path:
    """A file of an adapter of the toy model whose header is another."""
    toys.register()
    adapters = ak.Adapters(toys.ToyModel())
    adapters.add("a", ak.LoRA(rank=2))
    adapters.save("a", path)
    source = Source.of(path)
    header = change(json.loads(source.metadata["adapterkit"]))
    save_file(source.tensors(), path, {"adapterkit": json.dumps(header)})
    return path


def _parts(header: dict[str, Any], count: int) -> dict[str, Any]:
    part = {key: header[key] for key in ("config", "distribution", "type", "version")} | {"settings": {}, "tensors": {}}
    common = {key: header[key] for key in ("backends", "base", "metadata")}
    return {"adapterkit": "0", "file_version": 3, "adapters": {"": {**common, "parts": [part] * count}}}


BOMBS: dict[str, tuple[type[ak.CheckpointError], Callable[[dict[str, Any]], dict[str, Any]]]] = {
    "types": (ak.InvalidHeaderError, lambda header: _parts(header, 10_000)),
    "ranks by selector": (
        ak.InvalidHeaderError,
        lambda h: {
            **h,
            "config": {**h["config"], "ranks": [[f"{{*,a}}{{b,c}}{{d,e}}@layer!={i}", 1] for i in range(1200)]},
        },
    ),
    "points in the index": (
        ak.UnexpectedKeysError,
        lambda h: {**h, "tensors": {**h["tensors"], **{f"attn.q@toy.{i}": {"A": "0" * 32} for i in range(30_000)}}},
    ),
    "roles of the base": (
        ak.BaseMismatchError,
        lambda h: {**h, "base": {"toy": {**h["base"]["toy"], "roles": {f"x{i}": 1 for i in range(50_000)}}}},
    ),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_small_file_costs_no_second_and_no_page(tmp_path: Path, bomb: str) -> None:
    error, change = BOMBS[bomb]
    path, adapters = _with_header(tmp_path / "x", change), ak.Adapters(toys.ToyModel())
    start = time.process_time()
    with pytest.raises(error) as caught:
        adapters.load(path, "new")
    assert time.process_time() - start < 1
    assert len(str(caught.value)) < 3500


def test_what_is_near_is_found_among_very_many() -> None:
    known = [f"attn.q@language.{i}/A" for i in range(100_000)]
    start = time.process_time()
    assert "attn.q@language.77777/A" in did_you_mean("attn.q@language.77777/a", known)
    assert did_you_mean("x" * 100_000, known) == ""
    assert time.process_time() - start < 1
