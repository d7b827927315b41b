"""Backends that strangers have written: what is wrong with one is said, by name, and the model stays as it was."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
from torch import nn

import adapterkit as ak
from adapterkit import errors
from adapterkit.backend import AttentionSeam, Backend, Reach
from adapterkit.mapping.family import (
    Attention,
    Experts,
    Fused,
    FusedInput,
    Group,
    Output,
    Read,
    Tokens,
    Weight,
    equal_parts,
    resolve,
)
from adapterkit.points import InjectionPoint, OutputLayout, Span, WeightLayout, WeightPoint
from adapterkit.specs import BackendSpec
from adapterkit.testing import toys
from adapterkit.testing.toys import ToyBackend
from tests.formats.spoiling import snapshot


class Strange(ToyBackend):
    """A backend of the toy model whose answers the tests replace."""


class Incomplete(Backend):
    """Lacks `points`."""


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    manager = ak.get_plugin_manager()
    specs = [BackendSpec(cls, f"{__name__}:{cls}", models=(f"nowhere:{cls}",)) for cls in ("strange", "incomplete")]
    plugin: Any = ModuleType("zoo")
    plugin.adapterkit_register_backends = ak.hookimpl(lambda: specs, specname="adapterkit_register_backends")
    manager.register(plugin, name="zoo")
    yield
    manager.unregister(name="zoo")


strange, incomplete = Strange, Incomplete


def refused(model: nn.Module, backend: str = "strange") -> str:
    """The error's text, after the model was found as it was."""
    before = snapshot(model)
    with pytest.raises(errors.PluginError) as caught:
        ak.Adapters(model, backend=backend).add("a", ak.LoRA(rank=2, targets="attn.*"))
    assert snapshot(model) == before
    assert caught.value.plugin == "zoo"
    assert f"backend {backend!r}" in str(caught.value)
    return str(caught.value)


def raising(*_: object) -> Any:
    raise KeyError("blocks")


SEAM = AttentionSeam()
POINT = WeightPoint(
    "attn.o", "blocks.0.attn.proj", "0", 8, 8, WeightLayout("linear", bias=True), tags={"component": "toy"}
)
POINTS = {
    "an error": (raising, "points() raised KeyError: 'blocks'"),
    "nothing": (lambda *_: None, "returned None; expected a list of InjectionPoint"),
    "a string": (lambda *_: "attn.q", "returned 'attn.q'; expected a list of InjectionPoint"),
    "paths": (lambda *_: ["blocks.0"], "returned 'blocks.0' among the points; expected only InjectionPoint"),
    "no module there": (lambda *_: [replace(POINT, path="blocks.0.attn.porj")], "Closest: blocks.0.attn.proj"),
    "no tag": (lambda *_: [replace(POINT, tags={})], "expected tags={'component': 'toy', ...}"),
    "a class": (
        lambda *_: [InjectionPoint("a", "blocks.0", "", 8, 8, None, tags={"component": "toy"})],
        "is a InjectionPoint; expected one of WeightPoint, NormPoint",
    ),
    "a layout": (
        lambda *_: [replace(POINT, layout=OutputLayout("blocks.0"))],
        "has the layout OutputLayout; a WeightPoint has a WeightLayout",
    ),
    "a site": (lambda *_: [replace(POINT, site=0)], "role, path and site must be strings"),
    "widths": (lambda *_: [replace(POINT, in_features=8.0)], "(8.0, 8); expected positive integers"),
    "one id twice": (
        lambda *_: [POINT, replace(POINT, path="blocks.1.attn.proj")],
        "two points have the id 'attn.o@toy.0', at 'blocks.0.attn.proj' (weight) and at 'blocks.1.attn.proj' (weight)."
        " An id is role@component.site: give them different roles, or put the second into a Group of its own",
    ),
}


@pytest.mark.parametrize("case", POINTS)
def test_points_are_checked(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    points, reason = POINTS[case]
    monkeypatch.setattr(Strange, "points", points)
    assert reason in refused(toys.ToyModel())


def test_it_must_be_a_backend() -> None:
    assert "Can't instantiate abstract class" in refused(toys.ToyModel(), "incomplete")


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (raising, "reach() raised KeyError"),
        (lambda *_: AttentionSeam(), "for attn.kv@toy.0; expected a Reach"),
        (lambda *_: None, "returned None for attn.kv@toy.0; expected a Reach"),
        (lambda *_: Reach(), "returned Reach(seam=None) for attn.kv@toy.0; expected an AttentionSeam"),
        (lambda *_: Reach(seam=AttentionSeam), "expected an AttentionSeam"),  # type: ignore[arg-type]
        (lambda *_: Reach(SEAM, plain="forward"), "Reach(plain='forward') for attn.kv@toy.0; expected a function"),  # type: ignore[arg-type]
        (lambda *_: Reach(SEAM, lengthening=1), "Reach(lengthening=1) for attn.kv@toy.0; expected a function"),  # type: ignore[arg-type]
        (lambda *_: Reach(SEAM, attending=None), "Reach(attending=None) for attn.kv@toy.0; expected path"),  # type: ignore[arg-type]
        (lambda *_: Reach(SEAM, attending={"up": 1}), "expected path -> function"),  # type: ignore[dict-item]
        (
            lambda *_: Reach(SEAM, attending={"blocks.0.upp": raising}),
            "what attends to attn.kv@toy.0 is at 'blocks.0.upp', where the model has no module. Closest: blocks.0.up",
        ),
    ],
)
def test_how_points_are_reached_is_checked(answer: Any, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Strange, "reach", answer)
    model = toys.ToyModel()
    before = snapshot(model)
    with pytest.raises(errors.PluginError) as caught:
        ak.Adapters(model, backend="strange").add("kv", ak.Prefix(length=2))
    assert reason in str(caught.value)
    assert caught.value.plugin == "zoo"
    assert snapshot(model) == before


def mapped_by(*entries: Any, pattern: str = "blocks.{layer}", site: str = "{layer}") -> Any:
    return lambda self, model, component: resolve(model, (Group(pattern, site, entries),), component)


QKV = ("attn.q", "attn.k", "attn.v")
WRITTEN = {
    "roles in a string": (lambda: Fused("attn.q", "attn.qkv"), "Fused: roles must be a tuple of roles"),  # type: ignore[arg-type]
    "no roles": (lambda: FusedInput((), "attn.qkv"), "FusedInput: roles must be a tuple of roles"),
    "roles of experts": (lambda: Experts("moe.up", "experts", "up"), "Experts: roles must be"),  # type: ignore[arg-type]
    "a list of paths": (lambda: Weight("attn.q", ["q", "query"]), "Weight: path must be a string, not ['q', 'query']"),  # type: ignore[arg-type]
    "no path": (lambda: Read("attn.q", None), "Read: path must be a string, not None"),  # type: ignore[arg-type]
    "heads in a number": (lambda: Attention("attn.kv", "attn", 4), "Attention: heads must be a function"),  # type: ignore[arg-type]
    "heads in a string": (lambda: Attention("attn.kv", "attn", "heads"), "Attention: heads must be a function"),  # type: ignore[arg-type]
    "a split in numbers": (lambda: Fused(QKV, "attn.qkv", (8, 8, 8)), "Fused: split must be a function"),  # type: ignore[arg-type]
    "norms": (lambda: Output("mlp", "mlp", "norm2", norm_in=("a", "b")), "norm_in must be a path, or None"),  # type: ignore[arg-type]
    "extendable": (lambda: Tokens("tokens", "embed", "yes"), "extendable must be True or False"),  # type: ignore[arg-type]
    "a placeholder": (lambda: Group("blocks.{layer}", "{block}", ()), "made of the placeholders of 'blocks.{layer}'"),
    "an alternative": (lambda: Group("blocks.{layer}|h.{i}", "{layer}", ()), "placeholders of 'h.{i}' ({i})"),
    "a brace": (lambda: Group("blocks.{layer", "0", ()), "must be names joined by dots"),
    "a half placeholder": (lambda: Group("blocks{layer}", "{layer}", ()), "must be names joined by dots"),
    "a comma": (lambda: Group("", "", Weight("head", "head")), "write (Weight(...),)"),  # type: ignore[arg-type]
    "no entry": (lambda: Group("", "", (("head", "head"),)), "('head', 'head') is no entry, such as Weight"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("case", WRITTEN)
def test_a_table_is_checked_where_it_is_written(case: str) -> None:
    make, reason = WRITTEN[case]
    with pytest.raises(errors.PluginError) as caught:
        make()
    assert reason in str(caught.value)


TABLES = {
    "a table that is made late": (lambda *_: [Weight("attn.q", 3)], "Weight: path must be a string, not 3"),  # type: ignore[arg-type]
    "unequal parts": (mapped_by(Fused((*QKV, "a", "b"), "attn.qkv")), "the 24 rows of 'attn.qkv' are not 5 equal"),
    "a short split": (
        mapped_by(Fused(QKV, "attn.qkv", lambda block, rows: equal_parts(2, rows))),
        "split of 'attn.qkv' returned [Span(start=0, size=12, count=1, step=None), Span(start=12, size=12, count=1, "
        "step=None)]; expected 3 spans, for attn.q, attn.k, attn.v",
    ),
    "no split": (mapped_by(Fused(QKV, "attn.qkv", lambda block, rows: None)), "returned None; expected 3 spans"),  # type: ignore[arg-type,return-value]
    "sizes": (mapped_by(Fused(QKV, "attn.qkv", lambda block, rows: [8, 8, 8])), "[8, 8, 8]; expected 3 spans"),  # type: ignore[arg-type,list-item]
    "rows that are not there": (
        mapped_by(FusedInput(("a", "b"), "down", lambda block, rows: [Span(0, 8), Span(8, 9)])),
        "gives b Span(start=8, size=9, count=1, step=None), but there are 16 rows",
    ),
    "heads": (
        mapped_by(Attention("attn.kv", "attn", lambda module: ("2", 4))),  # type: ignore[arg-type,return-value]
        "heads of 'attn.kv' returned ('2', 4) for ToyAttention at 'attn'; expected (kv_heads, head_dim)",
    ),
    "one number": (mapped_by(Attention("attn.kv", "attn", lambda module: 2)), "returned 2 for ToyAttention"),  # type: ignore[arg-type,return-value]
    "half heads": (mapped_by(Attention("attn.kv", "attn", lambda m: (2, 4.0))), "returned (2, 4.0)"),  # type: ignore[arg-type,return-value]
    "no attribute": (mapped_by(Attention("attn.kv", "attn", lambda m: m.num_heads)), "has no attribute 'num_heads'"),
    "one id for every block": (
        mapped_by(Weight("attn.o", "attn.proj"), site=""),
        "two points have the id 'attn.o@toy', at 'blocks.0.attn.proj' (weight) and at 'blocks.1.attn.proj' (weight)",
    ),
    "one id for two roles' layers": (
        mapped_by(Weight("mlp.up", "up"), Weight("mlp.up", "conv")),
        "two points have the id 'mlp.up@toy.0', at 'blocks.0.up' (weight) and at 'blocks.0.conv' (weight)",
    ),
}


@pytest.mark.parametrize("case", TABLES)
def test_a_table_is_compared_with_the_model(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    points, reason = TABLES[case]
    monkeypatch.setattr(Strange, "points", points)
    assert reason in refused(toys.ToyModel())


def test_a_group_of_its_own_is_the_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    first = Group("blocks.{layer}", "{layer}", (Weight("mlp.up", "up"),))
    second = Group("blocks.{layer}", "{layer}.conv", (Weight("mlp.up", "conv"),))
    monkeypatch.setattr(Strange, "points", lambda self, model, name: resolve(model, (first, second), name))
    model = toys.ToyModel()
    before = snapshot(model)
    adapters = ak.Adapters(model, backend="strange")
    adapters.add("a", ak.LoRA(rank=2, targets="mlp.up"))
    assert len(adapters.modules("a")) == 4
    model(toys.ids())
    adapters.detach()
    assert snapshot(model) == before
