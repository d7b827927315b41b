"""Handles on pipelines that share parts, on parts of a pipeline, and on pipelines whose parts are exchanged."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit import errors
from adapterkit.testing import toys
from tests.values import randomize

LORA = ak.LoRA(rank=2, targets="attn.*")
TEXT = ak.LoRA(rank=2, targets="attn.*@component=text_encoder")
UNET = ak.LoRA(rank=2, targets="attn.*@component=unet")


class Pipeline(SimpleNamespace):
    """As diffusers has it: components by name, which are attributes too."""

    @property
    def components(self) -> dict[str, Any]:
        return dict(vars(self))


@pytest.fixture(autouse=True)
def _toys() -> None:
    toys.register()


def toy(seed: int) -> toys.ToyModel:
    return toys.ToyModel(layers=1, seed=seed).double().eval()


def pipeline(**parts: nn.Module) -> Pipeline:
    return Pipeline(**{"unet": toy(1), "text_encoder": toy(2), **parts})


def add(adapters: ak.Adapters, name: str, config: ak.AdapterConfig) -> None:
    adapters.add(name, config)
    randomize(adapters, name)


@torch.no_grad()
def outputs(pipe: Pipeline) -> dict[str, Tensor]:
    return {name: part(toys.ids()) for name, part in pipe.components.items() if part is not None}


def changed(pipe: Pipeline, before: dict[str, Tensor]) -> set[str]:
    return {name for name, y in outputs(pipe).items() if not torch.equal(y, before[name])}


def test_pipelines_that_share_a_part_have_adapters_of_their_own() -> None:
    first = pipeline()
    second = pipeline(unet=toy(3), text_encoder=first.text_encoder)
    before, others = outputs(first), outputs(second)
    style, polish = ak.Adapters(first), ak.Adapters(second)
    add(style, "a", LORA)
    assert changed(first, before) == {"unet", "text_encoder"}
    assert changed(second, others) == {"text_encoder"}
    assert list(polish) == []
    both = outputs(first)
    add(polish, "a", UNET)
    assert changed(first, both) == set()
    assert changed(second, others) == {"unet", "text_encoder"}
    style.detach()
    assert list(polish) == ["a"]
    assert changed(second, others) == {"unet"}
    polish.detach()
    assert changed(second, others) == changed(first, before) == set()
    for part in (first.unet, second.unet, first.text_encoder):
        assert all(p.requires_grad for p in part.parameters())
        assert not any(key.startswith("_adapterkit") for module in part.modules() for key in module.__dict__)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_what_is_shared_is_frozen_until_the_last_has_gone(order: tuple[int, int]) -> None:
    first = pipeline()
    second = pipeline(unet=toy(3), text_encoder=first.text_encoder)
    first.text_encoder.norm.requires_grad_(False)
    found = {name: p.requires_grad for name, p in first.text_encoder.named_parameters()}
    handles = [ak.Adapters(first), ak.Adapters(second)]
    for handle in handles:
        handle.add("a", UNET)
    handles[order[0]].detach()
    assert not any(p.requires_grad for p in first.text_encoder.parameters())
    handles[order[1]].detach()
    assert {name: p.requires_grad for name, p in first.text_encoder.named_parameters()} == found


def test_a_handle_on_more_parts_grows_the_state(tmp_path: Path) -> None:
    pipe = pipeline()
    small = ak.Adapters(pipe)
    add(small, "style", LORA)
    large = ak.Adapters(pipeline(unet=pipe.unet, text_encoder=pipe.text_encoder, controlnet=toy(4)))
    assert list(large) == ["style"]
    large.add("control", ak.LoRA(rank=2, targets="attn.*@component=controlnet"))
    assert list(large) == list(small) == ["style", "control"]
    assert large.active == small.active == {"control": 1.0}
    part = ak.Adapters(pipe.unet)  # an adapter that lies elsewhere is saved, merged and removed all the same
    part.save("control", tmp_path / "control.safetensors")
    part.merge("control")
    part.unmerge()
    part.remove("control")
    assert list(large) == ["style"]
    large.load(tmp_path / "control.safetensors")
    assert {point.partition("@")[2].partition(".")[0] for point in large.modules("control")} == {"controlnet"}


def test_a_part_first_and_then_the_whole() -> None:
    pipe = pipeline()
    before = outputs(pipe)
    part, whole = ak.Adapters(pipe.unet), ak.Adapters(pipe)
    assert {point.component for point in part.points()} == {"toy"}  # as it is called alone
    add(whole, "words", TEXT)
    assert list(part) == ["words"]
    assert {point.component for point in part.points()} == {"unet"}
    add(part, "style", LORA)
    whole.activate(["words", "style"])
    assert changed(pipe, before) == {"unet", "text_encoder"}
    part.activate("style")
    assert changed(pipe, before) == {"unet"}
    part.detach()
    assert changed(pipe, before) == set()


def test_parts_that_were_adapted_alone_are_one_in_the_pipeline() -> None:
    pipe = pipeline()
    before = outputs(pipe)
    wholes = [ak.Adapters(Pipeline(unet=pipe.unet)), ak.Adapters(Pipeline(text_encoder=pipe.text_encoder))]
    add(wholes[0], "style", LORA)
    add(wholes[1], "words", LORA)
    whole = ak.Adapters(pipe)
    assert list(whole) == ["style", "words"]
    assert whole.active == {"style": 1.0, "words": 1.0}
    assert changed(pipe, before) == {"unet", "text_encoder"}
    whole.activate("words")
    assert changed(pipe, before) == {"text_encoder"}
    assert wholes[0].active == {"words": 1.0}
    y = outputs(pipe)
    with whole.merged("style"):
        assert changed(pipe, y) == {"unet", "text_encoder"}
    wholes[1].remove("words")
    whole.detach()
    assert changed(pipe, before) == set()


def test_parts_with_one_name_in_both_are_refused_and_stay_as_they_were() -> None:
    pipe = pipeline()
    unet, text = ak.Adapters(Pipeline(unet=pipe.unet)), ak.Adapters(Pipeline(text_encoder=pipe.text_encoder))
    unet.add("a", LORA)
    text.add("a", LORA)
    with pytest.raises(errors.AttachError, match="'a' is in both; remove it"):
        ak.Adapters(pipe)
    unet.remove("a")
    assert list(ak.Adapters(pipe)) == ["a"]


def test_merged_parts_are_joined_when_they_are_unmerged() -> None:
    pipe = pipeline()
    unet, text = ak.Adapters(Pipeline(unet=pipe.unet)), ak.Adapters(Pipeline(text_encoder=pipe.text_encoder))
    unet.add("a", LORA)
    text.add("b", LORA)
    unet.merge()
    with pytest.raises(errors.StateError, match="unmerge"):
        ak.Adapters(pipe)
    unet.unmerge()
    assert list(ak.Adapters(pipe)) == ["a", "b"]


def test_a_second_part_of_one_class_is_known_by_its_name_in_the_pipeline() -> None:
    pipe = pipeline(text_encoder_2=toy(5))
    before = outputs(pipe)
    add(ak.Adapters(pipe), "words", TEXT)
    one = ak.Adapters(pipe.text_encoder_2)
    assert {point.component for point in one.points()} == {"text_encoder_2"}
    add(one, "more", LORA)
    assert changed(pipe, before) == {"text_encoder_2"}
    ak.Adapters(pipe).detach()
    assert changed(pipe, before) == set()


def test_an_exchanged_part_is_followed_where_nothing_acts_in_it() -> None:
    pipe = pipeline()
    adapters = ak.Adapters(pipe)
    add(adapters, "words", TEXT)
    old, pipe.unet = pipe.unet, toy(6)
    before = outputs(pipe)
    add(adapters, "style", UNET)
    assert list(adapters) == ["words", "style"]
    assert changed(pipe, before) == {"unet", "text_encoder"}
    assert [key for key in old.__dict__ if key.startswith("_adapterkit") and key != "_adapterkit_found"] == []
    adapters.detach()
    assert list(ak.Adapters(old)) == []


def test_an_exchanged_part_with_adapters_is_told_by_every_verb(tmp_path: Path) -> None:
    pipe = pipeline()
    adapters = ak.Adapters(pipe)
    add(adapters, "style", LORA)
    old, pipe.unet = pipe.unet, toy(6)
    before = old(toys.ids())
    for verb in (
        adapters.report,
        adapters.merge,
        lambda: adapters.activate("style"),
        lambda: adapters.save("style", tmp_path / "a.safetensors"),
        lambda: adapters.add("more", TEXT),
    ):
        with pytest.raises(errors.ReplacedError, match="the unet of the Pipeline is another model now, and 'style'"):
            verb()
    assert not (tmp_path / "a.safetensors").exists()
    adapters.detach()
    assert not torch.equal(old(toys.ids()), before)
    now = outputs(pipe)
    add(adapters, "style", LORA)
    assert changed(pipe, now) == {"unet", "text_encoder"}


def test_a_part_that_was_freed_is_not_missed() -> None:
    pipe = pipeline()
    adapters = ak.Adapters(pipe)
    add(adapters, "style", LORA)
    pipe.text_encoder = None
    adapters.activate({"style": 0.5})
    adapters.report()
    adapters.detach()


def test_a_wrapped_part_is_the_same() -> None:
    pipe = pipeline()
    adapters = ak.Adapters(pipe)
    add(adapters, "style", LORA)
    pipe.unet = nn.DataParallel(pipe.unet)
    adapters.activate({"style": 0.5})
    assert list(ak.Adapters(pipe)) == ["style"]
