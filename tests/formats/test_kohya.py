"""Files of kohya's scripts and the UIs, as they are read: every manner of names, by what the models are."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextModelWithProjection, LlamaConfig, LlamaModel, T5Config, T5EncoderModel

import adapterkit as ak
from adapterkit.errors import (
    AdapterKitError,
    CheckpointError,
    ConfigError,
    MissingKeysError,
    NonFiniteError,
    ShapeMismatchError,
    UnexpectedKeysError,
)
from adapterkit.formats.cards import CardOptions
from adapterkit.formats.kohya import KohyaFormat
from adapterkit.formats.lycoris import LycorisFormat
from adapterkit.formats.module_keys import style_of
from tests.formats.pipelines import PIPELINES, clip, differences, randomise, run, unet

TARGETS = "attn.* cross.* mlp.* proj.*"


@pytest.fixture(scope="module", params=PIPELINES)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any]:
    """A pipeline, what an adapter makes it give, and the adapter's tensors in a file of kohya's."""
    pipe = PIPELINES[request.param]()
    adapters = ak.Adapters(pipe)
    adapters.add("a", ak.LoRA(TARGETS, rank=2, alpha=1.0))
    randomise(adapters)
    adapters.activate("a")
    outputs = run(pipe)
    file = adapters.save("a", tmp_path_factory.mktemp("kohya") / "a.safetensors", format="kohya")
    comfy = adapters.save("a", file.with_name("comfy.safetensors"), format="comfy")
    adapters.detach()
    return pipe, outputs, SimpleNamespace(kohya=load_file(str(file)), comfy=load_file(str(comfy)))


def renamed(tensors: Mapping[str, Tensor], *changes: tuple[str, str]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        for pattern, other in changes:
            key = re.sub(pattern, other, key)
        found[key] = tensor
    return found


def flat(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The keys of a dotted file as those of one word for each module."""
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        module, name = re.fullmatch(r"(.*)\.(lora_down\.weight|lora_up\.weight|alpha)", key).groups()  # type: ignore[union-attr]
        found[f"{module.replace('.', '_')}.{name}"] = tensor
    return found


MANNERS: dict[str, Callable[[Any], dict[str, Tensor]]] = {
    "kohya": lambda files: files.kohya,
    "comfy": lambda files: files.comfy,
    "te1 for te": lambda files: renamed(files.kohya, ("^lora_te_", "lora_te1_")),
    "without text_model": lambda files: renamed(files.kohya, ("_text_model_encoder", "_encoder")),
    "original names, flat": lambda files: renamed(
        flat(files.comfy),
        ("^diffusion_model_", "lora_unet_"),
        ("^text_encoders_clip_l_transformer_", "lora_te1_"),
        ("^text_encoders_clip_g_transformer_", "lora_te2_"),
    ),
    "PEFT's tensor names": lambda files: renamed(
        files.comfy, (r"lora_down\.weight", "lora_A.weight"), (r"lora_up\.weight", "lora_B.weight")
    ),
    "PEFT's with an adapter's name": lambda files: renamed(
        files.comfy, (r"lora_down\.weight", "lora_A.default.weight"), (r"lora_up\.weight", "lora_B.default.weight")
    ),
    "a checkpoint's prefix": lambda files: renamed(files.comfy, ("^diffusion_model", "model.diffusion_model")),
    "encoders by component": lambda files: renamed(
        files.comfy,
        (r"^text_encoders\.clip_l\.transformer\.", "text_encoder."),
        (r"^text_encoders\.clip_g\.transformer\.", "text_encoder_2."),
    ),
}


@pytest.mark.parametrize("manner", MANNERS)
def test_every_manner_of_names_says_the_same(written: tuple[Any, Any, Any], manner: str, tmp_path: Path) -> None:
    pipe, outputs, files = written
    save_file(MANNERS[manner](files), str(tmp_path / "it.safetensors"))
    adapters = ak.Adapters(pipe)
    report = adapters.load(tmp_path / "it.safetensors")
    assert [*report.read.unmatched, *report.read.left_over] == []
    adapters.activate("it")
    assert max(differences(run(pipe), outputs).values()) < 1e-6
    adapters.detach()


def test_what_has_no_alpha_has_scale_1() -> None:
    adapters = ak.Adapters(unet())
    adapters.load(GOOD, "none")
    adapters.load({**GOOD, f"{MODULE}.alpha": torch.tensor(3.0)}, "three")
    for name, scale in (("none", 1.0), ("three", 1.5)):
        [module] = adapters.modules(name).values()
        assert module.factors().scale == scale  # type: ignore[operator]


def test_the_callers_tensors_are_neither_changed_nor_kept(written: tuple[Any, Any, Any]) -> None:
    pipe, _, files = written
    before = {key: tensor.clone() for key, tensor in files.kohya.items()}
    adapters = ak.Adapters(pipe)
    adapters.load(files.kohya, "it")
    assert files.kohya.keys() == before.keys()
    own = {parameter.data_ptr() for parameter in adapters.parameters()}
    assert own.isdisjoint(tensor.data_ptr() for tensor in files.kohya.values())
    randomise(adapters, seed=9)
    assert all(torch.equal(files.kohya[key], tensor) for key, tensor in before.items())
    adapters.detach()


def test_a_bare_unet_takes_its_own_and_names_the_rest(written: tuple[Any, Any, Any]) -> None:
    pipe, outputs, files = written
    adapters = ak.Adapters(pipe.unet)
    with pytest.raises(UnexpectedKeysError, match=r"belong to no point.*strict=False"):
        adapters.load(files.kohya, "it")
    assert not list(adapters)
    report = adapters.load(files.kohya, "it", strict=False)
    assert {key.split("_")[1] for key in report.read.matched} == {"unet"}
    assert {key.split("_")[1][:2] for key in report.read.unmatched} == {"te"}
    adapters.activate("it")
    assert differences({"unet": run(pipe)["unet"]}, {"unet": outputs["unet"]})["unet"] < 1e-6
    adapters.detach()


def test_a_text_encoder_is_known_by_its_width() -> None:
    """Both encoders of XL's file have the same names of modules: which of them is meant, the widths say."""
    pipe = PIPELINES["sdxl"]()
    adapters = ak.Adapters(pipe)
    adapters.add("a", ak.LoRA("attn.q@component=text_encoder attn.q@component=text_encoder_2", rank=1))
    randomise(adapters)
    tensors = {f"{k}": v for k, v in _kohya(adapters).items()}
    adapters.detach()
    for encoder, prefix in ((pipe.text_encoder, "lora_te1_"), (pipe.text_encoder_2, "lora_te2_")):
        report = ak.Adapters(encoder).load(tensors, "it", strict=False)
        assert {key[:9] for key in report.read.matched} == {prefix}
    alone = ak.Adapters(clip(8, CLIPTextModelWithProjection)).load(tensors, "it", strict=False)  # CLIP-L of SD 3
    assert {key[:9] for key in alone.read.matched} == {"lora_te1_"}


def _kohya(adapters: ak.Adapters) -> dict[str, Tensor]:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return load_file(str(adapters.save("a", Path(folder) / "a.safetensors", format="kohya")))


def test_what_is_for_another_model_is_no_match() -> None:
    tensors = {"lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": torch.ones(1, 4)}
    tensors |= {"lora_unet_double_blocks_0_img_attn_proj.lora_up.weight": torch.ones(4, 1)}
    with pytest.raises(MissingKeysError, match="nothing in it fits the model; 2 keys belong to no point"):
        ak.Adapters(unet()).load(tensors, "it", strict=False)


def test_of_two_transformers_the_one_that_is_named() -> None:
    pipe = SimpleNamespace(components={"transformer": unet(), "transformer_2": unet()})
    adapters = ak.Adapters(pipe)
    adapters.load(GOOD, "first")
    adapters.load(GOOD, "second", component="transformer_2")
    ids = [next(iter(adapters.modules(name))) for name in ("first", "second")]
    assert [key.partition("@")[2].partition(".")[0] for key in ids] == ["transformer", "transformer_2"]
    with pytest.raises(ConfigError, match=r"component 'transfomer_2'.*Did you mean 'transformer_2'"):
        adapters.load(GOOD, "third", component="transfomer_2")


MODULE = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
GOOD = {f"{MODULE}.lora_down.weight": torch.ones(2, 8), f"{MODULE}.lora_up.weight": torch.ones(8, 2)}
BAD: dict[str, tuple[dict[str, Tensor], type[AdapterKitError], str]] = {
    "rank 0": (
        {f"{MODULE}.lora_down.weight": torch.ones(0, 8), f"{MODULE}.lora_up.weight": torch.ones(8, 0)},
        ShapeMismatchError,
        "and down",
    ),
    "another width": ({**GOOD, f"{MODULE}.lora_down.weight": torch.ones(2, 9)}, CheckpointError, "."),
    "another height": ({**GOOD, f"{MODULE}.lora_up.weight": torch.ones(9, 2)}, ShapeMismatchError, "up is"),
    "two ranks": ({**GOOD, f"{MODULE}.lora_up.weight": torch.ones(8, 3)}, ShapeMismatchError, "up is"),
    "no up": ({f"{MODULE}.lora_down.weight": torch.ones(2, 8)}, MissingKeysError, "unknown to the format"),
    "NaN": ({**GOOD, f"{MODULE}.lora_up.weight": torch.full((8, 2), torch.nan)}, NonFiniteError, "."),
    "alpha is NaN": ({**GOOD, f"{MODULE}.alpha": torch.tensor(torch.nan)}, CheckpointError, "alpha"),
    "alpha is a vector": ({**GOOD, f"{MODULE}.alpha": torch.ones(2)}, CheckpointError, "."),
    "alpha beyond all": ({**GOOD, f"{MODULE}.alpha": torch.tensor(1e30)}, CheckpointError, "alpha"),
    "the same twice": (
        {**GOOD, f"{MODULE}.lora_A.weight": torch.ones(2, 8)},
        CheckpointError,
        r"says the same as .*lora_down",
    ),
    "a name that is unknown": ({**GOOD, f"{MODULE}.other": torch.ones(1)}, UnexpectedKeysError, "unknown"),
    "integers": ({key: tensor.long() for key, tensor in GOOD.items()}, CheckpointError, "."),
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_wrong_is_an_error_and_the_model_as_it_was(what: str) -> None:
    tensors, error, match = BAD[what]
    model = unet()
    adapters = ak.Adapters(model)
    with pytest.raises(error, match=match):
        adapters.load(tensors, "it")
    assert not list(adapters)
    adapters.load(GOOD, "it")


def test_three_text_encoders_are_who_they_are() -> None:
    """Those of Stable Diffusion 3: both of CLIP project, and T5 is the third, as it is the second of Flux."""
    first, second = (clip(width, CLIPTextModelWithProjection) for width in (8, 12))
    encoders = {"text_encoder": first, "text_encoder_2": second}
    config = T5Config(d_model=12, d_kv=6, d_ff=16, num_layers=1, num_heads=2, vocab_size=20)
    for t5, names in (("text_encoder_3", encoders), ("text_encoder_2", {"text_encoder": first})):
        adapters = ak.Adapters(SimpleNamespace(components={**names, t5: T5EncoderModel(config).eval()}))
        adapters.add("a", ak.LoRA("attn.q", rank=1))
        randomise(adapters)
        tensors = _kohya(adapters)
        assert {key[:9] for key in tensors} == {f"lora_te{i}_" for i in ((1, 2, 3) if len(names) > 1 else (1, 3))}
        if len(names) == 1:
            tensors = renamed(tensors, ("^lora_te3_", "lora_te2_"))
        adapters.load(tensors, "back")
        for one, other in zip(adapters.modules("a").values(), adapters.modules("back").values(), strict=True):
            assert torch.equal(one.A, other.A)  # type: ignore[arg-type]
        adapters.detach()


def test_a_language_model_is_known_with_its_head_and_without(tmp_path: Path) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaModel(LlamaConfig(**sizes, vocab_size=10)).eval()
    adapters = ak.Adapters(model)
    pair = {"lora_down.weight": torch.ones(1, 8), "lora_up.weight": torch.ones(8, 1)}
    flat = ("lora_te_layers_0_self_attn_q_proj", "lora_te_model_layers_0_self_attn_q_proj")
    for module in (*flat, "text_encoders.x.transformer.model.layers.0.self_attn.q_proj"):
        report = adapters.load({f"{module}.{name}": tensor for name, tensor in pair.items()}, "it")
        assert [point.partition("@")[0] for point in report.points] == ["attn.q"]
        adapters.remove("it")
    adapters.add("a", ak.LoRA("attn.q", rank=1))
    with pytest.raises(CheckpointError, match=r"what ComfyUI calls the text encoder .*native"):
        adapters.save("a", tmp_path / "a.safetensors", format="comfy")


def test_oft_of_the_scripts_has_a_prefix_of_its_own() -> None:
    modules = {
        "lora_unet_a": {"oft_blocks": torch.ones(2, 2, 2), "alpha": torch.tensor(0.0)},
        "lora_unet_b": {"oft_blocks": torch.ones(1, 2, 2, 2), "alpha": torch.tensor(0.0)},
        "lora_te_a": {"oft_blocks": torch.ones(2, 2, 2), "alpha": torch.tensor(0.0)},
    }
    options = CardOptions()
    assert list(KohyaFormat().spelled(modules, None, options)) == ["oft_unet_a", "lora_unet_b", "lora_te_a"]
    assert list(LycorisFormat().spelled(modules, None, options)) == list(modules)


FLUX: dict[str, tuple[tuple[str, str], ...]] = {
    "bare": (("^diffusion_model.", ""),),
    "wrapped by PEFT": (
        ("^diffusion_model.", "base_model.model."),
        ("lora_down", "lora_A"),
        ("lora_up", "lora_B"),
    ),
    "XLabs'": (
        ("^diffusion_model.", ""),
        ("img_attn.qkv.lora_", "processor.qkv_lora1."),
        ("txt_attn.qkv.lora_", "processor.qkv_lora2."),
        ("img_attn.proj.lora_", "processor.proj_lora1."),
        ("txt_attn.proj.lora_", "processor.proj_lora2."),
        ("linear1.lora_", "processor.qkv_lora."),
        ("linear2.lora_", "processor.proj_lora."),
    ),
}


@pytest.mark.filterwarnings("ignore:`FluxPosEmbed`:FutureWarning")
@pytest.mark.parametrize("manner", FLUX)
def test_names_of_flux_that_need_no_prefix(manner: str, tmp_path: Path) -> None:
    from tests.backends.diffusion_models import flux

    model = flux()
    adapters = ak.Adapters(model)
    adapters.add("a", ak.LoRA("attn.*", rank=2))
    randomise(adapters)
    tensors = load_file(str(adapters.save("a", tmp_path / "a.safetensors", format="comfy")))
    rank = tensors["diffusion_model.double_blocks.0.img_attn.qkv.lora_down.weight"].shape[0]
    if manner == "XLabs'":  # of the first layer of single blocks, queries, keys and values alone
        for key in [key for key in tensors if key.endswith("linear1.lora_up.weight")]:
            tensors[key] = tensors[key][: 3 * model.inner_dim].contiguous()
    kept = {key: tensor for key, tensor in tensors.items() if not key.endswith(".alpha")}
    report = adapters.load(renamed(kept, *FLUX[manner]), "back")
    assert report.read.format == "comfy"
    alpha = float(next(tensor for key, tensor in tensors.items() if key.endswith(".alpha")))
    for key, module in adapters.modules("a").items():
        one, other = module.factors(), adapters.modules("back")[key].factors()  # type: ignore[operator]
        scale = alpha / len(other.A)  # of what the alpha, which is gone here, makes
        torch.testing.assert_close(one.scale * one.B @ one.A, scale * other.B @ other.A)
    assert rank == 6


@pytest.mark.timeout(20)
@pytest.mark.parametrize("start", ["diffusion_model.", "lora_unet_", "transformer.", "base_model.model.", ""])
def test_keys_of_a_million_dots_take_no_time(start: str) -> None:
    key = f"{start}{'.' * 1_000_000}x.lora_down.weight"
    with pytest.raises(CheckpointError) as caught:
        ak.Adapters(unet()).load({key: torch.ones(1)}, "it")
    assert len(str(caught.value)) < 4000


def test_what_is_pefts_is_not_taken() -> None:
    pair = {f"{name}.weight": tensor for name, tensor in (("lora_A", torch.ones(2, 8)), ("lora_B", torch.ones(8, 2)))}
    module = "base_model.model.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    for name in (*pair, "hada_w1_a", "lokr_w1", "lora_magnitude_vector.weight"):
        assert style_of([f"{module}.{name}"]) is None
    assert style_of([f"{module}.{name}" for name in ("lora_down.weight", "lora_up.weight", "alpha")]) == "comfy"
    report = ak.Adapters(unet()).load({f"{module}.{name}": tensor for name, tensor in pair.items()}, "it")
    assert report.read.format == "peft"
