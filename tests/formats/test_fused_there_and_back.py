"""Updates of fused layers (GEGLU's two halves) that cannot be split are read whole, and written as they came."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import adapterkit as ak
from tests.formats.pipelines import unet

NAME = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_ff_net_0_proj"
SHAPES = {
    "dora": {"lora_down.weight": (2, 4), "lora_up.weight": (32, 2), "dora_scale": (32, 1)},
    "loha": {"hada_w1_a": (32, 2), "hada_w1_b": (2, 4), "hada_w2_a": (32, 2), "hada_w2_b": (2, 4)},
    "glora": {"a1.weight": (4, 2), "a2.weight": (2, 4), "b1.weight": (32, 2), "b2.weight": (2, 4)},
    "ia3": {"weight": (32,)},
}


@pytest.mark.parametrize("name", SHAPES)
def test_what_was_read_at_a_fused_layer_is_written_again(tmp_path: Path, name: str) -> None:
    tensors = {f"{NAME}.{end}": torch.randn(shape) for end, shape in SHAPES[name].items()}
    tensors[f"{NAME}.{'on_input' if name == 'ia3' else 'alpha'}"] = torch.tensor(0 if name == "ia3" else 1.5)
    save_file(tensors, str(tmp_path / "a.safetensors"))
    adapters = ak.Adapters(unet())
    adapters.load(tmp_path / "a.safetensors", "a")
    adapters.save("a", tmp_path / "b.safetensors", format="lycoris")
    torch.testing.assert_close(load_file(str(tmp_path / "b.safetensors")), tensors)
