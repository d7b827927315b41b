"""Adapters whose parameters fully_shard has spread over processes: here over one, which needs no other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import adapterkit as ak
from adapterkit.errors import NotMergeableError


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # pyright: ignore[reportPrivateImportUsage]
    yield
    dist.destroy_process_group()


def layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))


@pytest.mark.usefixtures("group")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_sharded_adapter_is_saved_whole_and_not_merged(tmp_path: Path) -> None:
    model, x = layers(), torch.randn(3, 4)
    adapters = ak.Adapters(model)
    adapters.add("a", ak.LoRA(rank=2, targets="*"))
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.normal_()
    y = model(x)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    assert torch.allclose(model(x), y)
    path = adapters.save("a", tmp_path / "a.safetensors")
    with pytest.raises(NotMergeableError, match="sharded"):
        adapters.merge()
    fresh = ak.Adapters(twin := layers())
    fresh.load(path)
    fresh.activate("a")
    assert torch.allclose(twin(x), y)


@pytest.mark.usefixtures("group")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_values_go_into_a_sharded_adapter(tmp_path: Path) -> None:
    theirs, x = layers(), torch.randn(3, 4)
    others = ak.Adapters(theirs)
    others.add("a", ak.LoRA(rank=2, targets="*"))
    with torch.no_grad():
        for parameter in others.parameters():
            parameter.normal_()
    path = others.save("a", tmp_path / "a.safetensors")
    model = layers()
    adapters = ak.Adapters(model)
    adapters.add("a", ak.LoRA(rank=2, targets="*"))
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    before = [*adapters.parameters()]
    model(x)  # and the parameters stay gathered for the backward
    adapters.load_into("a", path)
    assert all(now is then for now, then in zip(adapters.parameters(), before, strict=True))
    assert torch.allclose(model(x), theirs(x))
    with pytest.raises(NotMergeableError, match="sharded"):
        adapters.bake()
    assert torch.allclose(model(x), theirs(x))


@pytest.mark.usefixtures("group")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_start_values_that_data_decides_are_of_the_whole_weight() -> None:
    x, found = torch.randn(9, 4, generator=torch.Generator().manual_seed(1)), []
    for spread in (False, True):
        adapters = ak.Adapters(model := layers())
        adapters.add("a", ak.LoRA(rank=2, targets="*", init="corda"))
        if spread:
            whole = set(adapters.parameters("a"))
            fully_shard(model, mesh=init_device_mesh("cpu", (1,)), ignored_params=whole)
        with torch.no_grad(), adapters.observing("a"):
            model(x)
        found.append(adapters.state_dict("a"))
    assert all(torch.equal(tensor, found[1][key]) for key, tensor in found[0].items())
    assert found[0]


@pytest.mark.usefixtures("group")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("targets", ["norm", "moe.up moe.down"])
@pytest.mark.parametrize("spread", [False, True], ids=["adapter whole", "adapter spread"])
def test_what_a_model_reads_is_spread_and_moved(targets: str, *, spread: bool) -> None:
    """Fully_shard reads the parameters that it has put away, whatever else reads them: an adapter would go along."""
    model, x = reading(), torch.tensor([[1, 2, 3]])
    adapters = ak.Adapters(model)
    adapters.add("a", ak.Trainable(targets=targets) if targets == "norm" else ak.LoRA(rank=2, targets=targets))
    own = [*adapters.parameters()]
    with torch.no_grad():
        for parameter in own:
            parameter.add_(0.3)
        y, bare = model(x).logits, plain(adapters, model, x)
    ignored = None if spread else set(own)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)), ignored_params=ignored)
    for _ in range(2):
        model.to("cpu")
        with torch.no_grad():
            assert torch.allclose(model(x).logits, y, atol=1e-6)
            assert torch.allclose(plain(adapters, model, x), bare, atol=1e-6)
    assert not torch.allclose(y, bare, atol=1e-3)


def plain(adapters: ak.Adapters, model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with adapters.disabled():
        return model(x).logits


def reading() -> nn.Module:
    """Its norms, and the experts' weights, are read by the modules that have them."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=2, vocab_size=16)  # pyright: ignore
    return transformers.MixtralForCausalLM(config).eval()
