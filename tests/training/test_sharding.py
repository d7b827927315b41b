"""Which parts of a model are spread, and which are not; the spreading itself is in tests/cli/test_processes.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

import adapterkit as ak
from adapterkit.errors import ConfigError
from adapterkit.testing import toys
from adapterkit.training.sharding import Sharding, kept_whole, units_of
from tests.training.toy_task import toy_run


class One:
    """What is asked of an accelerator."""

    num_processes, device = 2, torch.device("cpu")


def names(model: nn.Module) -> list[str]:
    paths = {module: path for path, module in model.named_modules()}
    return [paths[block] for block in units_of(model)]


def test_blocks_are_what_the_outermost_lists_hold():
    with torch.device("meta"):
        vit = timm.create_model("vit_tiny_patch16_224", depth=2)
        swin = timm.create_model("swin_tiny_patch4_window7_224")
        resnet = timm.create_model("resnet18")
        t5 = T5ForConditionalGeneration(T5Config(d_model=8, d_ff=8, num_layers=2, num_heads=2, d_kv=4, vocab_size=9))
        unet = UNet2DConditionModel(
            block_out_channels=(8, 8), norm_num_groups=4, cross_attention_dim=8, attention_head_dim=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
        )  # fmt: skip
    assert names(vit) == ["blocks.0", "blocks.1"]
    assert names(swin) == [f"layers.{stage}" for stage in range(4)]
    assert names(resnet) == [f"layer{stage}.{block}" for stage in range(1, 5) for block in range(2)]
    assert names(t5) == [f"{stack}.block.{block}" for stack in ("encoder", "decoder") for block in range(2)]
    middle = ["mid_block.attentions.0", "mid_block.resnets.0", "mid_block.resnets.1"]
    assert names(unet) == ["down_blocks.0", "down_blocks.1", "up_blocks.0", "up_blocks.1", *middle]


def test_what_trains_and_what_is_used_elsewhere_stays_whole():
    toys.register()
    model: Any = toys.ToyModel(seed=3)
    blocks = list(units_of(model))
    assert len(blocks) == 2
    ak.Adapters(model).add("a", ak.LoRA(rank=2, targets="attn.*"))
    first = {parameter for name, parameter in blocks[0].named_parameters() if "lora" not in name}
    adapters = {p for p in blocks[0].parameters() if p.requires_grad}
    assert kept_whole(model, blocks[0]) == adapters
    shared = next(p for p in first if p.ndim == 2 and not p.requires_grad)
    model.elsewhere = nn.Linear(1, 1)
    model.elsewhere.weight = shared
    assert kept_whole(model, blocks[0]) == adapters | {shared}


@pytest.mark.parametrize(
    ("plugin", "told"),
    [
        ({"fsdp_version": 2, "cpu_offload": True}, "fsdp_offload_params: .* set it to false"),
        ({"fsdp_version": 2, "activation_checkpointing": True}, "gradient_checkpointing=true in the run"),
        ({"fsdp_version": 1}, "fsdp_version: .* say --fsdp_version 2"),
    ],
)
def test_what_accelerate_was_told_and_is_not_done_is_refused(plugin: dict[str, Any], told: str):
    with pytest.raises(ConfigError, match=told):
        Sharding(One(), FullyShardedDataParallelPlugin(**plugin))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("given", ["block_swap=1", "torch_compile=true"])
def test_what_does_not_go_with_it_is_refused(given: str):
    config = toy_run(Path("run"), "shard=true", given).config
    with pytest.raises(ConfigError, match=f"{given.partition('=')[0]}: a base that is spread"):
        Sharding.of(config, One())  # pyright: ignore[reportArgumentType]


def test_a_model_without_blocks_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("adapterkit.training.sharding.init_device_mesh", lambda *_: None)
    sharding = Sharding(One(), FullyShardedDataParallelPlugin(fsdp_version=2))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="shard: model, a Linear, has no blocks that can be spread"):
        sharding.spread({"model": nn.Linear(2, 2)})
