"""Files without a model: what is written has the names that were read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapterkit_vera.vera import VeRA
from safetensors.torch import load_file, save_file

import adapterkit as ak
from adapterkit.errors import BaseNeededError, UnsupportedFileError
from adapterkit.testing import toys
from adapterkit.tools.files import read, write
from adapterkit.tools.places import places
from adapterkit.tools.ranks import RankRule
from adapterkit.tools.resize import resize
from tests.tools import adapters

NAMES = {
    "kohya": ("lora_unet_down_blocks_0_attn1_to_q", "lora_te1_text_model_encoder_layers_0_mlp_fc1", "lora_te2_x_conv"),
    "comfy": (
        "diffusion_model.blocks.0.attn.qkv",
        "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1",
    ),
}


def foreign(style: str, path: Path) -> Path:
    tensors = {}
    generator = torch.Generator().manual_seed(0)
    for number, name in enumerate(NAMES[style]):
        kernel = (3, 3) if "conv" in name else ()
        tensors[f"{name}.lora_down.weight"] = torch.randn(4, 6 + number, *kernel, generator=generator)
        tensors[f"{name}.lora_up.weight"] = torch.randn(8, 4, *(1 for _ in kernel), generator=generator)
        tensors[f"{name}.alpha"] = torch.tensor(2.0)
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("style", NAMES)
def test_a_file_of_scripts_and_uis_comes_back(tmp_path: Path, style: str):
    path = foreign(style, tmp_path / "a.safetensors")
    loaded = read(path)
    assert loaded.report.format == style
    write(loaded.checkpoint, tmp_path / "b.safetensors", format=style, came_from=style)
    before, after = load_file(path), load_file(tmp_path / "b.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name


@pytest.mark.parametrize("style", NAMES)
def test_a_resized_file_is_the_best_there_is(tmp_path: Path, style: str):
    path = foreign(style, tmp_path / "a.safetensors")
    small = resize(read(path).checkpoint, RankRule(rank=2))
    write(small.checkpoint, tmp_path / "b.safetensors", format=style, came_from=style)
    before, after = load_file(path), load_file(tmp_path / "b.safetensors")
    for name in NAMES[style]:
        whole, now = (
            each[f"{name}.alpha"]
            / len(each[f"{name}.lora_down.weight"])
            * each[f"{name}.lora_up.weight"].flatten(1)
            @ each[f"{name}.lora_down.weight"].flatten(1)
            for each in (before, after)
        )
        u, s, vh = torch.linalg.svd(whole, full_matrices=False)
        torch.testing.assert_close(now, (u[:, :2] * s[:2]) @ vh[:2], atol=1e-4, rtol=1e-4)
        assert after[f"{name}.lora_down.weight"].shape[1:] == before[f"{name}.lora_down.weight"].shape[1:]


def test_other_formats_call_modules_otherwise(tmp_path: Path):
    loaded = read(foreign("kohya", tmp_path / "a.safetensors"))
    with pytest.raises(BaseNeededError, match="kohya and comfy"):
        write(loaded.checkpoint, tmp_path / "b.safetensors", format="comfy", came_from="kohya")
    write(loaded.checkpoint, tmp_path / "b.safetensors", came_from="kohya")
    again = read(tmp_path / "b.safetensors")
    assert again.checkpoint.tensors.keys() == loaded.checkpoint.tensors.keys()
    native = adapters.checkpoint(ak.LoRA(rank=2, targets="attn.q"))
    with pytest.raises(ak.CheckpointError, match="the model is needed"):
        write(native, tmp_path / "c.safetensors", format="kohya", came_from="kohya")


def test_what_cannot_be_written_without_the_model_is_not_left_out(tmp_path: Path):
    parts = [
        adapters.checkpoint(one).part for one in (ak.LoRA(rank=2, targets="attn.q"), VeRA(rank=2, targets="mlp.up"))
    ]
    both = adapters.checkpoint(ak.LoRA(rank=2, targets="attn.q")).replace(parts=parts)
    with pytest.raises(BaseNeededError, match=r"mlp\.up@toy\.0"):
        write(both, tmp_path / "a", format="peft", came_from="peft")
    assert not (tmp_path / "a").exists()


def test_several_adapters_are_no_one(tmp_path: Path):
    toys.register()
    handle = ak.Adapters(toys.ToyModel())
    for name in ("a", "b"):
        handle.add(name, ak.LoRA(rank=2, targets="attn.q"))
    loaded = read(handle.save(["a", "b"], tmp_path / "a.safetensors"))
    assert [*loaded.adapters] == ["a", "b"]
    with pytest.raises(UnsupportedFileError, match="several adapters"):
        _ = loaded.checkpoint


def test_the_widest_dtype(tmp_path: Path):
    path = foreign("kohya", tmp_path / "a.safetensors")
    assert read(path).dtype == torch.float32
    halves = {name: tensor.half() for name, tensor in load_file(path).items()}
    save_file(halves, path)
    assert read(path).dtype in (torch.float16, torch.float32)
    save_file({name: tensor.bfloat16() for name, tensor in halves.items() if "alpha" not in name}, path)
    assert read(path).dtype == torch.bfloat16


def test_blocks_and_roles_of_names_in_files():
    names = [
        f"down_blocks_{i}_attentions_0_transformer_blocks_0_{role}"
        for i in (0, 1)
        for role in ("attn1_to_q", "attn1_to_out_0", "ff_net_0_proj", "ff_net_2")
    ]
    found = places(
        [*(f"linear@lora_unet.{name}" for name in names), "attn.q@unet.down.0.1.0", "conv@lora_unet.conv_in"]
    )
    block = "down_blocks_1_attentions_0_transformer_blocks_0"
    here = {one.role for one in found.values() if one.block == block}
    assert here == {"attn1_to_q", "attn1_to_out_0", "ff_net_0_proj", "ff_net_2"}
    assert found["attn.q@unet.down.0.1.0"].block == "down.0.1.0"
    assert (found["conv@lora_unet.conv_in"].block, found["conv@lora_unet.conv_in"].role) == ("", "conv_in")
