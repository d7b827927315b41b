"""What the handle tells of adapters, and what a file is told of where they come from."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import adapterkit as ak
from adapterkit.checkpoint import ReadReport, WriteReport
from adapterkit.formats.registry import NamedFormat
from adapterkit.handle.merging import _Target
from adapterkit.handle.reports import LoadReport
from adapterkit.handle.training import _Watch
from adapterkit.points import Span, WeightLayout, WeightPoint
from adapterkit.testing import models, toys
from tests.values import randomize


class Pipe:
    """A language and a vision model."""

    def __init__(self) -> None:
        self.text, self.vision = toys.ToyModel(), models.ToyVision()

    @property
    def components(self) -> dict[str, Any]:
        return {"text": self.text, "vision": self.vision}


@pytest.fixture
def adapters() -> ak.Adapters:
    toys.register()
    made = ak.Adapters(toys.ToyModel().eval())
    made.add("a", ak.LoRA(rank=2, targets="attn.q"))
    made.add("kv", ak.Prefix(length=2), dtype=torch.float16)
    randomize(made, "a")
    return made


def test_a_report_counts_numbers_and_bytes(adapters: ak.Adapters) -> None:
    told = {one.name: one for one in adapters.report().adapters}
    for name, each in (("a", 4), ("kv", 2)):
        tensors = adapters.state_dict(name).values()
        assert told[name].parameters == sum(tensor.numel() for tensor in tensors)
        assert told[name].bytes == each * told[name].parameters


def test_what_is_told_cannot_be_changed(adapters: ak.Adapters, tmp_path: Path) -> None:
    adapters.save("a", tmp_path / "a.safetensors")
    whole = adapters.report()
    told = [whole, whole.adapters[0], adapters.load(tmp_path / "a.safetensors", "b"), adapters._attached("a").facts]
    for one in told:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(one, dataclasses.fields(one)[0].name, None)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_what_was_left_out_is_told_where_there_is_some(count: int) -> None:
    keys = [f"k{i}" for i in range(count)]
    for read, words in (
        (ReadReport(unmatched=keys), "belong to no point"),
        (ReadReport(left_over=keys), "are unknown"),
    ):
        text = str(LoadReport("a", "lora", ["p"], 3, read=read))
        assert (words in text) == bool(keys)
        assert all(key in text for key in keys)


def test_a_file_says_who_provides_the_type_and_the_family() -> None:
    toys.register()
    pipe = Pipe()
    adapters = ak.Adapters(pipe)
    adapters.add("a", ak.LoRA(rank=2, targets="attn.q@component=text"))
    found = adapters.checkpoint("a")
    assert (found.part.distribution, found.part.version) == ("adapterkit", ak.__version__)
    assert set(found.backends) == {"text"}


def test_notes_point_to_the_line_that_saves(
    adapters: ak.Adapters, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(NamedFormat, "write", lambda *args: WriteReport(notes=["half of it"]))
    with pytest.warns(UserWarning, match="half of it") as caught:
        adapters.save("a", tmp_path / "a.safetensors")
    assert caught[0].filename == __file__


@pytest.mark.parametrize("count", [4, 5, 6, 7])
def test_few_points_are_named(count: int) -> None:
    parts: Any = {f"p{i}": None for i in range(count)}
    named = _Target(nn.Identity(), "", WeightLayout("linear"), {None: parts}).keys
    assert named.count("p") == min(count, 5)
    assert ("more" in named) == (count > 5)
    assert count <= 5 or named.endswith(f", and {count - 5} more")


def test_a_point_that_sees_a_part_of_the_input_observes_that_part() -> None:
    seen: list[torch.Tensor] = []
    point = WeightPoint("attn.o", "o", "", 4, 5, WeightLayout("linear"), in_span=Span(2, 4))
    observer: Any = SimpleNamespace(observe=seen.append)
    x = torch.randn(8, 3, 6)
    _Watch(observer, point, SimpleNamespace(is_in=lambda block: True), None)(nn.Identity(), (x,), {})  # type: ignore[arg-type]
    assert torch.equal(seen[0], x[..., 2:])
