"""Readers of features see tokens alone, whatever prompts stand beside them."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import adapterkit as ak
from tests.values import randomize

timm = pytest.importorskip("timm")
t = pytest.importorskip("transformers")
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
PROMPTS = ("prompt", "prompt.layer")


def vit(**options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2}
    return timm.models.vision_transformer.VisionTransformer(**{**sizes, **options}).eval()


def prompted(model: Any, target: str = "prompt") -> ak.Adapters:
    adapters = ak.Adapters(model)
    adapters.add("p", ak.Prompt(length=3, targets=target))
    randomize(adapters, "p")
    return adapters


def as_map(tokens: Tensor, side: int = 4) -> Tensor:
    return tokens.unflatten(1, (side, side)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("registers", [0, 2])
@pytest.mark.parametrize("target", PROMPTS)
def test_intermediate_features_of_timm(target: str, registers: int) -> None:
    model = vit(reg_tokens=registers, global_pool="avg" if registers else "token")
    adapters = prompted(model, target)
    first, seen = 1 + registers, []
    hooks = [block.register_forward_hook(lambda m, a, y: seen.append(y[:, : first + 16])) for block in model.blocks]
    final = model.forward_features(IMAGES)
    for hook in hooks:
        hook.remove()
    for norm in (False, True):
        expected = [model.norm(y) if norm and target == PROMPTS[1] else y for y in seen]
        if norm and target == PROMPTS[0]:
            with adapters.disabled():  # the last norm takes the prompt off what passes it
                expected = [model.norm(y) for y in seen]
        last, maps = model.forward_intermediates(IMAGES, norm=norm)
        assert torch.equal(last, final)
        assert all(torch.allclose(one, as_map(y[:, first:]), atol=1e-6) for one, y in zip(maps, expected, strict=True))
        flat = model.forward_intermediates(IMAGES, [0, 2], True, norm, True, "NLC", True)
        for (tokens, prefix), y in zip(flat, (expected[0], expected[2]), strict=True):
            assert torch.allclose(torch.cat([prefix, tokens], dim=1), y, atol=1e-6)
        told = model.forward_intermediates(IMAGES, indices=1, norm=norm, output_dict=True, return_prefix_tokens=True)
        assert torch.equal(told["image_features"], final)
        assert told["image_intermediates"][0].shape == (2, 16, 4, 4)
        assert told["image_intermediates_prefix"][0].shape == (2, first, 16)
        [(dense, prefix)] = model.get_intermediate_layers(
            IMAGES, n=1, reshape=True, return_prefix_tokens=True, norm=norm
        )
        assert torch.allclose(dense, as_map(expected[2][:, first:]), atol=1e-6)
        assert prefix.shape == (2, first, 16)


def test_other_sizes_checkpoints_and_copies() -> None:
    model = vit(dynamic_img_size=True)
    adapters = prompted(model)
    [wide] = model.forward_intermediates(torch.randn(1, 3, 48, 32), [1], intermediates_only=True)
    assert wide.shape == (1, 16, 6, 4)
    before = model.forward_intermediates(IMAGES)[1]
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(map(torch.equal, twin.forward_intermediates(IMAGES)[1], before))
        assert twin.forward_intermediates.module is twin
    model.set_grad_checkpointing(True)
    assert all(map(torch.equal, model.train().forward_intermediates(IMAGES)[1], before))
    with adapters.disabled():
        base = model.eval().forward_intermediates(IMAGES)[1]
    assert not torch.equal(base[1], before[1])
    adapters.detach()
    assert "forward_intermediates" not in vars(model)
    assert all(map(torch.equal, model.forward_intermediates(IMAGES)[1], base))


def test_features_only() -> None:
    net = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3, features_only=True, out_indices=(0, 2)).eval()
    images = torch.randn(1, 3, 64, 64)
    base = net(images)
    prompted(net.model)
    maps = net(images)
    assert [one.shape for one in maps] == [one.shape for one in base]
    assert not torch.allclose(maps[0], base[0], atol=1e-3)


SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 3}
SIZES |= {"image_size": 32, "patch_size": 8}
STAGES = {"out_features": ["stage1", "stage3"], "reshape_hidden_states": True}
BACKBONES = {
    "Dinov2": lambda: t.Dinov2Backbone(t.Dinov2Config(**SIZES, **STAGES)),
    "Dinov2 with registers": lambda: t.Dinov2WithRegistersBackbone(
        t.Dinov2WithRegistersConfig(**SIZES, **STAGES, num_register_tokens=2)
    ),
    "Dinov3": lambda: t.DINOv3ViTBackbone(t.DINOv3ViTConfig(**SIZES, num_register_tokens=2, out_features=["stage3"])),
}


@pytest.mark.parametrize("target", PROMPTS)
@pytest.mark.parametrize("name", BACKBONES)
def test_maps_of_backbones(name: str, target: str) -> None:
    torch.manual_seed(0)
    model: Any = BACKBONES[name]().eval()
    base = model(IMAGES)
    adapters = prompted(model, target)
    seen = model(IMAGES, output_hidden_states=True)
    assert [one.shape for one in seen.feature_maps] == [one.shape for one in base.feature_maps]
    norm = model.layernorm if hasattr(model, "layernorm") else model.norm
    assert torch.allclose(seen.feature_maps[-1], as_map(norm(seen.hidden_states[-1])[:, -16:]), atol=1e-6)
    assert not torch.allclose(seen.feature_maps[-1], base.feature_maps[-1], atol=1e-3)
    assert model(torch.randn(1, 3, 48, 48)).feature_maps[-1].shape[-2:] == (6, 6)
    adapters.detach()
    assert torch.equal(model(IMAGES).feature_maps[-1], base.feature_maps[-1])


@pytest.mark.parametrize("target", PROMPTS)
@pytest.mark.parametrize("name", ["ViT", "CLIPVision", "SiglipVision", "DINOv3ViT"])
def test_hidden_states_are_those_of_tokens(name: str, target: str) -> None:
    torch.manual_seed(0)
    model = getattr(t, f"{name}Model")(getattr(t, f"{name}Config")(**SIZES)).eval()
    base = model(IMAGES, output_hidden_states=True)
    adapters = prompted(model, target)
    layer, seen = next(m for path, m in model.named_modules() if path.endswith(("layers.1", "layer.1"))), []
    layer.register_forward_hook(lambda m, a, y: seen.append(y[0] if isinstance(y, tuple) else y))
    found = model(IMAGES, output_hidden_states=True)
    assert [h.shape for h in found.hidden_states] == [h.shape for h in base.hidden_states]
    length, at = base.hidden_states[2].shape[1], 3 if name == "DINOv3ViT" and target == "prompt" else 0
    assert torch.equal(found.hidden_states[2], seen[0][:, at : at + length])
    with adapters.disabled():
        assert torch.equal(model(IMAGES).last_hidden_state, base.last_hidden_state)
