"""What a file of diffusers says of an adapter, bit for bit, and what it cannot say."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import adapterkit as ak
from adapterkit import errors
from adapterkit.formats.diffusers_modules import loses_nothing
from adapterkit.formats.registry import named_format
from adapterkit.formats.source import Source
from adapterkit.points import Points
from adapterkit.tools.files import made_up
from tests.backends import diffusion_models as models
from tests.formats.pipelines import clip, randomise, sd1, unet

ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"


def saved(model: Any, config: Any, folder: Path, **options: Any) -> tuple[ak.Adapters, Path]:
    adapters = ak.Adapters(model)
    adapters.add("a", config)
    randomise(adapters)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*has alpha in its metadata")
        return adapters, adapters.save("a", folder / "a.safetensors", format="diffusers", **options)


def fields(file: Path) -> dict[str, Any]:
    with safe_open(str(file), "pt") as opened:
        return json.loads(opened.metadata()["lora_adapter_metadata"])


def assert_same(adapters: ak.Adapters, file: Path) -> None:
    """What is read is what was written, bit for bit."""
    adapters.load(file, "b")
    first, second = adapters.modules("a"), adapters.modules("b")
    assert first.keys() == second.keys()
    for key, module in first.items():
        own, other = module.state_dict(), second[key].state_dict()
        assert own.keys() == other.keys()
        assert all(torch.equal(own[name], other[name]) for name in own), key


CONFIGS: dict[str, ak.AdapterConfig] = {
    "LoRA": ak.LoRA(rank=2, targets="attn.* cross.* mlp.down res.conv*"),
    "alpha that would cost bits": ak.LoRA(rank=3, alpha=1.0, targets="attn.* proj.*"),
    "ranks and alphas": ak.LoRA(
        rank=2, alpha=1.5, ranks={"attn.q": 3, "*@component=text_encoder": 1}, alphas={"attn.k": 0.7}, targets="attn.*"
    ),
    "DoRA": ak.DoRA(rank=2, alpha=1.1, targets="attn.* res.conv* proj.in"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_read_is_what_was_written(name: str, tmp_path: Path) -> None:
    assert_same(*saved(sd1(), CONFIGS[name], tmp_path))


def test_alpha_becomes_a_part_of_the_factors_where_that_costs_no_bit(tmp_path: Path) -> None:
    adapters, file = saved(unet(), ak.LoRA(rank=4, alpha=2.0, targets="attn.q"), tmp_path)
    module = next(iter(adapters.modules("a").values()))
    assert torch.equal(load_file(file)[f"unet.{ATTENTION}.to_q.lora_B.weight"], 0.5 * module.B)  # type: ignore[operator]
    assert (fields(file)["unet.r"], fields(file)["unet.lora_alpha"]) == (4, 4)


def test_alpha_stays_where_it_is_asked_to(tmp_path: Path) -> None:
    adapters, file = saved(unet(), ak.LoRA(rank=4, alpha=2.0, targets="attn.q"), tmp_path, fold=False)
    assert (fields(file)["unet.r"], fields(file)["unet.lora_alpha"]) == (4, 2)
    assert_same(adapters, file)


def test_who_reads_it_otherwise_is_told(tmp_path: Path) -> None:
    adapters = ak.Adapters(unet())
    adapters.add("a", ak.LoRA(rank=3, alpha=1.0, targets="attn.q"))
    randomise(adapters)
    with pytest.warns(UserWarning, match="take it for the rank"):
        adapters.save("a", tmp_path / "a.safetensors", format="diffusers")


def test_metadata_have_what_is_needed_and_no_more(tmp_path: Path) -> None:
    config = ak.LoRA(rank=2, ranks={"attn.k": 3}, alphas={"attn.q": 0.7}, targets="attn.*")
    _, file = saved(unet(), config, tmp_path)
    assert fields(file) == {
        "unet.target_modules": ["attn1.to_k", "attn1.to_out.0", "attn1.to_q", "attn1.to_v"],
        "unet.r": 2,
        "unet.rank_pattern": {"to_k": 3},
        "unet.lora_alpha": 2,
        "unet.alpha_pattern": {"to_k": 3, "to_q": 0.7},
    }


def test_names_are_those_of_every_transformers(tmp_path: Path) -> None:
    _, file = saved(
        sd1(), ak.LoRA(rank=2, ranks={"path:*0*.q_proj": 1}, targets="attn.q@component=text_encoder"), tmp_path
    )
    assert all(key.startswith("text_encoder.text_model.encoder.layers.") for key in load_file(file))
    assert not any("text_model" in str(value) for value in fields(file).values())


def test_magnitudes_of_a_text_encoder_have_the_name_that_is_not_lost(tmp_path: Path) -> None:
    _, file = saved(sd1(), ak.DoRA(rank=2, targets="attn.q"), tmp_path)
    ends = {(key.partition(".")[0], key.rpartition("lora_")[2]) for key in load_file(file)}
    assert ("unet", "magnitude_vector") in ends
    assert ("text_encoder", "magnitude_vector.weight") in ends


def test_without_attention_a_text_encoder_has_the_older_names(tmp_path: Path) -> None:
    adapters, file = saved(clip(8), ak.LoRA(rank=2, targets="mlp.up"), tmp_path)
    assert "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_linear_layer.up.weight" in load_file(file)
    assert_same(adapters, file)


def test_a_text_encoder_alone_is_named_by_what_it_is(tmp_path: Path) -> None:
    from transformers import CLIPTextModelWithProjection

    adapters, file = saved(clip(12, CLIPTextModelWithProjection), ak.LoRA(rank=2, targets="attn.q"), tmp_path)
    assert all(key.startswith("text_encoder_2.text_model.") for key in load_file(file))
    assert_same(adapters, file)


def with_biases(name: str) -> tuple[Any, ak.Adapters, dict[str, torch.Tensor]]:
    """An adapter with changes of biases beside LoRA: of all of a fused layer's rows, of columns, of none."""
    model = models.flux() if name == "flux" else unet()
    layers = {
        "flux": ("transformer", {"single_transformer_blocks.0.proj_out": (16, 80), "proj_out": (4, 16)}),
        "unet": ("unet", {f"{ATTENTION.removesuffix('attn1')}ff.net.0.proj": (32, 4), f"{ATTENTION}.to_q": (4, 4)}),
    }
    prefix, shapes = layers[name]
    noise = torch.Generator().manual_seed(2)
    tensors = {}
    for layer, (out, width) in shapes.items():
        out = model.get_submodule(layer).weight.shape[0]
        tensors[f"{prefix}.{layer}.lora_A.weight"] = torch.randn(2, width, generator=noise)
        tensors[f"{prefix}.{layer}.lora_B.weight"] = torch.randn(out, 2, generator=noise)
        tensors[f"{prefix}.{layer}.lora_B.bias"] = torch.randn(out, generator=noise)
    adapters = ak.Adapters(model)
    adapters.load(tensors, "a")
    return model, adapters, tensors


@pytest.mark.parametrize("name", ["flux", "unet"])
def test_biases_come_back(name: str, tmp_path: Path) -> None:
    model, adapters, tensors = with_biases(name)
    file = adapters.save("a", tmp_path / "a.safetensors", format="diffusers")
    written = load_file(file)
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[key], tensors[key]) for key in tensors)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    adapters.activate("a")
    adapters.merge()
    for key, bias in tensors.items():
        if key.endswith(".bias"):
            layer = key.partition(".")[2].removesuffix(".lora_B.bias")
            after = model.get_submodule(layer)
            if f"{layer}.bias" in before:
                torch.testing.assert_close(after.bias - before[f"{layer}.bias"], bias)


def test_what_is_dora_on_columns_is_read_as_weights() -> None:
    model = models.flux()
    layer = "single_transformer_blocks.0.proj_out"
    noise = torch.Generator().manual_seed(4)
    weight = model.get_submodule(layer).weight.clone()
    a, b = torch.randn(2, weight.shape[1], generator=noise), torch.randn(len(weight), 2, generator=noise)
    magnitude = torch.rand(len(weight), generator=noise)
    name = f"transformer.{layer}"
    adapters = ak.Adapters(model)
    report = adapters.load(
        {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b, f"{name}.lora_magnitude_vector": magnitude}, "a"
    )
    assert any("read as the weights" in note for note in report.notes)
    adapters.activate("a")
    adapters.merge()
    direction = weight + b @ a
    expected = magnitude[:, None] * direction / direction.norm(dim=1, keepdim=True)
    torch.testing.assert_close(model.get_submodule(layer).weight, expected)


FACTORS: dict[str, ak.AdapterConfig] = {
    "adalora": ak.AdaLoRA(rank=3, targets="attn.q"),
    "two of LoRA": ak.Union([ak.LoRA(rank=2, targets="attn.q"), ak.AdaLoRA(rank=2, targets="attn.q")]),
}


@pytest.mark.parametrize("name", FACTORS)
def test_what_has_factors_is_written_as_lora(name: str, tmp_path: Path) -> None:
    model = unet()
    adapters, file = saved(model, FACTORS[name], tmp_path)
    layer = model.get_submodule(f"{ATTENTION}.to_q")
    base, found = layer.weight.clone(), []
    adapters.load(file, "b")
    for one in ("a", "b"):
        adapters.activate(one)
        adapters.merge()
        found.append(model.get_submodule(f"{ATTENTION}.to_q").weight - base)
        adapters.unmerge()
    torch.testing.assert_close(*found)


def t5() -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    sizes = {"d_model": 12, "d_kv": 6, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 20}
    return T5EncoderModel(T5Config(**sizes)).eval().requires_grad_(False)


def both(text: str, encoder: nn.Module, denoiser: nn.Module) -> SimpleNamespace:
    return SimpleNamespace(components={text: encoder, "transformer": denoiser})


REFUSED: dict[str, tuple[Any, ak.AdapterConfig, str]] = {
    "keys and values": (unet, ak.Prefix(length=2, targets="attn.kv"), "native"),
    "a bottleneck": (unet, ak.Bottleneck(width=2, targets="attn"), "native"),
    "weights": (unet, ak.Trainable("attn.q", part="weight"), "native"),
    "biases alone": (unet, ak.Trainable("attn.o", part="bias"), "native and peft"),
    "LoRA and DoRA": (
        unet,
        ak.Union([ak.LoRA(rank=2, targets="attn.q"), ak.DoRA(rank=2, targets="attn.k")]),
        "native holds both",
    ),
    "a bias itself beside LoRA": (
        unet,
        ak.Union([ak.LoRA(rank=2, targets="attn.o"), ak.Trainable("attn.o", part="bias", absolute=True)]),
        "the bias itself is trained, .*native and peft hold it",
    ),
    "an own bias beside DoRA": (
        unet,
        ak.Union([ak.DoRA(rank=2, targets="attn.q"), ak.Trainable("attn.q", part="bias", absolute=True)]),
        "DoRA has no bias of B in its files; native holds it",
    ),
    "an own bias of no strength": (
        unet,
        ak.Union([ak.LoRA(rank=2, alpha=0.0, targets="attn.q"), ak.Trainable("attn.q", part="bias", absolute=True)]),
        "with an alpha of 0 a bias has no effect; native holds it",
    ),
    "a T5 beside Flux": (
        lambda: both("text_encoder_2", t5(), models.flux()),
        ak.LoRA(rank=2, targets="attn.q"),
        "diffusers loads no LoRA of 'text_encoder_2'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_cannot_say_is_refused(name: str, tmp_path: Path) -> None:
    make, config, told = REFUSED[name]
    adapters = ak.Adapters(make())
    adapters.add("a", config)
    with pytest.raises(errors.CheckpointError, match=told):
        adapters.save("a", tmp_path / "a.safetensors", format="diffusers")
    assert not list(tmp_path.iterdir())


def test_what_a_scale_costs_is_known() -> None:
    tensor = torch.tensor([0.1, 0.3, float("nan")])
    assert loses_nothing(tensor, 1.0)
    assert loses_nothing(tensor[:2], 0.5)
    assert not loses_nothing(tensor[:2], 0.0)
    assert not loses_nothing(torch.randn(64), 1 / 3)


@pytest.mark.parametrize("rank", [0, -1, True, 2.0, "4"])
def test_a_rank_that_is_none_is_told(rank: object, tmp_path: Path) -> None:
    adapters = ak.Adapters(unet())
    adapters.add("a", ak.LoRA(rank=2, targets="attn.q"))
    with pytest.raises(errors.ConfigError, match=rf"options of save\(\).*positive integer, not {rank!r}"):
        adapters.save("a", tmp_path / "a.safetensors", format="diffusers", rank=rank)
    assert not list(tmp_path.iterdir())


def test_a_second_transformer_is_loaded_by_itself_and_that_is_told(tmp_path: Path) -> None:
    pipe = SimpleNamespace(components={"transformer": models.flux(), "transformer_2": models.flux()})
    adapters = ak.Adapters(pipe)
    adapters.add("a", ak.LoRA(rank=2, targets="attn.q"))
    with pytest.warns(UserWarning, match=r"pipe\.transformer_2\.load_lora_adapter\(file, prefix='transformer_2'\)"):
        file = adapters.save("a", tmp_path / "a.safetensors", format="diffusers")
    assert_same(adapters, file)


def test_a_folder_gets_the_usual_name(tmp_path: Path) -> None:
    adapters = ak.Adapters(unet())
    adapters.add("a", ak.LoRA(rank=2, targets="attn.q"))
    adapters.save("a", tmp_path, format="diffusers")
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]
    assert adapters.load(tmp_path, "b").read.format == "diffusers"


def test_a_files_own_metadata_stay_and_its_alphas_do_not(tmp_path: Path) -> None:
    adapters, file = saved(unet(), ak.LoRA(rank=2, targets="attn.q"), tmp_path)
    found, _ = named_format("diffusers").read(Source.of(load_file(file), {"title": "ink", "format": "pt"}), Points([]))
    assert dict(found[""].metadata) == {"title": "ink"}
    del adapters


@pytest.mark.parametrize("prefix", ["unet.", ""])
def test_a_file_is_written_again_without_a_model(prefix: str, tmp_path: Path) -> None:
    _, file = saved(unet(), ak.LoRA(rank=2, alpha=3.1, ranks={"attn.k": 3}, targets="attn.* res.conv1"), tmp_path)
    with safe_open(str(file), "pt") as opened:
        metadata = {key: text.replace("unet.", prefix) for key, text in opened.metadata().items()}
    first = {key.replace("unet.", prefix): tensor for key, tensor in load_file(file).items()}
    one = named_format("diffusers")
    found, _ = one.read(Source.of(first, metadata), Points([]))
    one.write(found, tmp_path / "again.safetensors", made_up(found[""]))
    second = load_file(tmp_path / "again.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    _, file = saved(unet(), ak.LoRA(rank=2, alpha=3.1, targets="attn.*"), tmp_path, dtype=dtype)
    assert {tensor.dtype for tensor in load_file(file).values()} == {dtype}
