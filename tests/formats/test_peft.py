"""Adapters of PEFT: what its files say is what the model computes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

import adapterkit as ak
from adapterkit import errors
from adapterkit.formats.codecs import peft_lora
from adapterkit.formats.source import Source
from adapterkit.torchvision_ops import ensure_torchvision_ops


def folder(path: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, str(path / "adapter_model.safetensors"))
    return path


def test_ranks_and_alphas_of_patterns_are_those_of_their_modules(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 5))
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 2, "rank_pattern": {"1": 2}, "alpha_pattern": {"^1": 3}}
    a, b = torch.randn(1, 4), torch.randn(3, 1)
    c, d = torch.randn(2, 3), torch.randn(5, 2)
    names = ("0.lora_A", "0.lora_B", "1.lora_A", "1.lora_B")
    path = folder(
        tmp_path / "it",
        config,
        {f"base_model.model.{name}.weight": t for name, t in zip(names, (a, b, c, d), strict=True)},
    )
    adapters = ak.Adapters(model)
    report = adapters.load(path)
    assert report.read.format == "peft"
    adapters.activate("it")
    x = torch.randn(2, 4)
    hidden = x @ (model[0].weight + 2 * b @ a).mT + model[0].bias
    torch.testing.assert_close(model(x), hidden @ (model[1].weight + 1.5 * d @ c).mT + model[1].bias)


def test_every_option_of_lora_in_peft_is_known_and_another_is_told(tmp_path: Path) -> None:
    ensure_torchvision_ops()
    peft = pytest.importorskip("peft")
    assert set(peft.LoraConfig.__dataclass_fields__) <= peft_lora._KNOWN
    tensors = {
        "base_model.model.0.lora_A.weight": torch.randn(1, 4),
        "base_model.model.0.lora_B.weight": torch.ones(3, 1),
    }
    for said, told in (
        ({"fan_in_fan_out": True, "bias": "none", "newer": None}, ()),
        ({"newer": 1}, ("sets 'newer'",)),
    ):
        adapters = ak.Adapters(nn.Sequential(nn.Linear(4, 3)))
        notes = adapters.load(folder(tmp_path, {"peft_type": "LORA", "r": 1, **said}, tensors), "it").notes
        assert len(notes) == len(told)
        assert all(part in note for part, note in zip(told, notes, strict=True))


def test_what_is_written_reads_back_with_mixed_ranks_and_alphas(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Conv1d(3, 5, 3, padding=1), nn.Linear(4, 4))
    adapters = ak.Adapters(model)
    adapters.add("it", ak.LoRA("all", rank=2, alphas={"conv": 5.0}, ranks={"conv": 3}))
    for module in adapters.modules("it").values():
        nn.init.normal_(module.B)  # type: ignore[arg-type]
    adapters.save("it", tmp_path / "out", format="peft")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == {"1": 3}
    assert config["alpha_pattern"] == {"1": 5.0}
    adapters.load(tmp_path / "out", "back")
    for first, second in zip(adapters.modules("it").values(), adapters.modules("back").values(), strict=True):
        assert torch.equal(first.A, second.A)  # type: ignore[arg-type]
        assert torch.equal(first.B, second.B)  # type: ignore[arg-type]


def test_a_header_that_is_as_long_as_a_pickle_begins_is_none(tmp_path: Path) -> None:
    name = "base_model.model.0.lora_A.weight"
    for length in range(1, 700):
        save_file({name: torch.ones(1, 2)}, str(tmp_path / "a.safetensors"), {"x": "y" * length})
        if (tmp_path / "a.safetensors").read_bytes()[:2] == b"\x80\x02":
            break
    else:
        raise AssertionError("no header of this length")
    source = Source.of(tmp_path / "a.safetensors", allow_pickle=True)
    assert list(source.entries) == [name]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.mlp = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.attn(x))


def blocks(*around: str) -> nn.Module:
    """Two blocks in a list below modules of these names."""
    torch.manual_seed(0)
    inner: nn.Module = nn.ModuleList([Block(), Block()])
    for name in reversed(around):
        inner = nn.ModuleDict({name: inner})
    return inner


def of_blocks(front: str, number: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    names = [f"{front}{i}.{name}" for i in range(number) for name in ("attn", "mlp")]
    tensors = {f"{name}.lora_A.weight": torch.randn(2, 4, generator=generator) for name in names}
    tensors |= {f"{name}.lora_B.weight": torch.randn(4, 2, generator=generator) for name in names}
    return {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}


CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}


@pytest.mark.parametrize(
    ("front", "around"),
    [
        ("model.layers.", ("layers",)),
        ("layers.", ("model", "layers")),
        ("language_model.model.layers.", ("model", "language_model", "layers")),
        ("bert.encoder.layers.", ("roberta", "encoder", "layers")),
    ],
)
def test_a_wider_or_a_bare_model_has_the_same_modules(front: str, around: tuple[str, ...], tmp_path: Path) -> None:
    model = blocks(*around)
    adapters = ak.Adapters(model)
    report = adapters.load(folder(tmp_path / "it", CONFIG, of_blocks(front)))
    assert len(report.points) == 4
    assert "4 of its modules have other names here" in str(report)


def test_what_belongs_elsewhere_is_an_error_or_reported(tmp_path: Path) -> None:
    tensors = of_blocks("model.layers.", number=3)
    path = folder(tmp_path / "it", CONFIG, tensors)
    adapters = ak.Adapters(blocks("model", "layers"))
    with pytest.raises(errors.UnexpectedKeysError, match="4 keys belong to no point"):
        adapters.load(path)
    assert "it" not in adapters
    report = adapters.load(path, strict=False)
    assert len(report.read.unmatched) == 4
    assert len(report.points) == 4


def test_half_a_pair_is_an_error(tmp_path: Path) -> None:
    tensors = of_blocks("layers.")
    tensors.pop("base_model.model.layers.0.attn.lora_B.weight")
    adapters = ak.Adapters(blocks("layers"))
    with pytest.raises(errors.MissingKeysError, match=r"only lora_A\.weight here"):
        adapters.load(folder(tmp_path / "it", CONFIG, tensors))
    assert "it" not in adapters


def test_two_towers_are_not_mixed_up(tmp_path: Path) -> None:
    """Modules of a tower that the model has not are not taken for those of the one that it has."""
    tensors = {**of_blocks("model.text.layers."), **of_blocks("model.vision.layers.")}
    adapters = ak.Adapters(blocks("model", "text", "layers"))
    report = adapters.load(folder(tmp_path / "it", CONFIG, tensors), strict=False)
    assert sorted(report.read.unmatched) == sorted(key for key in tensors if ".vision." in key)


def test_a_state_dict_has_the_adapters_of_a_model_by_name() -> None:
    tensors: dict[str, Tensor] = {}
    for name, front in (("one", "layers."), ("two", "layers.")):
        for key, tensor in of_blocks(front).items():
            tensors[key.replace(".weight", f".{name}.weight")] = tensor * (1 if name == "one" else 2)
    tensors |= {f"base_model.model.layers.0.attn.base_layer.{name}": torch.zeros(4) for name in ("weight", "bias")}
    before = {key: tensor.clone() for key, tensor in tensors.items()}
    adapters = ak.Adapters(blocks("layers"))
    reports = adapters.load_all(tensors)
    assert {*reports} == {"one", "two"}
    assert "2 tensors of the base itself" in str(reports["one"])
    first, second = (next(iter(adapters.modules(name).values())) for name in ("one", "two"))
    assert torch.equal(2 * first.A, second.A)  # type: ignore[operator,arg-type]
    with torch.no_grad():
        first.A.zero_()  # type: ignore[operator,union-attr]
    assert {*tensors} == {*before}
    assert all(torch.equal(tensors[key], before[key]) for key in before)


def encoder() -> nn.Module:
    config = CLIPTextConfig(
        hidden_size=4, intermediate_size=4, num_hidden_layers=2, num_attention_heads=1, vocab_size=9, projection_dim=4
    )
    return CLIPTextModel(config)


def test_a_pipeline_has_it_in_the_component_that_it_is_for(tmp_path: Path) -> None:
    """The file says no more than names of modules: where two encoders have them, it must be said which is meant."""
    own = encoder()
    module = next(name for name, at in own.named_modules() if name.endswith("layers.0.self_attn.q_proj"))
    tensors = {f"base_model.model.{module}.lora_{name}.weight": torch.ones(2, 4) for name in "AB"}
    tensors[f"base_model.model.{module}.lora_B.weight"] = torch.ones(4, 2)
    path = folder(tmp_path / "it", CONFIG, tensors)
    one = ak.Adapters(SimpleNamespace(components={"text_encoder": encoder()}))
    assert len(one.load(path).points) == 1
    two = ak.Adapters(SimpleNamespace(components={"text_encoder": own, "text_encoder_2": encoder()}))
    with pytest.raises(errors.BaseMismatchError, match="component='text_encoder'"):
        two.load(path)
    report = two.load(path, component="text_encoder_2")
    assert all("@text_encoder_2" in point for point in report.points)


@pytest.mark.parametrize(
    ("config", "change", "told"),
    [
        ({"r": 10**9}, {}, "up to 65,536"),
        ({"r": 3}, {}, "the config has rank 3"),
        ({"use_dora": True}, {}, "no magnitude"),
        ({"rank_pattern": {"(a+)+$": 2}}, {}, ""),
        ({"rank_pattern": {"(?=a)": 2}}, {}, "is not run"),
        ({"rank_pattern": {"a": "b"}}, {}, "must have a number"),
        ({"peft_type": "NOVEL"}, {"0.attn.novel_A": torch.ones(2)}, "type NOVEL"),
        ({"peft_type": 3}, {}, "must be a name"),
        ({"use_qalora": True}, {}, "use_qalora"),
        ({"init_lora_weights": "loftq"}, {}, "path_initial_model"),
        ({"layer_replication": [[0, 1], [0, 1]]}, {"1.attn.lora_A.weight": torch.ones(2, 4)}, "layer_replication"),
        ({}, {"0.attn.lora_A.weight": torch.ones(0, 4)}, "A is"),
        ({}, {"0.attn.lora_A.weight": torch.ones(2, 5)}, "A is"),
        ({}, {"0.attn.lora_B.weight": torch.ones(4, 3)}, "A is"),
        ({}, {"0.attn.lora_A.weight": torch.full((2, 4), float("nan"))}, "NaN"),
        ({}, {"0.attn.lora_A.bias": torch.ones(2)}, "unknown|reads"),
    ],
)
def test_what_is_wrong_is_told_and_the_model_is_as_it_was(
    config: dict[str, Any], change: dict[str, Tensor], told: str, tmp_path: Path
) -> None:
    model = nn.ModuleList([Block()])
    before = copy.deepcopy(model.state_dict())
    tensors = {**of_blocks("", number=1), **{f"base_model.model.{key}": tensor for key, tensor in change.items()}}
    adapters = ak.Adapters(model)
    if not told:
        adapters.load(folder(tmp_path / "it", {**CONFIG, **config}, tensors))
        return
    with pytest.raises(errors.CheckpointError, match=told):
        adapters.load(folder(tmp_path / "it", {**CONFIG, **config}, tensors))
    assert not [*adapters]
    adapters.detach()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_a_folder_lacks_its_tensors_or_is_a_pickle(tmp_path: Path) -> None:
    adapters = ak.Adapters(blocks("layers"))
    path = folder(tmp_path / "it", CONFIG, of_blocks("layers."))
    tensors = of_blocks("layers.")
    (path / "adapter_model.safetensors").unlink()
    with pytest.raises(errors.MissingKeysError, match=r"adapter_model\.safetensors"):
        adapters.load(path)
    torch.save(tensors, path / "adapter_model.bin")
    with pytest.raises(errors.UnsupportedFileError, match="allow_pickle"):
        adapters.load(path)
    assert len(adapters.load(path, allow_pickle=True).points) == 4


def test_without_a_config_the_tensors_tell() -> None:
    report = ak.Adapters(blocks("layers")).load(of_blocks("layers."), "it")
    assert report.type == "lora"
    assert len(report.points) == 4


@pytest.mark.parametrize("field", ["lora_alpha", "alpha", "init_r", "target_r", "lora_dropout"])
def test_a_number_that_is_none_is_an_error_of_the_file(tmp_path: Path, field: str) -> None:
    tensors = {
        "base_model.model.0.lora_A.weight": torch.ones(1, 4),
        "base_model.model.0.lora_B.weight": torch.ones(3, 1),
    }
    path = folder(tmp_path / "it", {"peft_type": "LORA", "r": 1, field: "x"}, tensors)
    with pytest.raises(errors.InvalidHeaderError, match=field):
        ak.Adapters(nn.Sequential(nn.Linear(4, 3))).load(path)


@pytest.mark.parametrize("name", ["default", "style"])
def test_biases_of_a_saved_module_are_no_adapter_of_their_own(tmp_path: Path, name: str) -> None:
    """With bias="all" PEFT writes the biases inside of a saved module a second time, with the adapter's name."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Sequential(nn.Linear(3, 5)))
    a, b, bias, inner = torch.randn(1, 4), torch.randn(3, 1), torch.randn(3), nn.Linear(3, 5).requires_grad_(False)
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 2, "bias": "all", "modules_to_save": ["1"]}
    tensors = {"0.lora_A.weight": a, "0.lora_B.weight": b, "0.base_layer.bias": bias, "1.0.weight": inner.weight}
    copies = {"1.0.bias": inner.bias, f"1.modules_to_save.{name}.0.bias": inner.bias.clone()}
    keys = {f"base_model.model.{key}": tensor for key, tensor in {**tensors, **copies}.items()}
    adapters = ak.Adapters(model)
    adapters.load(folder(tmp_path / "it", config, keys))
    adapters.activate("it")
    x = torch.randn(2, 4)
    torch.testing.assert_close(model(x), inner(x @ (model[0].weight + 2 * b @ a).mT + bias))


def tied_t5() -> T5ForConditionalGeneration:
    config = T5Config(
        vocab_size=9, d_model=4, d_kv=2, d_ff=4, num_layers=1, num_heads=2, tie_word_embeddings=True, dropout_rate=0.0
    )
    return T5ForConditionalGeneration(config).eval()


@pytest.mark.parametrize(
    "owners", [["shared"], ["shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head"]], ids=["one", "all"]
)
def test_rows_of_a_shared_embedding_act_wherever_its_weight_does(tmp_path: Path, owners: list[str]) -> None:
    """T5's shared embedding never runs: two others and the head have its weight. PEFT writes rows once, or for all."""
    model, rows, values = tied_t5(), [2, 5], torch.randn(2, 4)
    config = {"peft_type": "TRAINABLE_TOKENS", "target_modules": ["shared"], "token_indices": rows}
    keys = {f"base_model.model.{path}.trainable_tokens_delta": values.clone() for path in owners}
    adapters = ak.Adapters(model)
    adapters.load(folder(tmp_path / "it", config, keys))
    other = tied_t5()
    other.load_state_dict({name: t for name, t in model.state_dict().items() if "adapterkit" not in name}, strict=False)
    other.shared.weight.data[rows] = values
    ids = {"input_ids": torch.tensor([[2, 3, 5]]), "decoder_input_ids": torch.tensor([[5, 1]])}
    adapters.activate("it")
    torch.testing.assert_close(model(**ids).logits, other(**ids).logits)
    with pytest.raises(errors.CheckpointError, match="share its weight"):
        adapters.save("it", tmp_path / "out", format="peft")


@pytest.mark.parametrize("both", [False, True])
def test_rows_of_an_embedding_act_once_in_the_head_that_is_tied_to_it(tmp_path: Path, both: bool) -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_positions=8, n_embd=4, n_layer=1, n_head=2)).eval()
    want, values = copy.deepcopy(model), torch.randn(1, 4)
    paths = ["transformer.wte", *(["lm_head"] if both else [])]
    config = {"peft_type": "TRAINABLE_TOKENS", "target_modules": ["wte"], "token_indices": [3]}
    keys = {f"base_model.model.{path}.trainable_tokens_delta": values.clone() for path in paths}
    adapters = ak.Adapters(model)
    adapters.load(folder(tmp_path / "it", config, keys))
    adapters.activate("it")
    want.transformer.wte.weight.data[3] = values
    ids = torch.tensor([[3, 1, 2]])
    torch.testing.assert_close(model(ids).logits, want(ids).logits)


def test_an_embedding_adapted_as_a_parameter_has_factors_of_the_weight_as_it_is_kept(tmp_path: Path) -> None:
    model, a, b = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 3)), torch.randn(2, 3), torch.randn(5, 2)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_parameters": ["0.weight"]}
    keys = {"base_model.model.0.lora_A.weight": a, "base_model.model.0.lora_B.weight": b}
    adapters = ak.Adapters(model)
    adapters.load(folder(tmp_path / "it", config, keys))
    adapters.activate("it")
    ids = torch.tensor([[4, 0, 2]])
    torch.testing.assert_close(model(ids), model[1]((model[0].weight + 1.5 * b @ a)[ids]))


def test_adalora_of_a_fused_projection_is_written_as_it_came(tmp_path: Path) -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_positions=8, n_embd=4, n_layer=1, n_head=2))
    config = {"peft_type": "ADALORA", "init_r": 3, "target_r": 2, "lora_alpha": 5, "fan_in_fan_out": True}
    shapes = {"lora_A": (2, 4), "lora_B": (12, 2), "lora_E": (2, 1)}
    keys = {f"base_model.model.transformer.h.0.attn.c_attn.{end}": torch.randn(shape) for end, shape in shapes.items()}
    adapters = ak.Adapters(model)
    adapters.load(folder(tmp_path / "it", config, keys))
    adapters.save("it", tmp_path / "out", format="peft")
    torch.testing.assert_close(load_file(str(tmp_path / "out" / "adapter_model.safetensors")), keys)
