"""Who wrote a file for the UIs, for which base, and who else misreads it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import adapterkit as ak
from adapterkit.formats import other_readers
from adapterkit.formats.container import Entry
from adapterkit.formats.origins import base_of, tool_of
from tests.formats.pipelines import unet


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({}, ("", "")),
        ({"ss_network_module": "networks.lora"}, ("kohya's sd-scripts", "")),
        (
            {"ss_network_module": "networks.lora_flux", "modelspec.implementation_version": "sd-scripts/48d368f"},
            ("kohya's sd-scripts", "48d368f"),
        ),
        ({"ss_network_module": "networks.lora_wan"}, ("kohya's musubi-tuner", "")),
        ({"ss_network_module": "lycoris.kohya"}, ("LyCORIS in kohya's sd-scripts", "")),
        ({"ot_revision": "23df383", "ot_branch": "master"}, ("OneTrainer", "23df383")),
        ({"software": json.dumps({"name": "ai-toolkit", "version": "0.1"})}, ("ai-toolkit", "0.1")),
        ({"software": "[1"}, ("", "")),
        ({"modelspec.implementation_version": "adapterkit/0.1.0"}, ("adapterkit", "0.1.0")),
    ],
)
def test_tools(metadata: dict[str, str], expected: tuple[str, str]) -> None:
    assert tool_of(metadata) == expected


def shapes(*keys: str, width: int = 1) -> list[tuple[str, Entry]]:
    return [(key, Entry(torch.float16, (4, width))) for key in keys]


UNKNOWN = "ss_base_model_version"
CROSS = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight"


@pytest.mark.parametrize(
    ("metadata", "found", "expected"),
    [
        ({"ss_base_model_version": "sd_v2_v", "ss_sd_model_name": "x"}, [], "sd_v2_v (ss_base_model_version), x"),
        ({"modelspec.architecture": "flux-1-dev/lora"}, [], "flux-1-dev/lora (modelspec.architecture)"),
        ({}, shapes(CROSS, width=768), "Stable Diffusion 1.x (by its keys and shapes)"),
        ({}, shapes(CROSS, width=1024), "Stable Diffusion 2.x (by its keys and shapes)"),
        (
            {"ss_base_model_version": "unknown"},
            shapes(CROSS, width=2048),
            "Stable Diffusion XL (by its keys and shapes)",
        ),
        ({}, shapes("diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight"), "Flux (by its keys and shapes)"),
        ({}, shapes("lora_unet_blocks_0_self_attn_q.lora_down.weight"), "Wan (by its keys and shapes)"),
        (
            {},
            shapes("diffusion_model.double_stream_modulation_img.lin.lora_A.weight"),
            "Flux.2 (by its keys and shapes)",
        ),
        ({}, shapes("distilled_guidance_layer.a", "double_blocks.0.a"), "Chroma (by its keys and shapes)"),
        ({}, shapes("lora_unet_joint_blocks_0_a"), "Stable Diffusion 3 (by its keys and shapes)"),
        ({}, shapes("transformer.single_transformer_blocks.0.a"), "Flux (by its keys and shapes)"),
        ({}, shapes("double_blocks.0.a", "single_transformer_blocks.0.a"), "Flux (by its keys and shapes)"),
        ({}, shapes("txt_in.individual.token_refiner.a"), "HunyuanVideo (by its keys and shapes)"),
        ({}, shapes("noise_refiner.0.a"), "Lumina 2 or Z-Image (by its keys and shapes)"),
        (
            {},
            shapes("blocks.0.self_attn.q.a", "blocks.0.cross_attn.k_img.a"),
            "Wan, from pictures (by its keys and shapes)",
        ),
        ({}, shapes("transformer_blocks.0.img_mod.1.a"), "Qwen-Image (by its keys and shapes)"),
        ({}, shapes("lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight"), ""),
        ({}, [], ""),
    ],
)
def test_bases(metadata: dict[str, str], found: Any, expected: str) -> None:
    assert base_of(metadata, found) == expected


def notes(module: str, **tensors: torch.Tensor) -> list[str]:
    own = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    keys = {f"{module}.{name}": f"{module}.{name}" for name in own}
    return other_readers.told([(module, own.keys())], keys, {f"{module}.{k}": t for k, t in own.items()}, {})


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ({"lora_up__weight": torch.ones(1), "alpha": torch.ones(())}, ""),
        ({"hada_w1_a": torch.ones(1)}, "diffusers does not read LoHa"),
        ({"lokr_w1": torch.ones(1), "lokr_t2": torch.ones(1)}, "LoKr with a Tucker factor otherwise"),
        ({"weight": torch.ones(1), "on_input": torch.ones(1)}, "ComfyUI does not read (IA)3"),
        ({"dora_scale": torch.ones(4, 1)}, "magnitude for each output otherwise"),
        ({"dora_scale": torch.ones(1, 4)}, "diffusers drops the magnitudes of DoRA"),
        ({"oft_blocks": torch.ones(1), "alpha": torch.tensor(0.1)}, "leaves out the constraint"),
        ({"oft_blocks": torch.ones(1), "alpha": torch.tensor(0.0)}, "diffusers does not read OFT"),
    ],
)
def test_other_readers(tensors: dict[str, torch.Tensor], told: str) -> None:
    found = notes("lora_unet_a", **tensors)
    assert (told == "" and found == []) or any(told in sentence for sentence in found)
    assert any("otherwise" in one and "output" in one for one in found) == (
        told == "magnitude for each output otherwise"
    )


@pytest.mark.parametrize(("layer", "dropped"), [("resnets_0_conv1", True), ("attentions_0_proj_in", False)])
def test_rotations_of_convolutions_that_sd_scripts_drops(layer: str, dropped: bool) -> None:
    told = "sd-scripts drops OFT of convolutions whose names are diffusers'"
    found = notes(f"oft_unet_down_blocks_0_{layer}", oft_blocks=torch.ones(1), alpha=torch.tensor(0.1))
    assert "ComfyUI does not read oft_unet_" in found
    assert (told in found) is dropped


def test_a_load_tells_of_alphas_that_diffusers_mixes_up() -> None:
    tensors: dict[str, torch.Tensor] = {}
    for place, name in enumerate(("to_q", "to_k")):
        module = f"lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_{name}"
        tensors |= {f"{module}.lora_down.weight": torch.ones(2, 8), f"{module}.lora_up.weight": torch.ones(8, 2)}
        tensors[f"{module}.alpha"] = torch.tensor(1.0 + place)
    [note] = ak.Adapters(unet()).load(tensors, "it").notes
    assert note.startswith("diffusers reads the attentions with one alpha")
