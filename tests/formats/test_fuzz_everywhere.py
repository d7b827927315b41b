"""Whatever is done to the bytes of any reader's file or config, a load works or ends in a typed error."""

from __future__ import annotations

import random
import time
import warnings
from pathlib import Path

import pytest
import torch

import adapterkit as ak
from adapterkit.errors import AdapterKitError
from tests.formats.samples import CONFIG, READERS
from tests.formats.spoiling import snapshot
from tests.formats.test_fuzz import cut, edit_text, flip, overwrite, repeat

COUNT = [40, pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.timeout(900)])]
SECONDS = 1.0


def _mutated(data: bytes, chance: random.Random, *, text: bool) -> bytes:
    """The bytes with something else in them; those of a config have no header in front."""
    changed = bytearray(data)
    change = chance.choice(
        (flip, flip, overwrite, cut, repeat) if text else (flip, flip, overwrite, cut, repeat, edit_text)
    )
    change(changed, chance)
    return bytes(changed)


@pytest.mark.parametrize("count", COUNT)
@pytest.mark.parametrize("name", [*READERS, "a pickle"])
def test_mutated_bytes(name: str, tmp_path: Path, count: int) -> None:
    """A pickle is opened by permission; otherwise now and then."""
    pickled = name not in READERS
    reader, chance = READERS["kohya" if pickled else name](tmp_path), random.Random(f"{name} {count}")
    path = reader.sample.write(tmp_path / "it.safetensors")
    if pickled:
        torch.save(reader.sample.tensors, path)
    files = [reader.sample.file(path), *([path / CONFIG] if reader.sample.config else [])]
    good = {file: file.read_bytes() for file in files}
    adapters, before = ak.Adapters(reader.model), snapshot(reader.root)
    accepted, slowest = 0, 0.0
    for _ in range(count):
        file = chance.choice(files)
        file.write_bytes(_mutated(good[file], chance, text=pickled or file.name == CONFIG))
        start = time.process_time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            try:
                adapters.load(path, "new", allow_pickle=pickled or chance.random() < 0.2, strict=chance.random() < 0.5)
            except AdapterKitError:
                pass
            else:
                accepted += 1
                assert all(torch.isfinite(one).all() for one in adapters.parameters("new"))
                adapters.remove("new")
        slowest = max(slowest, time.process_time() - start)
        file.write_bytes(good[file])
    assert len(adapters) == 0
    assert snapshot(reader.root) == before
    assert slowest < SECONDS
    assert accepted < count
