"""A model that others write, copy or take parts of while adapters are attached."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import adapterkit as ak
from tests.values import randomize

IDS = torch.arange(8)[None]
SIZES: Any = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(num_attention_heads=2, **SIZES)).eval()


def adapted(config: ak.AdapterConfig | None = None) -> tuple[Any, ak.Adapters]:
    model = llama()
    adapters = ak.Adapters(model)
    adapters.add("x", config or ak.LoRA(rank=2, targets="linear"))
    randomize(adapters, "x")
    return model, adapters


def keys_in(folder: Path, name: str = "model") -> set[str]:
    with safe_open(folder / f"{name}.safetensors", "pt") as file:
        return set(file.keys())


@pytest.mark.parametrize("config", [ak.LoRA(rank=2), ak.Prefix(length=2), ak.Compacter(n=2)])
def test_save_pretrained_writes_the_base_and_says_so(config: ak.AdapterConfig, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    base = {*llama().state_dict()}
    model, adapters = adapted(config)
    assert inspect.signature(model.save_pretrained) == inspect.signature(type(model).save_pretrained.__get__(model))
    with pytest.warns(UserWarning, match=r"without the adapters on it \('x'\).*bake\(\)"):
        model.save_pretrained(tmp_path)
    assert keys_in(tmp_path) == base
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    again, info = loaded
    assert not any(info.values())
    with adapters.disabled():
        assert torch.equal(again.eval()(IDS).logits, model(IDS).logits)
    path = adapters.save("x", tmp_path / "x.safetensors")
    other = ak.Adapters(again)
    other.load(path, "x")
    other.activate("x")
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    adapters.detach()
    assert "save_pretrained" not in vars(model)
    model.save_pretrained(tmp_path)  # without a word


def test_merged_weights_are_written_as_the_bases_own(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, adapters = adapted()
    base = {*llama().state_dict()}
    y = model(IDS).logits
    with adapters.merged():
        assert {*model.state_dict()} == base
        model.save_pretrained(tmp_path)
        again: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(again.eval()(IDS).logits, model(IDS).logits)
    assert {*model.state_dict()} > base
    assert torch.equal(model(IDS).logits, y)


def test_the_whole_state_has_the_adapters_and_comes_back(tmp_path: Path) -> None:
    model, _ = adapted()
    state = copy.deepcopy(model.state_dict())
    other, _ = adapted()
    randomize(ak.Adapters(other), "x", 5)
    other.load_state_dict(state)
    assert torch.equal(other(IDS).logits, model(IDS).logits)
    assert {*torch.nn.Sequential(model).state_dict()} == {f"0.{key}" for key in state}
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict(llama().state_dict())
    model.save_pretrained(tmp_path, state_dict={**state})  # who gives one says what is written
    assert keys_in(tmp_path) == {*state}


def test_a_part_gives_the_bases_own_and_takes_them() -> None:
    model, _ = adapted()
    plain = llama()
    y = model(IDS).logits
    with pytest.warns(UserWarning, match="the state dict of a part"):
        state = model.model.layers.state_dict()
    plain.model.layers.load_state_dict(state)
    with pytest.warns(UserWarning, match="the state dict of a part"):
        layer = model.model.layers[0].self_attn.q_proj.state_dict()
    assert [*layer] == ["weight"]
    model.model.layers.load_state_dict(plain.model.layers.state_dict())
    assert torch.equal(model(IDS).logits, y)


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_write_themselves(way: str, tmp_path: Path) -> None:
    model, _ = adapted()
    copied = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    y = copied(IDS).logits
    assert torch.equal(y, model(IDS).logits)
    with torch.no_grad():
        copied.lm_head.weight += 1.0
    with pytest.warns(UserWarning, match="without the adapters"):
        copied.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("lm_head.weight"), copied.lm_head.weight)
    ak.Adapters(copied).detach()
    ak.Adapters(model).detach()
    assert not {*vars(copied), *vars(model)} & {"save_pretrained"}


def unet() -> Any:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    torch.manual_seed(0)
    sizes: Any = {"block_out_channels": (8, 8), "norm_num_groups": 4, "cross_attention_dim": 8, "layers_per_block": 1}
    blocks: Any = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return UNet2DConditionModel(attention_head_dim=4, **sizes, **blocks).eval()


@pytest.mark.parametrize("merged", [False, True])
def test_a_controlnet_begins_with_the_weights_of_an_adapted_unet(merged: bool, tmp_path: Path) -> None:
    from diffusers.models.controlnets.controlnet import ControlNetModel

    model = unet()
    adapters = ak.Adapters(model)
    adapters.add("x", ak.LoRA(rank=2, targets="attention res.*"))
    randomize(adapters, "x")
    before = {key: value.clone() for key, value in unet().state_dict().items()}
    if merged:
        adapters.merge()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        net = ControlNetModel.from_unet(model)
        model.save_pretrained(tmp_path)
    told = [str(one.message) for one in caught]
    assert any("a part" in one for one in told) == any("save_pretrained" in one for one in told) == (not merged)
    own = dict(model.state_dict())
    for key, value in net.down_blocks.state_dict().items():
        assert torch.equal(value, own[f"down_blocks.{key}"])
    assert keys_in(tmp_path, "diffusion_pytorch_model") == {*before}
    changed = [key for key in before if not torch.equal(own[key], before[key])]
    assert bool(changed) == merged


def test_another_pipeline_of_the_same_parts_has_the_adapters_too(tmp_path: Path) -> None:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

    pipe: Any = StableDiffusionPipeline.from_pretrained("examples/digits/base", safety_checker=None)
    adapters = ak.Adapters(pipe)
    adapters.add("x", ak.LoRA(rank=2, targets="attention"))
    randomize(adapters, "x")
    other: Any = StableDiffusionPipeline(**pipe.components)
    assert list(ak.Adapters(other)) == ["x"]
    with pytest.warns(UserWarning, match="without the adapters"):
        other.save_pretrained(tmp_path)
    assert not [key for key in keys_in(tmp_path / "text_encoder") if "adapterkit" in key]
    again: Any = StableDiffusionPipeline.from_pretrained(tmp_path, safety_checker=None)
    assert isinstance(state(again), Tensor)
    with adapters.disabled():
        assert torch.equal(state(again), state(pipe))


def state(pipe: Any) -> Tensor:
    with torch.no_grad():
        return pipe.encode_prompt(["a handwritten three"], "cpu", 1, False)[0]
