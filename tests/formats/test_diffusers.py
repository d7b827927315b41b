"""Files of diffusers, of every generation: each spelling says the same, and what is wrong is said."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import adapterkit as ak
from adapterkit import errors
from adapterkit.formats import registry
from adapterkit.formats.dialect import Dialect
from adapterkit.formats.diffusers_keys import parsed
from adapterkit.formats.source import Source
from adapterkit.points import Points
from tests.backends import diffusion_models as models
from tests.formats.pipelines import clip, sd1, unet

ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
LAYERS = {"to_q": "to_q", "to_out": "to_out.0"}
UNETS = {
    "0.21": "unet.{attn}.processor.{short}_lora.{way}.weight",
    "0.21 of a model": "{attn}.processor.{short}_lora.{way}.weight",
    "0.22": "unet.{attn}.{layer}.lora.{way}.weight",
    "0.22 with processors": "unet.{attn}.processor.{layer}.lora.{way}.weight",
    "PEFT": "unet.{attn}.{layer}.{factor}.weight",
    "PEFT of a model": "{attn}.{layer}.{factor}.weight",
    "PEFT in memory": "unet.{attn}.{layer}.{factor}.default.weight",
}
TEXTS = {
    "oldest": "text_encoder.text_model.encoder.layers.0.self_attn.to_{way_of}_lora.{way}.weight",
    "0.21": "text_encoder.text_model.encoder.layers.0.self_attn.{projection}.lora_linear_layer.{way}.weight",
    "transformers 5": "text_encoder.encoder.layers.0.self_attn.{projection}.lora_linear_layer.{way}.weight",
    "PEFT": "text_encoder.text_model.encoder.layers.0.self_attn.{projection}.{factor}.weight",
    "PEFT with transformers 5": "text_encoder.encoder.layers.0.self_attn.{projection}.{factor}.weight",
}


def factors(out: int, width: int, rank: int = 2, seed: int = 0) -> dict[str, Tensor]:
    noise = torch.Generator().manual_seed(seed)
    return {"down": torch.randn(rank, width, generator=noise), "up": torch.randn(out, rank, generator=noise)}


def merged(model: nn.Module, name: str) -> Tensor:
    return model.get_submodule(name).weight.detach().clone()  # type: ignore[union-attr]


def delta(model: nn.Module, adapters: ak.Adapters, name: str) -> Tensor:
    """What an adapter adds to a weight."""
    before = merged(model, name)
    adapters.merge()
    after = merged(model, name)
    adapters.unmerge()
    return after - before


@pytest.mark.parametrize("spelling", UNETS)
def test_every_spelling_of_a_unet_says_the_same(spelling: str) -> None:
    model, width = unet(), 4
    own = {short: factors(width, width, seed=i) for i, short in enumerate(LAYERS)}
    tensors = {
        UNETS[spelling].format(
            attn=ATTENTION, short=short, layer=LAYERS[short], way=way, factor={"down": "lora_A", "up": "lora_B"}[way]
        ): tensor
        for short, both in own.items()
        for way, tensor in both.items()
    }
    adapters = ak.Adapters(model)
    report = adapters.load(tensors, "it")
    assert report.read.format == "diffusers"
    assert not [*report.read.unmatched, *report.read.left_over]
    adapters.activate("it")
    for short, layer in LAYERS.items():
        got = delta(model, adapters, f"{ATTENTION}.{layer}")
        torch.testing.assert_close(got, own[short]["up"] @ own[short]["down"])


@pytest.mark.parametrize("spelling", TEXTS)
@pytest.mark.parametrize("way_of", ["q", "out"])
def test_every_spelling_of_a_text_encoder_says_the_same(spelling: str, way_of: str) -> None:
    model = clip(8)
    both, projection = factors(8, 8), f"{way_of}_proj"
    tensors = {
        TEXTS[spelling].format(
            way_of=way_of, way=way, projection=projection, factor={"down": "lora_A", "up": "lora_B"}[way]
        ): tensor
        for way, tensor in both.items()
    }
    adapters = ak.Adapters(model)
    assert adapters.load(tensors, "it").read.format == "diffusers"
    adapters.activate("it")
    path = next(name for name, _ in model.named_modules() if name.endswith(f"layers.0.self_attn.{projection}"))
    torch.testing.assert_close(delta(model, adapters, path), both["up"] @ both["down"])


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4"])
def test_a_text_encoder_alone_is_whichever_the_file_has(part: str) -> None:
    adapters = ak.Adapters(clip(12))
    key = f"{part}.text_model.encoder.layers.0.self_attn.q_proj.lora"
    adapters.load({f"{key}_A.weight": torch.randn(2, 12), f"{key}_B.weight": torch.randn(12, 2)}, "it")
    assert [point.partition("@")[0] for point in adapters.modules("it")] == ["attn.q"]


def pair(name: str, out: int = 4, width: int = 4, rank: int = 2, seed: int = 0) -> dict[str, Tensor]:
    both = factors(out, width, rank, seed)
    return {f"{name}.lora_A.weight": both["down"], f"{name}.lora_B.weight": both["up"]}


def file(path: Path, tensors: dict[str, Tensor], fields: Any = None, text: str | None = None) -> Path:
    """A file with metadata as diffusers writes them."""
    told = json.dumps(fields) if text is None and fields is not None else text
    save_file(tensors, str(path / "a.safetensors"), {} if told is None else {"lora_adapter_metadata": told})
    return path / "a.safetensors"


@pytest.mark.parametrize("prefix", ["unet.", ""])
def test_metadata_tell_alphas_ranks_and_scaling(prefix: str, tmp_path: Path) -> None:
    q, k = f"{prefix}{ATTENTION}.to_q", f"{prefix}{ATTENTION}.to_k"
    tensors = pair(q) | pair(k, rank=3, seed=1)
    fields = {"r": 2, "lora_alpha": 4, "rank_pattern": {"to_k": 3}, "alpha_pattern": {f"^{ATTENTION}.to_k": 5}}
    model = unet()
    for rslora in (False, True):
        told = {f"{prefix}{key}": value for key, value in {**fields, "use_rslora": rslora}.items()}
        adapters = ak.Adapters(model)
        report = adapters.load(file(tmp_path, tensors, told | {"text_encoder.r": 9}), "it")
        assert report.read.tool == "diffusers"
        adapters.activate("it")
        for name, alpha, rank in ((q, 4, 2), (k, 5, 3)):
            scale = alpha / (rank**0.5 if rslora else rank)
            expected = scale * tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
            torch.testing.assert_close(delta(model, adapters, name.removeprefix(prefix)), expected)
        adapters.detach()


@pytest.mark.parametrize(
    "alpha", [f"unet.{ATTENTION}.to_q.alpha", f"unet.{ATTENTION}.processor.to_q_lora.down.weight.alpha"]
)
def test_a_modules_own_alpha_counts(alpha: str) -> None:
    tensors = pair(f"unet.{ATTENTION}.to_q")
    model = unet()
    adapters = ak.Adapters(model)
    report = adapters.load({alpha: torch.tensor(3.0), **tensors}, "it")
    assert report.read.format == "diffusers"
    adapters.activate("it")
    a, b = tensors.values()
    torch.testing.assert_close(delta(model, adapters, f"{ATTENTION}.to_q"), 1.5 * b @ a)


def test_without_alpha_the_rank_is_meant_and_told() -> None:
    report = ak.Adapters(unet()).load(pair(f"unet.{ATTENTION}.to_q"), "it")
    assert any("alpha" in note for note in report.notes)


def test_spellings_may_be_mixed_though_diffusers_reads_but_some() -> None:
    tensors = pair(f"unet.{ATTENTION}.to_q")
    old = factors(4, 4, seed=1)
    tensors |= {f"unet.{ATTENTION}.to_k.lora.{way}.weight": tensor for way, tensor in old.items()}
    model = unet()
    adapters = ak.Adapters(model)
    report = adapters.load(tensors, "it")
    assert any("several ways" in note for note in report.notes)
    adapters.activate("it")
    torch.testing.assert_close(delta(model, adapters, f"{ATTENTION}.to_k"), old["up"] @ old["down"])


def test_the_magnitude_of_an_older_name_is_the_layers() -> None:
    tensors = pair(f"unet.{ATTENTION}.to_out.0")
    tensors[f"unet.{ATTENTION}.to_out.lora_magnitude_vector"] = torch.arange(1.0, 5.0)
    model = unet()
    adapters = ak.Adapters(model)
    adapters.load(tensors, "it")
    adapters.activate("it")
    layer = f"{ATTENTION}.to_out.0"
    weight = merged(model, layer)
    direction = weight + tensors[f"unet.{layer}.lora_B.weight"] @ tensors[f"unet.{layer}.lora_A.weight"]
    expected = torch.arange(1.0, 5.0)[:, None] * direction / direction.norm(dim=1, keepdim=True)
    torch.testing.assert_close(delta(model, adapters, layer), expected - weight)


def test_what_the_caller_has_is_neither_changed_nor_kept() -> None:
    tensors = pair(f"unet.{ATTENTION}.to_q")
    before = {key: tensor.clone() for key, tensor in tensors.items()}
    adapters = ak.Adapters(unet())
    adapters.load(tensors, "it")
    own = {tensor.untyped_storage().data_ptr() for tensor in adapters.parameters("it")}
    assert not own & {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}
    with torch.no_grad():
        for parameter in adapters.parameters("it"):
            parameter.fill_(7.0)
    assert tensors.keys() == before.keys()
    assert all(torch.equal(tensors[key], before[key]) for key in before)


def test_a_folder_is_the_file_in_it(tmp_path: Path) -> None:
    save_file(pair(f"unet.{ATTENTION}.to_q"), str(tmp_path / "pytorch_lora_weights.safetensors"))
    assert ak.Adapters(unet()).load(tmp_path, "it").read.format == "diffusers"


def test_a_pickle_needs_permission(tmp_path: Path) -> None:
    torch.save(pair(f"unet.{ATTENTION}.to_q"), tmp_path / "pytorch_lora_weights.bin")
    for path in (tmp_path, tmp_path / "pytorch_lora_weights.bin"):
        with pytest.raises(errors.UnsupportedFileError, match="allow_pickle"):
            ak.Adapters(unet()).load(path, "it")
        ak.Adapters(unet()).load(path, "it", allow_pickle=True)


def test_parts_that_the_model_lacks_are_reported() -> None:
    text = pair("text_encoder.text_model.encoder.layers.0.self_attn.q_proj", 8, 8)
    tensors = pair(f"unet.{ATTENTION}.to_q") | text
    with pytest.raises(errors.UnexpectedKeysError, match="2 keys belong to no point"):
        ak.Adapters(unet()).load(tensors, "it")
    report = ak.Adapters(unet()).load(tensors, "it", strict=False)
    assert sorted(report.read.unmatched) == sorted(text)
    with pytest.raises(errors.MissingKeysError, match="nothing in it fits"):
        ak.Adapters(unet()).load(text, "it", strict=False)


def test_without_a_model_the_file_names_its_modules() -> None:
    found = registry.find_format(Source.of(pair(f"unet.{ATTENTION}.to_q")))
    checkpoints, _ = found.read(Source.of(pair(f"unet.{ATTENTION}.to_q")), Points([]))
    [point] = checkpoints[""].tensors
    assert found.spec.name == "diffusers"
    assert ATTENTION in point


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("lora_unet_down_blocks_0_attn1_to_q.lora_down.weight", "kohya"),
        ("diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight", "comfy"),
        ("transformer.transformer_blocks.0.attn.to_q.lora_down.weight", "comfy"),
        ("base_model.model.layers.0.q_proj.lora_A.weight", None),
        ("transformer.transformer_blocks.0.attn.to_q.lora_A.weight", "diffusers"),
        ("transformer.transformer_blocks.0.attn.to_q.alpha", None),
    ],
)
def test_whose_a_file_is(key: str, expected: str | None) -> None:
    tensors = {key: torch.ones(2, 2), key.replace("down", "up").replace("_A", "_B"): torch.ones(2, 2)}
    taken = [
        name for name in ("kohya", "comfy", "diffusers") if registry.named_format(name).recognises(Source.of(tensors))
    ]
    assert "diffusers" in taken if expected == "diffusers" else "diffusers" not in taken
    assert taken == ([expected] if expected else taken)


@pytest.mark.parametrize(
    ("key", "module", "name"),
    [
        ("unet.a.lora.down.weight", "unet.a", "lora_A.weight"),
        ("unet.a.processor.to_out_lora.up.weight", "unet.a.to_out.0", "lora_B.weight"),
        ("text_encoder.a.to_out_lora.up.weight", "text_encoder.a.out_proj", "lora_B.weight"),
        ("unet.a.lora_linear_layer.up.bias", "unet.a", "lora_B.bias"),
        ("unet.a.lora_magnitude_vector.default.weight", "unet.a", "lora_magnitude_vector.weight"),
        ("unet.a.lora.alpha", "unet.a", "alpha"),
    ],
)
def test_keys_are_parsed(key: str, module: str, name: str) -> None:
    found = parsed(key, Dialect("peft"))
    assert found is not None
    assert (found.module, found.name) == (module, name)


BOMB = "(a+)+$"
WRONG: dict[str, tuple[str | None, Any, type[errors.AdapterKitError]]] = {
    "no JSON": ("{", None, errors.InvalidHeaderError),
    "a list": ("[]", None, errors.InvalidHeaderError),
    "twice": ('{"unet.r": 2, "unet.r": 3}', None, errors.InvalidHeaderError),
    "deep": ("[" * 100_000, None, errors.InvalidHeaderError),
    "a rank of 10^9": (None, {"unet.r": 10**9}, errors.CheckpointError),
    "a rank of 4.5": (None, {"unet.r": 4.5}, errors.CheckpointError),
    "a rank of none": (None, {"unet.r": 0}, errors.CheckpointError),
    "a rank in words": (None, {"unet.r": "2"}, errors.CheckpointError),
    "another rank": (None, {"unet.r": 3}, errors.ShapeMismatchError),
    "an alpha in words": (None, {"unet.r": 2, "unet.lora_alpha": "4"}, errors.InvalidHeaderError),
    "an alpha of NaN": ('{"unet.r": 2, "unet.lora_alpha": NaN}', None, errors.InvalidHeaderError),
    "an alpha of 1e30": (None, {"unet.r": 2, "unet.lora_alpha": 1e30}, errors.AdapterKitError),
    "patterns in words": (None, {"unet.r": 2, "unet.alpha_pattern": "x"}, errors.InvalidHeaderError),
    "a rank of 10^9 in a pattern": (None, {"unet.r": 2, "unet.rank_pattern": {"x": 10**9}}, errors.CheckpointError),
    "a pattern of words": (None, {"unet.r": 2, "unet.alpha_pattern": {"x": "y"}}, errors.InvalidHeaderError),
    "a type in numbers": (None, {"unet.peft_type": 3}, errors.InvalidHeaderError),
    "tokens": (None, {"unet.r": 2, "unet.alora_invocation_tokens": [1]}, errors.UnsupportedFileError),
}


@pytest.mark.parametrize("name", WRONG)
def test_metadata_that_are_wrong(name: str, tmp_path: Path) -> None:
    text, fields, expected = WRONG[name]
    path = file(tmp_path, pair(f"unet.{ATTENTION}.to_q"), fields, text)
    refused(path, expected)


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_patterns_that_would_run_long_do_not(field: str, tmp_path: Path) -> None:
    fields = {"unet.r": 2, "unet.lora_alpha": 2, f"unet.{field}": {BOMB * 20: 2}}
    path = file(tmp_path, pair(f"unet.{'a' * 60}.to_q"), fields)
    with pytest.raises(errors.CheckpointError):
        ak.Adapters(unet()).load(path, "it", strict=False)


def refused(given: Any, expected: type[errors.AdapterKitError], model: nn.Module | None = None) -> None:
    model = unet() if model is None else model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = list(model.modules())
    with pytest.raises(expected):
        ak.Adapters(model).load(given, "it")
    assert [id(one) for one in model.modules()] == [id(one) for one in modules]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


Q = f"unet.{ATTENTION}.to_q"
A, B = torch.ones(2, 4), torch.ones(4, 2)
TENSORS: dict[str, tuple[dict[str, Tensor], type[errors.AdapterKitError]]] = {
    "half": ({f"{Q}.lora_A.weight": A}, errors.CheckpointError),
    "mixed ranks": ({f"{Q}.lora_A.weight": torch.ones(3, 4), f"{Q}.lora_B.weight": B}, errors.ShapeMismatchError),
    "transposed": ({f"{Q}.lora_A.weight": A.mT, f"{Q}.lora_B.weight": B.mT}, errors.ShapeMismatchError),
    "rank 0": ({f"{Q}.lora_A.weight": A[:0], f"{Q}.lora_B.weight": B[:, :0]}, errors.ShapeMismatchError),
    "flat": ({f"{Q}.lora_A.weight": A.flatten(), f"{Q}.lora_B.weight": B}, errors.ShapeMismatchError),
    "NaN": ({f"{Q}.lora_A.weight": A * float("nan"), f"{Q}.lora_B.weight": B}, errors.NonFiniteError),
    "whole numbers": ({f"{Q}.lora_A.weight": A.long(), f"{Q}.lora_B.weight": B.long()}, errors.CheckpointError),
    "said twice": (
        {f"{Q}.lora_A.weight": A, f"{Q}.lora_B.weight": B, f"{Q}.lora.down.weight": A},
        errors.CheckpointError,
    ),
    "alpha of NaN": (pair(Q) | {f"{Q}.alpha": torch.tensor(float("nan"))}, errors.CheckpointError),
    "alphas": (pair(Q) | {f"{Q}.alpha": torch.ones(2)}, errors.ShapeMismatchError),
    "alpha twice": (
        pair(Q) | {f"{Q}.alpha": torch.tensor(1.0), f"{Q}.lora.alpha": torch.tensor(1.0)},
        errors.CheckpointError,
    ),
    "alpha of nothing": (
        pair(Q) | {f"unet.{ATTENTION}.to_k.alpha": torch.tensor(1.0)},
        errors.UnexpectedKeysError,
    ),
    "strange": (pair(Q) | {"unet.x": torch.ones(1)}, errors.UnexpectedKeysError),
    "elsewhere": (pair(Q) | pair("unet.other.to_q"), errors.UnexpectedKeysError),
    "magnitudes": (pair(Q) | {f"{Q}.lora_magnitude_vector": torch.ones(3)}, errors.ShapeMismatchError),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_are_wrong(name: str) -> None:
    refused(*TENSORS[name])


def test_two_alphas_that_differ_are_refused(tmp_path: Path) -> None:
    path = file(tmp_path, pair(Q) | {f"{Q}.alpha": torch.tensor(3.0)}, {"unet.r": 2, "unet.lora_alpha": 4})
    refused(path, errors.CheckpointError)


def test_a_whole_pipeline_reads_its_parts() -> None:
    pipe = sd1()
    text = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    adapters = ak.Adapters(pipe)
    adapters.load(pair(Q) | pair(text, 8, 8, seed=3), "it")
    assert len(adapters.modules("it")) == 2


def two_transformers() -> SimpleNamespace:
    return SimpleNamespace(components={"transformer": models.flux(), "transformer_2": models.flux()})


FLUX_Q = "transformer_blocks.0.attn.to_q"


@pytest.mark.parametrize(
    ("prefix", "options", "expected"),
    [
        ("transformer.", {}, "transformer"),
        ("transformer_2.", {}, "transformer_2"),
        ("", {}, "transformer"),
        ("transformer.", {"component": "transformer_2"}, "transformer_2"),
        ("", {"component": "transformer_2"}, "transformer_2"),
    ],
)
def test_which_of_two_transformers_is_meant(prefix: str, options: dict[str, str], expected: str) -> None:
    adapters = ak.Adapters(two_transformers())
    adapters.load(pair(f"{prefix}{FLUX_Q}", 16, 16), "it", **options)
    [point] = adapters.modules("it")
    assert f"@{expected}." in point


def test_a_component_that_is_not_there_is_an_error() -> None:
    with pytest.raises(errors.ConfigError, match="transformer_3"):
        ak.Adapters(two_transformers()).load(pair(f"transformer.{FLUX_Q}", 16, 16), "it", component="transformer_3")
