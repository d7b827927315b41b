"""What the handle tells of adapters, and what a file is told of where they come from."""

from __future__ import annotations

import dataclasses
import gc
import json
import pickle
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import adapterkit as ak
from adapterkit.checkpoint import ReadReport, WriteReport
from adapterkit.errors import IncompatibleTargetError
from adapterkit.formats.registry import NamedFormat
from adapterkit.handle import effects
from adapterkit.handle.merged_weights import Target
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
    named = Target(nn.Identity(), "", WeightLayout("linear"), {None: parts}).keys
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


# -- what a load says of the effect -----------------------------------------------------------------------------------


@pytest.fixture
def loaded(adapters: ak.Adapters, tmp_path: Path) -> LoadReport:
    adapters.add("two", ak.LoRA(rank=2, ranks={"mlp.up": 3}, alphas={"mlp.up": 6.0}, targets="attn.q mlp.up"))
    randomize(adapters, "two")
    adapters.save("two", tmp_path / "two.safetensors")
    return adapters.load(tmp_path / "two.safetensors", "back")


def test_the_effect_of_what_was_loaded(adapters: ak.Adapters, loaded: LoadReport) -> None:
    assert loaded.effects is not None
    assert loaded.effects.ranks == {2: 2, 3: 2}
    assert loaded.effects.scales == {1.0: 2, 2.0: 2}
    before = {path: p.clone() for path, p in adapters._mapped.components["toy"].root.named_parameters()}
    adapters.activate("back")
    adapters.merge()
    squares = {"toy.0": 0.0, "toy.1": 0.0}
    for path, now in adapters._mapped.components["toy"].root.named_parameters():
        if path in before:
            block = next((number for number in "01" if f".{number}." in path), None)
            change = float((now - before[path]).detach().square().sum())
            if block is not None:
                squares[f"toy.{block}"] += change
    assert loaded.effects.norms == pytest.approx({block: square**0.5 for block, square in squares.items()}, rel=1e-4)
    assert loaded.effects.norm == pytest.approx(sum(squares.values()) ** 0.5, rel=1e-4)


def test_a_load_report_prints_and_serialises_what_was_loaded(loaded: LoadReport) -> None:
    told = str(loaded)
    for words in ("rank 2 at 2, 3 at 2", "scale 1 at 2, 2 at 2", "matched 8 keys", "toy.0 ", "from native, written by"):
        assert words in told
    values = json.loads(json.dumps(loaded.to_dict()))
    assert values["effects"]["ranks"] == {"2": 2, "3": 2}
    assert set(values["effects"]["norms"]) == {"toy.0", "toy.1"}
    assert len(values["read"]["matched"]) == 8
    assert "ToyModel" in values["read"]["base"]


def test_a_load_computes_no_effect(
    adapters: ak.Adapters, loaded: LoadReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(effects, "_norm", lambda *args: pytest.fail("nobody asked"))
    adapters.load(tmp_path / "two.safetensors", "again")


def test_a_report_does_not_keep_an_adapter(adapters: ak.Adapters, loaded: LoadReport) -> None:
    module = weakref.ref(next(iter(adapters.modules("back").values())))
    adapters.remove("back")
    gc.collect()
    assert module() is None
    adapters.add("back", ak.LoRA(rank=7))  # another one of this name
    assert loaded.effects is None
    assert loaded.to_dict()["effects"] is None
    assert "rank" not in str(loaded)


def test_a_report_can_be_sent_elsewhere(loaded: LoadReport) -> None:
    there = pickle.loads(pickle.dumps(loaded))
    assert there == loaded
    assert there.effects == loaded.effects
    assert str(there) == str(loaded)


@pytest.mark.parametrize(
    "config", [ak.DoRA(rank=2, targets="attn.q"), ak.Trainable(targets="norm"), ak.Prefix(length=2)], ids=str
)
def test_the_effect_of_other_types(adapters: ak.Adapters, tmp_path: Path, config: ak.AdapterConfig) -> None:
    root = adapters._mapped.components["toy"].root
    adapters.add("one", config)
    randomize(adapters, "one")
    adapters.save("one", tmp_path / "one.safetensors")
    found = adapters.load(tmp_path / "one.safetensors", "back").effects
    assert found is not None
    if isinstance(config, ak.Prefix):
        assert (found.norms, found.unknown) == ({}, {"it changes no weight": 2})
        return
    before = {path: p.clone() for path, p in root.named_parameters()}
    adapters.activate("back")
    adapters.merge()
    changes = [(now - before[path]).detach() for path, now in root.named_parameters() if path in before]
    assert found.norm == pytest.approx(sum(float(c.square().sum()) for c in changes) ** 0.5, rel=1e-4)
    assert (found.ranks == {2: 2}) == isinstance(config, ak.DoRA)


def test_a_model_without_values_has_no_norm_that_needs_them(adapters: ak.Adapters, tmp_path: Path) -> None:
    adapters.add("one", ak.DoRA(rank=2, targets="attn.q"))
    adapters.save("one", tmp_path / "one.safetensors")
    with torch.device("meta"):
        bare = toys.ToyModel()
    found = ak.Adapters(bare).load(tmp_path / "one.safetensors").effects
    assert found is not None
    assert sum(found.unknown.values()) == 2


def test_a_base_that_is_quantized_is_told_once(
    adapters: ak.Adapters, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many points there are."""

    def refuse(taker: str, point: Any, mapped: object) -> None:
        raise IncompatibleTargetError(f"no values at {point.id}")

    adapters.add("one", ak.DoRA(rank=2, targets="attn.q"))
    adapters.save("one", tmp_path / "one.safetensors")
    report = adapters.load(tmp_path / "one.safetensors", "back")
    monkeypatch.setattr(effects, "base_values", refuse)
    found = report.effects
    assert found is not None
    assert list(found.unknown.values()) == [2]
    assert str(report).count("no norm at") == 1
