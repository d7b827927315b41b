"""What is in the files below `fixtures`: which adapters, and on which models.

All numbers follow from a formula, not from a random generator. The files were written by the release at d0ce48d, which
evaluated the models too: `expected.safetensors` has each adapter's output, as `file/adapter`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import adapterkit as ak

_SIZES: dict[str, Any] = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
_HEADS: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32}
_BLOCKS: dict[str, Any] = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
_WIDTHS: dict[str, Any] = {"block_out_channels": (4,)}
_UNET: dict[str, Any] = {"layers_per_block": 1, "norm_num_groups": 2, "cross_attention_dim": 4, "attention_head_dim": 2}


def fill(tensors: Iterable[Tensor], scale: float) -> None:
    """Values that differ everywhere, the same on every machine."""
    with torch.no_grad():
        for number, tensor in enumerate(tensors):
            steps = torch.arange(tensor.numel(), dtype=torch.float64)
            tensor.copy_((scale * torch.sin(1.7 * number + 0.37 * steps + 0.1)).view(tensor.shape))


def llama() -> Any:
    model = LlamaForCausalLM(LlamaConfig(**_SIZES, **_HEADS, pad_token_id=0)).eval()
    fill(model.parameters(), 0.4)
    return model


def unet() -> Any:
    sizes: dict[str, Any] = {"sample_size": 4, "in_channels": 2, "out_channels": 2, "mid_block_type": None}
    model = UNet2DConditionModel(**sizes, **_BLOCKS, **_WIDTHS, **_UNET).eval()
    fill(model.parameters(), 0.4)
    return model


def _logits(model: nn.Module) -> Tensor:
    return model(input_ids=torch.tensor([[3, 5, 2, 7, 11]])).logits


def _noise(model: nn.Module) -> Tensor:
    sample, text = (torch.linspace(-1, 1, n) for n in (32, 8))
    return model(sample.view(1, 2, 4, 4), torch.tensor(3), text.view(1, 2, 4)).sample


@dataclass(frozen=True)
class Written:
    """One file: the model, one evaluation of it, and the adapters in the file."""

    build: Callable[[], Any]
    evaluate: Callable[[nn.Module], Tensor]
    configs: Mapping[str, ak.AdapterConfig]


WRITTEN: Mapping[str, Written] = {
    "lora": Written(llama, _logits, {"lora": ak.LoRA(rank=2, alpha=3, targets="attn.{q,v}")}),
    "ranks": Written(
        llama,
        _logits,
        {
            "ranks": ak.LoRA(
                rank=2,
                targets="attn.* mlp.{up,down}",
                ranks={"attn.q": 1, "*@layer=1": 3, "mlp.up@layer=1": 1},
                alphas={"mlp.*": 0.5, "attn.v": 4},
                scaling="rank_stabilized",
            )
        },
    ),
    "prefix": Written(llama, _logits, {"prefix": ak.Prefix(length=2)}),
    "bottleneck": Written(llama, _logits, {"bottleneck": ak.Bottleneck(reduction=4)}),
    "bundle": Written(
        llama,
        _logits,
        {
            "one": ak.LoRA(rank=1),
            "two": ak.Bottleneck(reduction=4, targets="mlp"),
            "three": ak.DoRA(rank=1, targets="mlp.up"),
        },
    ),
    "conv": Written(unet, _noise, {"conv": ak.LoRA(rank=1, targets="res.conv1 res.conv2 res.time")}),
}
