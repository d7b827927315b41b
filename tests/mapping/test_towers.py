"""Towers of any model, and known models in modules of a user's own, by what their classes and configs tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    LlamaConfig,
    LlamaModel,
    T5GemmaConfig,
)

import adapterkit as ak
from adapterkit.mapping.model import map_model
from adapterkit.mapping.towers import towers
from tests.backends import multimodal_models
from tests.backends import vision_checks as checks

SIZES: dict[str, Any] = {
    "vocab_size": 20,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def llama() -> Any:
    torch.manual_seed(1)
    return LlamaModel(LlamaConfig(**SIZES, num_key_value_heads=2, pad_token_id=0)).eval()


def vit() -> Any:
    torch.manual_seed(2)
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3}
    return timm.create_model("vit_tiny_patch16_224", **sizes).eval()


class Reader(nn.Module):
    """A user's own: a language model with a head, and an image encoder before it."""

    def __init__(self, *images: nn.Module) -> None:
        super().__init__()
        self.reads = nn.ModuleDict({"text": llama()})
        self.images = nn.ModuleList(images)
        self.bridge, self.score = nn.Linear(3, 16), nn.Linear(16, 4)

    def forward(self, ids: Tensor, image: Tensor) -> Tensor:
        text = self.reads["text"](ids).last_hidden_state.mean(1)
        return self.score(text + sum(self.bridge(one(image)) for one in self.images))


def inputs() -> tuple[Tensor, Tensor]:
    return torch.arange(1, 7)[None], torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16)


def run(model: nn.Module) -> Tensor:
    return model(*inputs())


def reader(count: int = 1) -> Reader:
    torch.manual_seed(3)
    return Reader(*(vit() for _ in range(count))).eval().requires_grad_(False)


def test_known_models_in_a_users_own_keep_their_family() -> None:
    model = reader()
    points = ak.points(model)
    language, vision = (sorted(ak.points(part).ids) for part in (model.reads["text"], model.images[0]))
    assert sorted(p.id for p in points if p.component == "language") == language
    assert sorted(p.id for p in points if p.component == "vision") == vision
    beside = [p.id for p in points if p.component == "model"]
    assert beside == ["linear@model.bridge", "head@model.score"] or beside == [
        "linear@model.bridge",
        "linear@model.score",
    ]


@pytest.mark.parametrize(
    "config",
    [ak.LoRA(rank=2, targets="all"), ak.Prefix(length=2, init_std=1.0, targets="attn.kv"), ak.Bottleneck(width=2)],
    ids=lambda config: type(config).__name__,
)
def test_adapters_act_in_them(config: ak.AdapterConfig) -> None:
    checks.check_adapter(reader(), run, config)


def test_an_adapter_moves_between_a_users_own_and_the_model_alone(tmp_path: Path) -> None:
    alone, model = llama(), reader()
    for source, target in ((alone, model), (model, alone)):
        first, second = ak.Adapters(source), ak.Adapters(target)
        first.add("a", ak.LoRA(rank=2, targets="attn.{q,v}@component=language"))
        checks.randomise(first)
        first.save("a", tmp_path / "a.safetensors")
        second.load(tmp_path / "a.safetensors", "a")
        tensors = second.state_dict("a")
        assert all(torch.equal(tensors[key], one) for key, one in first.state_dict("a").items())
        first.detach()
        second.detach()


def test_two_of_a_family_are_called_by_their_attributes() -> None:
    assert towers(reader(2)) == {"language": "reads.text", "images_0": "images.0", "images_1": "images.1"}


def test_features_of_a_known_model_keep_its_family() -> None:
    model = timm.create_model("vit_tiny_patch16_224", features_only=True, img_size=16, depth=3)
    components = map_model(model).components
    assert [(name, one.backend_name) for name, one in components.items()] == [
        ("model", "generic"),
        ("vision", "timm_vit"),
    ]
    assert "attn.kv@vision.1" in ak.points(model).ids


def test_what_a_class_wraps_is_no_tower() -> None:
    model = transformers.LlamaForCausalLM(LlamaConfig(**SIZES))
    assert towers(model) == {}
    config = {**SIZES, "num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 8}
    both = {
        "encoder": {"model_type": "t5_gemma_module", **config},
        "decoder": {"model_type": "t5_gemma_module", **config},
    }
    with torch.device("meta"):
        model = transformers.T5GemmaForConditionalGeneration(T5GemmaConfig(**both))
    assert towers(model) == {}, "an encoder and a decoder of text are one model"


def test_known_models_of_one_sort_are_told_apart() -> None:
    config = BertConfig(**SIZES)
    model = EncoderDecoderModel(EncoderDecoderConfig.from_encoder_decoder_configs(config, config))
    assert towers(model) == {"encoder": "encoder", "decoder": "decoder"}
    assert "attn.q@encoder.1" in ak.points(model).ids


def test_a_module_without_layers_is_no_part() -> None:
    class Bare(BertModel):
        def __init__(self) -> None:
            super().__init__(BertConfig(**SIZES))
            del self.embeddings, self.encoder, self.pooler

    holder = nn.ModuleDict({"bare": Bare(), "layer": nn.Linear(2, 2)})
    assert towers(holder) == {}


def test_towers_of_what_no_family_knows() -> None:
    for name, vision, language in (("llava", "vision_tower", "language_model"), ("qwen", "visual", "language_model")):
        model = multimodal_models.build(name)
        assert towers(model) == {"vision": f"model.{vision}", "language": f"model.{language}"}
        points = ak.points(model, backend="generic")
        assert {"attn.q@vision.1", "attn.q@language.1", "head@vision_language"} <= {*points.ids}
