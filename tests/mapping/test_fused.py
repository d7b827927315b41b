"""A layer as a whole, beside the points that are its rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import adapterkit as ak
from adapterkit.mapping.fused import fused_points
from adapterkit.points import Points, Span, WeightLayout, WeightPoint
from adapterkit.selectors import Selector
from tests.backends import language_models as models


def part(role: str, span: Span, index: int | None = None) -> WeightPoint:
    tags = {"component": "m", "layer": 0}
    layout = WeightLayout("linear", index=index)
    return WeightPoint(role, "a.qkv", "0", 4, span.features, layout, span, tags={**tags, "own": role})


QKV = [part(f"attn.{name}", Span(2 * i, 2)) for i, name in enumerate("qkv")]


def test_the_whole_has_all_rows_and_what_its_parts_agree_on() -> None:
    [whole] = fused_points(QKV)
    assert (whole.id, whole.shape, whole.span, whole.tags) == (
        "fused.attn@m.0",
        (6, 4),
        None,
        {"component": "m", "layer": 0},
    )
    heads = [part(f"attn.{name}", Span(2 * i, 2, 3, 6)) for i, name in enumerate("qkv")]
    assert [p.out_features for p in fused_points(heads)] == [18]


@pytest.mark.parametrize(
    "points",
    [QKV[:1], [QKV[0], QKV[2]], [part("moe.up", Span(0, 2), 0), part("moe.gate", Span(2, 2), 0)]],
    ids=["one part", "rows of no point", "experts"],
)
def test_what_is_no_whole_has_no_point(points: list[WeightPoint]) -> None:
    assert fused_points(points) == []


def test_only_its_name_reaches_it() -> None:
    points = Points([*QKV, *fused_points(QKV)])
    for text in ("*", "all", "linear", "path:*", "path:a.qkv", "@layer=0"):
        chosen = [point.role for point in points if Selector(text).matches(point)]
        assert chosen == ["attn.q", "attn.k", "attn.v"], text
    assert [point.role for point in points if Selector("fused.attn").matches(point)] == ["fused.attn"]


@pytest.fixture
def gpt2() -> nn.Module:
    return models.build("GPT2")


IDS = torch.arange(7)[None]


def test_it_acts_before_its_parts_and_merges_with_them(gpt2: nn.Module, tmp_path: Path) -> None:
    base = gpt2(IDS).logits
    adapters = ak.Adapters(gpt2)
    adapters.add("whole", ak.DoRA(rank=2, targets="fused.attn"))
    adapters.add("part", ak.LoRA(rank=2, targets="attn.{q,v}"))
    with torch.no_grad():
        for name in ("whole", "part"):
            for parameter in adapters.parameters(name):
                parameter.add_(torch.randn_like(parameter) * 0.3)
    adapters.activate("whole")
    alone = gpt2(IDS).logits
    adapters.activate({"whole": 1.0, "part": 1.0})
    both = gpt2(IDS).logits
    assert (both - alone).abs().max() > 1e-3
    adapters.merge()
    torch.testing.assert_close(gpt2(IDS).logits, both, rtol=1e-9, atol=1e-9)
    adapters.unmerge()
    adapters.load(adapters.save("whole", tmp_path / "w.safetensors"), "again")
    adapters.activate("again")
    assert torch.equal(gpt2(IDS).logits, alone)
    adapters.detach()
    assert torch.equal(gpt2(IDS).logits, base)


def test_an_update_of_the_whole_is_those_of_its_parts(gpt2: nn.Module) -> None:
    adapters = ak.Adapters(gpt2)
    adapters.add("whole", ak.LoRA(rank=2, targets="fused.attn"))
    adapters.add("parts", ak.LoRA(rank=2, targets="attn.{q,k,v}"))
    modules, points = adapters.modules("whole"), {p.id: p for p in adapters.points()}
    parts = adapters.modules("parts")
    with torch.no_grad():
        for key, whole in modules.items():
            for parameter in whole.parameters():
                parameter.normal_()
            for role in ("attn.q", "attn.k", "attn.v"):
                own = role + key.removeprefix("fused.attn")
                span = points[own].span
                assert span is not None
                parts[own].A.copy_(whole.A)  # type: ignore[operator,union-attr]
                parts[own].B.copy_(whole.B[span.start : span.start + span.size])  # type: ignore[operator,union-attr,index]
    adapters.activate("whole")
    expected = gpt2(IDS).logits
    adapters.activate("parts")
    torch.testing.assert_close(gpt2(IDS).logits, expected, rtol=1e-9, atol=1e-9)


def test_a_part_that_reads_the_weight_sees_what_acts_on_the_whole(gpt2: nn.Module) -> None:
    adapters = ak.Adapters(gpt2)
    adapters.add("whole", ak.LoRA(rank=2, targets="fused.attn"))
    adapters.add("part", ak.DoRA(rank=2, targets="attn.{q,v}"))
    with torch.no_grad():
        for name in ("whole", "part"):
            for parameter in adapters.parameters(name):
                parameter.add_(torch.randn_like(parameter) * 0.3)
    adapters.activate({"whole": 1.0, "part": 1.0})
    both = gpt2(IDS).logits
    adapters.merge()
    torch.testing.assert_close(gpt2(IDS).logits, both, rtol=1e-9, atol=1e-9)
