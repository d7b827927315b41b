"""Files that earlier releases have written load, and act as they did then."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import adapterkit as ak
from tests.formats.old_models import WRITTEN

FOLDER = Path(__file__).parent / "fixtures"


@pytest.mark.parametrize("key", WRITTEN)
def test_a_file_of_an_earlier_release_acts_as_it_did(key: str) -> None:
    written, expected = WRITTEN[key], load_file(FOLDER / "expected.safetensors")
    model = written.build()
    adapters = ak.Adapters(model)
    reports = adapters.load_all(FOLDER / f"{key}.safetensors")
    assert list(reports) == list(written.configs)
    for name, config in written.configs.items():
        assert adapters.config(name) == config
        assert not reports[name].notes
        adapters.activate(name)
        with torch.no_grad():
            assert torch.allclose(written.evaluate(model), expected[f"{key}/{name}"], rtol=1e-5, atol=1e-6)


def test_it_fits_the_same_points_as_then() -> None:
    """Every tensor of the file is in the adapter, and the file is written again with the same tensors."""
    for key, written in WRITTEN.items():
        stored = load_file(FOLDER / f"{key}.safetensors")
        adapters = ak.Adapters(written.build())
        adapters.load_all(FOLDER / f"{key}.safetensors")
        many = len(adapters) > 1
        found = {f"{n}/{k}" if many else k: t for n in adapters for k, t in adapters.state_dict(n).items()}
        assert found.keys() == stored.keys()
        assert all(torch.equal(found[k], tensor) for k, tensor in stored.items())
