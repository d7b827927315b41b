"""Models of full size, without weights: how many points, what rank 16 adds, and how long mapping and adding take.

`make bench` prints the figures. Both sides put LoRA of rank 16 on the same projections of attention: adapterkit by its
preset, PEFT by the names of the modules and without making any weight.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("peft")

import peft
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from timm.models.vision_transformer import VisionTransformer
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import adapterkit as ak
from adapterkit.selectors import PRESETS
from tests.benchmarks.measure import Side, measure

RANK = 16
_GROUPED = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_key_value_heads": 8}
_CROSS, _PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
_SDXL: dict[str, Any] = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": (_PLAIN, _CROSS, _CROSS),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}

# The published shapes.
MODELS: dict[str, Callable[[], nn.Module]] = {
    "Llama 3 8B": lambda: LlamaForCausalLM(LlamaConfig(vocab_size=128256, num_attention_heads=32, **_GROUPED)),
    "Mixtral 8x7B": lambda: MixtralForCausalLM(MixtralConfig(**_GROUPED)),
    "ViT-L/16": lambda: VisionTransformer(embed_dim=1024, depth=24, num_heads=16, weight_init="skip"),
    "SD 1.5": lambda: UNet2DConditionModel(cross_attention_dim=768),
    "SDXL": lambda: UNet2DConditionModel(**_SDXL),
    "Flux": lambda: FluxTransformer2DModel(guidance_embeds=True),
}


def skeleton(name: str) -> nn.Module:
    with torch.device("meta"):
        return MODELS[name]()


def sizes(model: nn.Module) -> dict[str, int]:
    """The number of points, and what rank 16 adds by preset."""
    added = {preset: ak.points(model, adapter=_lora(preset)).costs for preset in PRESETS}
    return {"points": len(ak.points(model)), **{preset: sum(costs.values()) for preset, costs in added.items()}}


def _lora(preset: str = "attention") -> ak.LoRA:
    return ak.LoRA(rank=RANK, targets=preset)


def peft_config(model: nn.Module) -> peft.LoraConfig:
    """The same projections by name: the last two words of each path, joined in one expression."""
    paths = {point.path for point in ak.points(model, adapter=_lora())}
    endings = sorted({".".join(path.split(".")[-2:]) for path in paths})
    expression = rf".*\.({'|'.join(ending.replace('.', chr(92) + '.') for ending in endings)})"
    return peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=expression)


def times(model: nn.Module, rounds: int) -> dict[str, float]:
    """Median seconds to map the model, to add LoRA, and to do the same with PEFT."""
    config = peft_config(model)
    adapters = ak.Adapters(model)
    ours = len({point.path for point in ak.points(model, adapter=_lora())})

    def inject(twin: nn.Module) -> None:
        peft.inject_adapter_in_model(config, twin, low_cpu_mem_usage=True)

    def check(twin: nn.Module) -> None:
        theirs = sum(hasattr(module, "lora_A") for module in twin.modules())
        assert theirs == ours, f"PEFT has changed {theirs} modules instead of {ours}"

    sides = {
        "map": Side(lambda _: ak.points(model)),
        "add": Side(lambda _: adapters.add("a", _lora()), after=lambda _: adapters.remove("a")),
        "PEFT": Side(inject, prepare=lambda: copy.deepcopy(model), after=check),
    }
    return {name: timing.median for name, timing in measure(sides, rounds, warmup=1).items()}


def figures(name: str, rounds: int) -> dict[str, float]:
    """All figures of one model, printed in one line."""
    model = skeleton(name)
    found = {**sizes(model), **times(model, rounds)}
    shown = {key: value if isinstance(value, int) else round(value, 4) for key, value in found.items()}
    print(f"\n{name}: {json.dumps(shown)}, PEFT / add = {found['PEFT'] / found['add']:.1f}", flush=True)
    return found


def test_both_sides_adapt_the_same_modules() -> None:
    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    assert set(times(model, rounds=1)) == {"map", "add", "PEFT"}
    assert sizes(model)["attention"] == 2 * 4 * RANK * (8 + 8)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
def test_models_of_full_size(name: str) -> None:
    """No bar is asserted: a busy machine would break it at random."""
    found = figures(name, rounds=5)
    if name == "Llama 3 8B":
        assert found["attention"] == 32 * RANK * (2 * (4096 + 4096) + 2 * (4096 + 1024))
