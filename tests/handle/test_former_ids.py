"""Files of a release in which points had other ids: of towers, and of models that no family knew."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaModel, StableLmConfig, StableLmForCausalLM

import adapterkit as ak
from adapterkit.checkpoint import Checkpoint
from adapterkit.errors import BaseMismatchError
from adapterkit.formats.source import Source
from adapterkit.handle.former_ids import as_now
from adapterkit.mapping.model import map_model
from adapterkit.tools.files import read
from adapterkit.tools.modules import modules
from tests.backends import multimodal_models as towers

FOLDER = Path(__file__).parent / "former"
SIZES: dict[str, Any] = {
    "vocab_size": 20,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}


def stablelm(**changes: Any) -> Any:
    torch.manual_seed(0)
    return StableLmForCausalLM(StableLmConfig(**{**SIZES, **changes})).eval()


def see(model: Any) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(1, 7)[None]).logits if isinstance(model, StableLmForCausalLM) else towers.see(model)


BUILD: dict[str, Callable[[], Any]] = {
    "stablelm": stablelm,
    **{name: (lambda name=name: towers.build(name)) for name in ("clip", "siglip", "llava", "qwen", "qwen3")},
}


@pytest.mark.parametrize("name", BUILD)
def test_a_file_of_then_acts_as_it_did(name: str, tmp_path: Path) -> None:
    model, expected = BUILD[name](), load_file(FOLDER / "expected.safetensors")[name]
    adapters = ak.Adapters(model)
    before = see(model)
    report = adapters.load(FOLDER / f"{name}.safetensors", "a")
    assert not report.notes
    adapters.activate("a")
    assert not torch.allclose(see(model), before, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(see(model), expected, rtol=1e-5, atol=1e-6)
    stored = load_file(FOLDER / f"{name}.safetensors")
    assert len(adapters.state_dict("a")) == len(stored)
    assert adapters.state_dict("a").keys() != stored.keys()
    adapters.save("a", tmp_path / "a.safetensors")
    again = ak.Adapters(twin := BUILD[name]())
    again.load(tmp_path / "a.safetensors", "a")
    again.activate("a")
    assert torch.equal(see(twin), see(model))


@pytest.mark.parametrize("name", BUILD)
def test_it_goes_into_an_adapter_that_is_there(name: str) -> None:
    model, expected = BUILD[name](), load_file(FOLDER / "expected.safetensors")[name]
    adapters = ak.Adapters(model)
    adapters.load(FOLDER / f"{name}.safetensors", "a")
    with torch.no_grad():
        for parameter in adapters.parameters("a"):
            parameter.zero_()
    adapters.load_into("a", FOLDER / f"{name}.safetensors", strict=False)
    adapters.activate("a")
    torch.testing.assert_close(see(model), expected, rtol=1e-5, atol=1e-6)


def checkpoint(name: str, model: Any) -> Checkpoint:
    return read(Source.of(FOLDER / f"{name}.safetensors"), ak.points(model)).checkpoint


def test_tools_know_them_too() -> None:
    model = towers.build("clip")
    placed = [*modules(checkpoint("clip", model), ak.points(model))]
    assert {one.point.component for one in placed if one.point is not None} == {"clip", "vision", "text_encoder"}


def test_a_model_of_more_layers_is_another_one() -> None:
    with pytest.raises(BaseMismatchError, match=r"attn\.q 2 there, 3 here"):
        ak.Adapters(stablelm(num_hidden_layers=3)).load(FOLDER / "stablelm.safetensors", "a")


def test_another_model_is_told_as_ever() -> None:
    with pytest.raises(BaseMismatchError, match=r"made for a component 'model'"):
        ak.Adapters(LlamaModel(LlamaConfig(**SIZES))).load(FOLDER / "stablelm.safetensors", "a")


def test_its_points_are_those_of_its_tensors_whatever_its_selectors_mean_now() -> None:
    former = checkpoint("clip", model := towers.build("clip"))
    other = dataclasses.replace(former.part, config={**former.part.config, "targets": "mlp.down"})
    mapped, adapters = map_model(model), ak.Adapters(model)
    adapters.install("a", dataclasses.replace(former, parts=[other]), source="a file of then")
    wanted = as_now(former, mapped.points(), mapped.components).part.tensors
    assert adapters.modules("a").keys() == wanted.keys()


def test_ids_of_today_are_left_alone() -> None:
    model = towers.build("clip")
    adapters = ak.Adapters(model)
    adapters.add("a", ak.LoRA(rank=1))
    mapped, saved = map_model(model), adapters.checkpoint("a")
    assert as_now(saved, mapped.points(), mapped.components) is saved


def test_what_means_two_points_or_none_is_missing() -> None:
    model = towers.build("clip")
    mapped = map_model(model)
    former = checkpoint("clip", model)
    for key in ("attn.q@clip.3", "attn.q@clip.vision.9", "linear@clip.text_model.encoder.layers.0.mlp.fc9"):
        part = dataclasses.replace(former.part, tensors={key: {}})
        odd = dataclasses.replace(former, parts=[part])
        assert as_now(odd, mapped.points(), mapped.components) is odd
    both = {"attn.q@clip.vision.0": {}, "attn.q@vision.0": {}}
    odd = dataclasses.replace(former, parts=[dataclasses.replace(former.part, tensors=both)])
    assert [*as_now(odd, mapped.points(), mapped.components).part.tensors] == [*both]
