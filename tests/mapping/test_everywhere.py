"""Norms, hidden states and prompts of every family: where they are, and which tags they have."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import adapterkit as ak
from adapterkit.mapping.everywhere import is_norm
from adapterkit.testing import families, models


@pytest.mark.parametrize("name", [one.name for one in models.EXAMPLES])
def test_norms_of_the_tiny_models(name: str) -> None:
    families.register()
    [example] = [one for one in models.EXAMPLES if one.name == name]
    model = example.make()
    found = {point.path: point for point in ak.points(model, "norm")}
    expected = {path for path, module in model.named_modules() if isinstance(module, (nn.LayerNorm, nn.GroupNorm))}
    assert set(found) == expected
    for path, point in found.items():
        assert point.shape == tuple(model.get_submodule(path).weight.shape)  # type: ignore[union-attr]
        assert point.tags.get("layer") == (int(path.split(".")[1]) if path.startswith("blocks.") else None)


def test_stages_of_a_unet() -> None:
    diffusers = pytest.importorskip("diffusers")
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=8, norm_num_groups=4, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    for point in ak.points(unet, "norm"):
        stage = point.path.split("_")[0]
        assert point.tags.get("stage") == (stage if stage in ("down", "mid", "up") else None), point.path


def test_what_is_a_norm() -> None:
    class RMS(nn.Module):
        def __init__(self, attribute: str) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))
            setattr(self, attribute, 1e-6)

    assert all(map(is_norm, (nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.BatchNorm2d(4), nn.RMSNorm(4), RMS("eps"))))
    assert is_norm(RMS("variance_epsilon"))
    others = (nn.Linear(4, 4), nn.LayerNorm(4, elementwise_affine=False), RMS("scale"), nn.Embedding(2, 4), nn.PReLU(4))
    assert not any(map(is_norm, others))


def test_adapted_norms_are_norms_still() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=11))
    adapters = ak.Adapters(model)
    first, second = (adapters.add(name, ak.Trainable("norm")).points for name in ("first", "second"))
    assert first == second == {"norm": 3}
    assert len(ak.points(model, "norm")) == 3


def test_blocks_lie_around_their_sublayers() -> None:
    families.register()
    points = ak.points(models.EXAMPLES[1].make())
    hidden = [point for point in points if point.role == "hidden"]
    assert [(point.path, point.tags["layer"]) for point in hidden] == [("blocks.0", 0), ("blocks.1", 1)]
    assert all(point.layout.whole for point in hidden)  # type: ignore[union-attr]
    assert [point.path for point in points if point.role == "prompt.layer"] == ["blocks.0", "blocks.1"]
