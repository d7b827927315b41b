"""What is finite in the adapter and infinite in the dtype that it goes into is an error, and nothing is changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import adapterkit as ak
from adapterkit.testing import toys


def strong(dtype: torch.dtype, value: float = 300.0) -> tuple[nn.Linear, ak.Adapters]:
    """A layer, and an adapter of rank 4 whose update is 4 * value ** 2 everywhere."""
    layer = nn.Linear(4, 4).to(dtype)
    adapters = ak.Adapters(nn.Sequential(layer))
    adapters.add("a", ak.LoRA(rank=4, alpha=4.0, targets="*"))
    with torch.no_grad():
        for parameter in adapters.parameters("a"):
            parameter.fill_(value)
    return layer, adapters


def merge(adapters: ak.Adapters) -> None:
    adapters.merge("a")


def bake(adapters: ak.Adapters) -> None:
    adapters.bake("a")


def merge_for_a_block(adapters: ak.Adapters) -> None:
    with adapters.merged("a"):
        pass


@pytest.mark.parametrize("verb", [merge, merge_for_a_block, bake])
def test_a_merge_beyond_the_bases_dtype_changes_nothing(verb: Callable[[ak.Adapters], None]):
    layer, adapters = strong(torch.float16)
    weight, before = layer.weight, layer.weight.detach().clone()
    told = r"at linear@.*weight with 360000 in it, and torch\.float16 ends at 65504"
    with pytest.raises(ak.NotMergeableError, match=told):
        verb(adapters)
    assert layer.weight is weight
    assert torch.equal(weight, before)
    assert adapters.active == {"a": 1.0}


def test_a_weight_in_float8_keeps_no_merge():
    layer, adapters = strong(torch.float16, 0.1)
    layer.weight.data = layer.weight.data.to(torch.float8_e4m3fn)
    with pytest.raises(ak.NotMergeableError, match=r"linear@.*0: a weight in torch\.float8_e4m3fn keeps no merge"):
        adapters.merge("a")


def test_a_merge_of_what_has_diverged_changes_nothing():
    layer, adapters = strong(torch.float32, float("nan"))
    before = layer.weight.detach().clone()
    with pytest.raises(ak.NotMergeableError, match=r"at linear@.* would give a weight with NaN or infinity; nothing"):
        adapters.merge("a")
    assert torch.equal(layer.weight, before)


def test_a_bias_beyond_the_bases_dtype_changes_nothing():
    layer = nn.Linear(4, 4).half()
    adapters = ak.Adapters(nn.Sequential(layer))
    adapters.add("a", ak.Trainable("*", part="bias"))
    with torch.no_grad():
        for parameter in adapters.parameters("a"):
            parameter.fill_(1e5)
    with pytest.raises(ak.NotMergeableError, match="bias with 100000 in it"):
        adapters.merge("a")
    assert torch.isfinite(layer.bias).all()


def test_where_the_dtype_is_wide_enough_it_is_merged():
    layer, adapters = strong(torch.bfloat16)
    adapters.merge("a")
    assert layer.weight.min() > 3e5


def test_a_save_beyond_its_dtype_leaves_the_old_file(tmp_path: Path):
    _, adapters = strong(torch.float32, 1e5)
    file = adapters.save("a", tmp_path / "a.safetensors")
    before = file.read_bytes()
    with pytest.raises(ak.NonFiniteError, match=r"'linear@.*/A': 16 of 16 values are beyond torch\.float16") as caught:
        adapters.save("a", file, dtype=torch.float16)
    assert str(file) in str(caught.value)
    assert file.read_bytes() == before
    adapters.save("a", file, dtype=torch.bfloat16)


def test_what_has_diverged_can_be_saved(tmp_path: Path):
    _, adapters = strong(torch.float32, float("nan"))
    adapters.save("a", tmp_path / "a.safetensors", dtype=torch.float16)


def test_a_load_beyond_float32_leaves_the_model(tmp_path: Path):
    model = toys.ToyModel().double()
    toys.register()
    adapters = ak.Adapters(model)
    adapters.add("a", ak.LoRA(rank=2))
    with torch.no_grad():
        for parameter in adapters.parameters("a"):
            parameter.fill_(1e300)
    file = adapters.save("a", tmp_path / "a.safetensors")
    other = ak.Adapters(toys.ToyModel())
    with pytest.raises(ak.NonFiniteError, match=r"'attn.*': 16 of 16 values are beyond torch\.float32"):
        other.load(file, "a")
    assert not list(other)
