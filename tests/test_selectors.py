"""The selector language."""

from __future__ import annotations

import pickle
import re
import time

import pytest

from adapterkit.errors import SelectorError, TargetNotFoundError
from adapterkit.points import (
    AttentionLayout,
    AttentionPoint,
    InjectionPoint,
    OutputLayout,
    OutputPoint,
    Points,
    WeightLayout,
    WeightPoint,
)
from adapterkit.selectors import Selector, Table


def point(role: str, layer: int = 0, form: str = "linear", **tags: str | int) -> InjectionPoint:
    return WeightPoint(
        role,
        f"blocks.{layer}.{role}",
        str(layer),
        4,
        6,
        WeightLayout(form),  # type: ignore[arg-type]
        tags={"component": "unet", "layer": layer, "stage": "up" if layer > 1 else "down", **tags},
    )


POINTS = [
    point(role, layer, "conv" if role.startswith("res.") else "linear")
    for layer in range(3)
    for role in ("attn.q", "attn.v", "cross.k", "mlp.up", "res.conv1")
] + [point("head"), point("embed.tokens", form="embedding"), point("head.transform")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("attn.q", {"attn.q"}),
        ("attn.*", {"attn.q", "attn.v"}),
        ("attn.{q,v} mlp.up", {"attn.q", "attn.v", "mlp.up"}),
        ("{attn,cross}.{q,k}", None),
        ("attention", {"attn.q", "attn.v", "cross.k"}),
        ("linear", {"attn.q", "attn.v", "cross.k", "mlp.up"}),
        ("all", {"attn.q", "attn.v", "cross.k", "mlp.up", "res.conv1"}),
        ("*", {p.role for p in POINTS}),
        ("@stage=up", {"attn.q", "attn.v", "cross.k", "mlp.up", "res.conv1"}),
        ("path:blocks.1.attn.?", {"attn.q", "attn.v"}),
        ("path:unet.blocks.*.res.*", {"res.conv1"}),
    ],
)
def test_roles(text: str, expected: set[str] | None) -> None:
    if expected is None:
        with pytest.raises(TargetNotFoundError, match=r"attn\.k"):
            Selector(text).select(POINTS)
        return
    assert {p.role for p in Selector(text).select(POINTS)} == expected


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("attn.q@layer>=1", {1, 2}),
        ("attn.q@layer<2,layer!=0", {1}),
        ("attn.q@stage=up", {2}),
        ("attn.q@stage=d*", {0, 1}),
        ("attn.q@stage!=up", {0, 1}),
        ("attn.q@layer=0 attn.q@layer=2", {0, 2}),
        ("linear@stage=up,component=unet", {2}),
    ],
)
def test_filters(text: str, layers: set[int]) -> None:
    assert {p.tags["layer"] for p in Selector(text).select(POINTS)} == layers


@pytest.mark.parametrize(
    "text",
    [
        "",
        "   ",
        "attn.q@",
        "attn.q@layer",
        "attn.q@layer~2",
        "a{b",
        "a}b",
        "a{b{c}}",
        "x" * 3000,
        "{a,b}" * 12,
        3,
        None,
    ],
)
def test_what_cannot_be_parsed(text: str) -> None:
    with pytest.raises(SelectorError):
        Selector(text)


def test_a_numbered_tag_wants_a_number() -> None:
    with pytest.raises(SelectorError, match="number"):
        Selector("attn.q@layer=first").select(POINTS)


def test_a_typo_names_what_is_near() -> None:
    with pytest.raises(TargetNotFoundError, match=r"'attn\.qq' is unknown here\. Closest: attn\.q"):
        Selector("attn.v attn.qq").select(POINTS)
    with pytest.raises(TargetNotFoundError, match="stage is one of down, up"):
        Selector("attn.q@stage=middle").select(POINTS)


def test_a_tag_that_no_point_has_is_named() -> None:
    with pytest.raises(TargetNotFoundError, match=r"have no tag 'foo', only component, .*layer"):
        Selector("attn.q@foo=1").select(POINTS)


def test_a_preset_that_selects_nothing_proposes_roles() -> None:
    with pytest.raises(TargetNotFoundError, match=r"preset 'attention' selects nothing.*targets='mlp.up'.*: mlp.up$"):
        Selector("attention").select([point("mlp.up"), point("head")])


def test_presets_leave_head_and_embeddings_alone() -> None:
    for preset in ("attention", "linear", "all"):
        roles = {p.role for p in Selector(preset).select(POINTS)}
        assert not roles & {"head", "head.transform", "embed.tokens"}


def test_no_pattern_runs_for_long() -> None:
    with pytest.raises(TargetNotFoundError):
        Selector("a*" * 400 + "b").select(POINTS)


def test_points_print_as_a_table() -> None:
    table = str(Points(POINTS[:2], {POINTS[0].id: 80}))
    assert table.splitlines()[1].split() == ["attn.q", "weight", "unet.blocks.0.attn.q", "6x4", "80"]
    assert table.endswith("2 points, 80 parameters")
    assert Points(POINTS)[:2].ids == ["attn.q@unet.0", "attn.v@unet.0"]


def test_shapes_by_layout() -> None:
    grouped = WeightPoint("c", "c", "", 8, 6, WeightLayout("conv", kernel=(3, 3), groups=2))
    assert grouped.shape == (6, 4, 3, 3)
    assert grouped.id == "c@model"
    kv = AttentionPoint("attn.kv", "a", "0", 8, 8, AttentionLayout(2, 4))
    assert kv.shape == (8, 8)
    assert OutputPoint("attn", "a", "0", 8, 8, OutputLayout("n")).id == "attn@model.0"


def test_thousands_of_alternatives_cost_what_one_costs() -> None:
    many = [point(f"attn.{name}", layer) for layer in range(100) for name in "abcdefghij"]
    text = " ".join([f"path:{p.path}" for p in many[::2]] + [f"{p.role}@layer={p.tags['layer']}" for p in many[1::2]])
    started = time.process_time()
    assert Selector(text).select(many) == many
    with pytest.raises(TargetNotFoundError, match=r"path:blocks\.0\.attn\.a.{1,200}\.\.\.'") as caught:
        Selector(f"{text} path:nowhere").select(many)
    assert "nowhere" in str(caught.value)
    assert len(str(caught.value)) < 1500
    assert time.process_time() - started < 2  # every one against every other would be a million


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a " * (1 << 20), "1,048,576 are allowed"),
        (" ".join(f"role{i}" for i in range(70_000)), "65,536 alternatives"),
        (" ".join(f"r{i}*" for i in range(1001)), "1,001 different globs"),
        ("{a,b}" * 60, "expands to 1,152,921,504,606,846,976"),
        ("x" * 2001, "2,001 characters"),
    ],
    ids=["long", "many", "globs", "braces", "word"],
)
def test_what_says_too_much_is_refused_at_once(text: str, words: str) -> None:
    started = time.process_time()
    with pytest.raises(SelectorError, match=re.escape(words)):
        Selector(text)
    assert time.process_time() - started < 2


def test_what_is_said_twice_counts_once() -> None:
    selector = Selector("attn.q " * 5000 + "attn.{q,v}")
    assert {p.role for p in selector.select(POINTS)} == {"attn.q", "attn.v"}


def test_a_table_gives_the_last_value_that_matches() -> None:
    table = Table({"attn.*": 1, "attn.q@layer=1": 2, "path:blocks.2.*": 3, "attn.q@layer=7": 4, "head": 5})
    found = {p.id: table.at(p, None) for p in POINTS}
    assert found["attn.q@unet.0"] == 1
    assert found["attn.q@unet.1"] == 2
    assert found["attn.q@unet.2"] == found["res.conv1@unet.2"] == 3
    assert found["mlp.up@unet.1"] is None
    assert table.idle([p for p in POINTS if p.role != "head"]) == ["attn.q@layer=7", "head"]
    assert pickle.loads(pickle.dumps(table)).at(POINTS[0], None) == 1
