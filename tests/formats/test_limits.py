"""How much a file may hold: as many tensors as its bytes carry, and no more that hold nothing."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from adapterkit.checkpoint import Checkpoint
from adapterkit.errors import UnsupportedFileError
from adapterkit.formats import container
from adapterkit.formats.source import Source
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
        start = time.process_time()
        assert len(Source.of(path).entries) == 2 * count
        seconds.append(time.process_time() - start)
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
        with pytest.raises(UnsupportedFileError, match=r"more than 32,768 tensors in 15 bytes"):
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
