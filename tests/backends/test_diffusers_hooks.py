"""What diffusers puts around the layers of a model: casts layer by layer, offloading in groups, fused projections."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.hooks.group_offloading import apply_group_offloading

import adapterkit as ak
from adapterkit import errors
from adapterkit.engine.attach import site_of
from tests.backends import diffusion_models as models
from tests.values import randomize

CPU = torch.device("cpu")
LORA = ak.LoRA(rank=2, targets="attn.{q,o} mlp.*")
CONFIGS = (LORA, ak.DoRA(rank=2, targets="attn.q"), ak.Prefix(length=2), ak.Bottleneck(reduction=2))
Hooks = Callable[[Any, Path], None]


def by_leaf(model: Any, folder: Path) -> None:
    apply_group_offloading(model, CPU, CPU, "leaf_level")


def by_block(model: Any, folder: Path) -> None:
    apply_group_offloading(model, CPU, CPU, "block_level", num_blocks_per_group=1)


def onto_the_disk(model: Any, folder: Path) -> None:
    apply_group_offloading(model, CPU, CPU, "leaf_level", offload_to_disk_path=str(folder / str(id(model))))


def cast(model: Any, folder: Path) -> None:
    model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)


HOOKS: dict[str, Hooks] = {"leaf": by_leaf, "block": by_block, "disk": onto_the_disk, "cast": cast}


def added(model: Any, config: ak.AdapterConfig) -> ak.Adapters:
    adapters = ak.Adapters(model)
    adapters.add("a", config)
    randomize(adapters, "a")
    return adapters


@pytest.mark.parametrize("hooks", HOOKS)
def test_adapters_act_beneath_hooks_in_either_order(hooks: str, tmp_path: Path) -> None:
    """As on a model whose weights are what the hooks make of them."""
    hooked = models.sd3()
    twins = [copy.deepcopy(hooked) for _ in CONFIGS]
    HOOKS[hooks](hooked, tmp_path)
    base = models.run(hooked)
    for config, other in zip(CONFIGS, twins, strict=True):
        adapters = added(hooked, config)
        before = models.run(hooked)
        file = adapters.save("a", tmp_path / "a")
        assert {p.dtype for p in adapters.parameters()} == {torch.float32}
        adapters.detach()
        assert torch.equal(models.run(hooked), base)
        adapters = added(other, config)
        models.run(other)
        HOOKS[hooks](other, tmp_path)
        torch.testing.assert_close(models.run(other), before)
        assert {p.dtype for p in adapters.parameters()} == {torch.float32}
        adapters.load(file, "b")
        adapters.activate("b")
        torch.testing.assert_close(models.run(other), before)
        with pytest.raises(errors.NotMergeableError):
            adapters.merge()
        adapters.detach()
        assert torch.equal(models.run(other), base)


def test_a_model_that_is_stored_in_eight_bits_leaves_the_adapter_in_its_own() -> None:
    model: Any = models.sd3()
    adapters = added(model, LORA)
    values = {key: tensor.clone() for key, tensor in adapters.state_dict("a").items()}
    model.to(torch.float8_e4m3fn)
    assert model.proj_out.weight.dtype == torch.float8_e4m3fn
    torch.testing.assert_close(adapters.state_dict("a"), values)
    model.to(torch.bfloat16)
    assert {p.dtype for p in adapters.parameters()} == {torch.bfloat16}


def test_a_group_with_copies_of_its_tensors_takes_nothing_new() -> None:
    """Streams pin copies, by parameter; there are none on the CPU."""
    apply_group_offloading(model := models.sd3(), CPU, CPU, "leaf_level")
    layer: Any = model.transformer_blocks.get_submodule("1.attn.to_q")
    layer._diffusers_hook.get_hook("group_offloading").group.cpu_param_dict = {layer.weight: layer.weight.data}
    with pytest.raises(errors.AttachError, match=r"to_q.*as one block"):
        ak.Adapters(model).add("a", LORA)


@pytest.mark.parametrize("name", ["flux", "sd3", "pixart", "autoencoder"])
def test_projections_are_not_fused_while_there_are_adapters(name: str) -> None:
    adapters = added(model := models.FAMILIES[name](), ak.LoRA(rank=2, targets="attn.q"))
    y = models.run(model)
    with pytest.raises(errors.StateError, match=r"fuse_qkv_projections\(\).*bake\(\)"):
        model.fuse_qkv_projections()
    attention = next(one for one in model.modules() if any(site_of(child) for child in one.children()))
    with pytest.raises(errors.StateError, match=r"fuse_projections\(\)"):
        attention.fuse_projections()
    assert torch.equal(models.run(model), y)
    with pytest.raises(errors.StateError, match="fuse_qkv"):
        copy.deepcopy(model).fuse_qkv_projections()
    adapters.detach()
    model.fuse_qkv_projections()
    assert not any(callable(one.__dict__.get("fuse_projections")) for one in model.modules())


def test_projections_may_be_fused_after_baking() -> None:
    adapters = added(model := models.flux(), ak.LoRA(rank=2, targets="attn.{q,k,v}"))
    y = models.run(model)
    adapters.bake()
    model.fuse_qkv_projections()
    torch.testing.assert_close(models.run(model), y)


@pytest.mark.parametrize("before", [True, False], ids=["cast first", "adapted first"])
def test_training_beside_layerwise_casting_has_the_gradients_of_the_cast_weights(before: bool) -> None:
    """diffusers casts the data of parameters that the backward has kept: torch finds floats of eight bits there."""
    model = models.sd3()
    model.train()
    plain = copy.deepcopy(model)
    for one in plain.modules():
        if isinstance(one, (torch.nn.Linear, torch.nn.Conv2d)):
            for parameter in one.parameters(recurse=False):
                parameter.data = parameter.data.to(torch.float8_e4m3fn).float()
    if before:
        model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32, skip_modules_pattern=())
    adapters, wanted = added(model, LORA), added(plain, LORA)
    if not before:
        model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32, skip_modules_pattern=())
    models.run(model).square().mean().backward()
    models.run(plain).square().mean().backward()
    for mine, theirs in zip(adapters.parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=0.05, atol=1e-3)
    hooks = {name: len(one._forward_hooks) for name, one in model.named_modules()}
    with pytest.raises(TypeError):
        model(nonsense=1)  # what is kept is kept until the call ends, however it does
    assert hooks == {name: len(one._forward_hooks) for name, one in model.named_modules()}


def test_training_beneath_weights_on_the_disk_has_the_gradients_of_those_in_memory(tmp_path: Path) -> None:
    """The data of a parameter that the backward has kept is gone from it after the forward."""
    model = models.sd3()
    wanted = added(plain := copy.deepcopy(model), LORA)
    onto_the_disk(model, tmp_path)
    adapters = added(model, LORA)
    for one in (model, plain):
        models.run(one).square().mean().backward()
    for mine, theirs in zip(adapters.parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


@pytest.mark.parametrize(("size", "axis"), [(4, 1), (1, 0), (2, 0)])
def test_a_feed_forward_that_runs_chunk_by_chunk_is_adapted_chunk_by_chunk(size: int, axis: int) -> None:
    model: Any = models.pixart()
    for config in (ak.Bottleneck(reduction=2), ak.Compacter(n=2, targets="attn mlp"), LORA):
        for block in model.transformer_blocks:
            block.set_chunk_feed_forward(None, 0)
        adapters = added(model, config)
        y = models.run(model)
        for block in model.transformer_blocks:
            block.set_chunk_feed_forward(size, axis)
        torch.testing.assert_close(models.run(model), y)
        adapters.detach()
