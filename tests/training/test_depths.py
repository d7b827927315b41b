"""Rates that fall from the head to the embedding, against timm's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.optim._param_groups import param_groups_layer_decay

import adapterkit as ak
from adapterkit.points import ParameterPoint
from adapterkit.training.depths import Depths
from adapterkit.training.learner import Learner
from adapterkit.training.loop import train
from tests.training.toy_task import toy_run


def test_factors_are_timms():
    with torch.device("meta"):
        model = timm.create_model("vit_tiny_patch16_224", depth=4)
    points = ak.points(model)
    groups: Any = param_groups_layer_decay(model, layer_decay=0.7)
    scales = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    depths, seen = Depths(points, 0.7), set()
    for point in points:
        if isinstance(point, ParameterPoint):
            seen.add(depths.factor(point))
            weight = model.get_submodule(point.path).get_parameter(point.layout.parameter)
            assert depths.factor(point) == pytest.approx(scales[id(weight)])
    assert len(seen) == 6
    assert depths.factor(None) == 1


def test_what_is_between_the_stages_is_as_deep_as_the_stage():
    with torch.device("meta"):
        model = timm.create_model("swin_tiny_patch4_window7_224")
    points = ak.points(model)
    depths = Depths(points, 0.5)
    found = {(p.role, p.tags.get("stage"), p.tags.get("layer")): depths.factor(p) for p in points}
    assert found["embed.patch", None, None] == 0.5**13
    assert found["attn.q", 0, 0] == 0.5**12
    assert found["attn.q", 3, 1] == 0.5
    assert found["down.proj", 1, None] == found["attn.q", 1, 0] == 0.5**10
    assert found["head", None, None] == 1


def test_a_runs_rates_fall(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    learners: list[Learner] = []
    original = Learner._build_optimizer
    monkeypatch.setattr(Learner, "_build_optimizer", lambda self: (learners.append(self), original(self))[1])
    rates = [{"select": "@layer=0", "learning_rate": 0.08}]
    adapter = {"type": "lora", "rank": 2, "targets": "attn.q"}
    run = toy_run(tmp_path / "run", adapter=adapter, rates=rates, layer_decay=0.5, learning_rate=0.01, steps=1)
    train(run, silent=True)
    trained = learners[0].trained
    assert trained.rates == [0.08 / 4, 0.01 / 2]
    assert [name.partition("/")[0] for name in [*trained.named][::2]] == ["attn.q@toy.0", "attn.q@toy.1"]
