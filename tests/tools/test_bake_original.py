"""Checkpoints that UIs load: what was baked is what diffusers' own conversion makes a merged pipeline of."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders import single_file_utils as diffusers_names
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.errors import ModelNotFoundError, NotMergeableError
from adapterkit.formats.foreign_names import ForeignNames
from adapterkit.handle.view import seen
from adapterkit.mapping.model import map_model
from adapterkit.tools.bake import bake
from adapterkit.tools.base import open_base
from adapterkit.tools.files import read, write
from tests.formats.pipelines import PIPELINES, randomise

LORA = ak.LoRA(rank=2, alpha=1.5, targets="attn.* cross.* mlp.* proj.* res.*")
PREFIXES = {
    "sd1": {"unet": "model.diffusion_model.", "text_encoder": "cond_stage_model.transformer."},
    "sdxl": {"unet": "model.diffusion_model.", "text_encoder": "conditioner.embedders.0.transformer."},
}
OPEN_CLIP = "conditioner.embedders.1.model."


def original(pipe: Any, kind: str) -> dict[str, Tensor]:
    """The pipeline's weights as an original checkpoint has them, with a decoder that nobody adapts."""
    model = seen(map_model(pipe)).model
    assert model is not None
    found = {"first_stage_model.decoder.conv_in.weight": torch.ones(2, 2)}
    for name, prefix in PREFIXES[kind].items():
        part = getattr(pipe, name)
        for foreign, [piece] in ForeignNames(model.components[name]).written("comfy"):
            for own, parameter in part.get_submodule(piece.path)._parameters.items():
                if parameter is not None:
                    found.setdefault(f"{prefix}{foreign}.{own}", parameter.detach().clone())
    return found | (open_clip(pipe.text_encoder_2) if kind == "sdxl" else {})


def open_clip(model: nn.Module) -> dict[str, Tensor]:
    own = {name.removeprefix("text_model."): tensor.clone() for name, tensor in model.state_dict().items()}
    found = {
        "token_embedding.weight": own["embeddings.token_embedding.weight"],
        "positional_embedding": own["embeddings.position_embedding.weight"],
        "text_projection": own["text_projection.weight"].mT.contiguous(),
        "ln_final.weight": own["final_layer_norm.weight"],
        "ln_final.bias": own["final_layer_norm.bias"],
    }
    pairs = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    pairs["self_attn.out_proj"] = "attn.out_proj"
    for layer in range(model.config.num_hidden_layers):  # type: ignore[union-attr]
        for kind in ("weight", "bias"):
            block, there = f"encoder.layers.{layer}", f"transformer.resblocks.{layer}"
            fused = [own[f"{block}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            found[f"{there}.attn.in_proj_{kind}"] = torch.cat(fused)
            found |= {f"{there}.{theirs}.{kind}": own[f"{block}.{ours}.{kind}"] for ours, theirs in pairs.items()}
    return {f"{OPEN_CLIP}{key}": value for key, value in found.items()}


def converted(tensors: dict[str, Tensor], pipe: Any, kind: str) -> dict[str, dict[str, Tensor]]:
    """Component -> its state dict, as diffusers converts a checkpoint."""
    found = {"unet": diffusers_names.convert_ldm_unet_checkpoint(dict(tensors), dict(pipe.unet.config))}
    prefix = PREFIXES[kind]["text_encoder"]
    found["text_encoder"] = diffusers_names.convert_ldm_clip_checkpoint(dict(tensors), remove_prefix=prefix)
    if kind == "sdxl":
        found["text_encoder_2"] = diffusers_names.convert_open_clip_checkpoint(
            pipe.text_encoder_2, dict(tensors), OPEN_CLIP
        )
    return found


@pytest.mark.parametrize("format", ["native", "kohya"])
@pytest.mark.parametrize("kind", PREFIXES)
def test_diffusers_converts_it_to_the_merged_pipeline(kind: str, format: str, tmp_path: Path):
    pipe = PIPELINES[kind]()
    base = tmp_path / "base.safetensors"
    save_file(original(pipe, kind), base, {"modelspec.hash_sha256": "0x1", "modelspec.title": "tiny"})
    adapters = ak.Adapters(pipe)
    adapters.add("a", LORA)
    randomise(adapters)
    file = adapters.save("a", tmp_path / "a.safetensors", format=format)
    adapters.bake("a")
    opened = open_base(str(base))
    assert {point.id for point in opened.points} >= {
        point.id for point in seen(map_model(PIPELINES[kind]())) if point.kind == "weight"
    }
    done = bake(opened, base, read(file, opened.points).checkpoint, tmp_path / "out.safetensors")
    assert done.files == ["out.safetensors"]
    found = load_file(tmp_path / "out.safetensors")
    assert found.keys() == load_file(base).keys()
    for component, state in converted(found, pipe, kind).items():
        model = copy.deepcopy(getattr(pipe, component))
        wanted = {key: value.clone() for key, value in model.state_dict().items()}
        nested = any(key.startswith("text_model.") for key in wanted)
        own = {key if nested else key.removeprefix("text_model."): value for key, value in state.items()}
        compared = 0
        for key, value in wanted.items():
            if key in own:
                compared += 1
                torch.testing.assert_close(own[key].view(value.shape), value, atol=1e-7, rtol=1e-6)
        assert compared > 0.9 * len(wanted)
        assert sum(not torch.equal(a, b) for a, b in zip(wanted.values(), _fresh(kind, component), strict=True)) > 10


def _fresh(kind: str, component: str) -> list[Tensor]:
    return list(getattr(PIPELINES[kind](), component).state_dict().values())


def test_flux(tmp_path: Path):
    from tests.backends.diffusion_models import flux

    torch.manual_seed(0)
    model: Any = flux()
    view = seen(map_model(model)).model
    assert view is not None
    [component] = view.components.values()
    tensors: dict[str, Tensor] = {}
    for foreign, pieces in ForeignNames(component).written("comfy"):
        for own in ("weight", "bias"):
            parts = [getattr(model.get_submodule(piece.path), own, None) for piece in pieces]
            if all(isinstance(part, Tensor) for part in parts):
                swapped = [
                    torch.cat(list(reversed(part.chunk(2)))) if piece.halves_swapped else part
                    for part, piece in zip(parts, pieces, strict=True)
                ]  # type: ignore[union-attr]
                tensors[f"{foreign}.{own}"] = torch.cat(swapped).detach().clone()
    for name in [key for key in tensors if key.endswith("_norm.weight")]:
        tensors[name.replace("_norm.weight", "_norm.scale")] = tensors.pop(name)
    save_file(tensors, tmp_path / "base.safetensors")
    adapters = ak.Adapters(model)
    adapters.add("a", ak.LoRA(rank=2, targets="attn.* mlp.* mod.*"))
    randomise(adapters)
    checkpoint = adapters.checkpoint("a")
    opened = open_base(str(tmp_path / "base.safetensors"))
    write(checkpoint, tmp_path / "ui.safetensors", format="kohya", points=seen(map_model(model)))
    again = read(tmp_path / "ui.safetensors", opened.points).checkpoint
    bake(opened, tmp_path / "base.safetensors", again, tmp_path / "out.safetensors")
    adapters.bake("a")
    state = opened.models["transformer"]
    baked = open_base(str(tmp_path / "out.safetensors")).models["transformer"]
    changed = 0
    for name, parameter in model.named_parameters():
        if "norm_q" in name or "norm_k" in name or "norm_added" in name:
            continue
        torch.testing.assert_close(baked.read(name), parameter.detach(), atol=1e-6, rtol=1e-5)
        changed += not torch.equal(baked.read(name), state.read(name))
    assert changed > 20


def test_what_is_no_checkpoint_that_is_known(tmp_path: Path):
    save_file({"x": torch.ones(1)}, tmp_path / "a.safetensors")
    with pytest.raises(ModelNotFoundError, match="no checkpoint of Stable Diffusion"):
        open_base(str(tmp_path / "a.safetensors"))


def test_a_quantized_checkpoint_is_refused(tmp_path: Path):
    pipe = PIPELINES["sd1"]()
    tensors = original(pipe, "sd1")
    coded = {key: value.to(torch.float8_e4m3fn) if value.ndim > 1 else value for key, value in tensors.items()}
    save_file(coded, tmp_path / "base.safetensors")
    adapters = ak.Adapters(pipe)
    adapters.add("a", LORA)
    opened = open_base(str(tmp_path / "base.safetensors"))
    with pytest.raises(NotMergeableError, match="take an unquantized base"):
        bake(opened, tmp_path / "base.safetensors", adapters.checkpoint("a"), tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
