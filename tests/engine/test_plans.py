"""The plan of a site under a selection: made once, right after every change, and kept for few selections only."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

import adapterkit as ak
from adapterkit.backend import SITE
from adapterkit.engine import site as sites
from adapterkit.engine.plan import Plan
from adapterkit.engine.site import Site
from adapterkit.testing import toys
from tests.values import randomize

X = toys.ids()


@pytest.fixture
def model() -> toys.ToyModel:
    toys.register()
    return toys.ToyModel().double().eval()


@pytest.fixture
def adapters(model: toys.ToyModel) -> ak.Adapters:
    adapters = ak.Adapters(model)
    configs = {"a": ak.LoRA(rank=2, targets="attn.q mlp.up"), "neck": ak.Bottleneck(targets="mlp"), "kv": ak.Prefix()}
    for i, (name, config) in enumerate(configs.items()):
        adapters.add(name, config)
        randomize(adapters, name, i)
    return adapters


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Site]:
    """The sites of the plans that are made."""
    made: list[Site] = []

    class Counted(Plan):
        def __init__(self, site: Site, selection: object) -> None:
            made.append(site)
            super().__init__(site, selection)  # type: ignore[arg-type]

    monkeypatch.setattr(sites, "Plan", Counted)
    return made


def sites_of(model: nn.Module) -> list[Site]:
    return [module.__dict__[SITE] for module in model.modules() if SITE in module.__dict__]


def test_a_site_plans_once_for_a_selection(model: toys.ToyModel, adapters: ak.Adapters, made: list[Site]) -> None:
    adapters.activate(["a", "neck", "kv"])
    y = model(X)
    assert len(made) == len({id(site) for site in made}) == len(sites_of(model))
    assert torch.equal(model(X), y)
    with adapters.activated("a"):
        model(X)
    count = len(made)
    assert count == 2 * len(sites_of(model))
    assert torch.equal(model(X), y)
    with adapters.disabled():
        model(X)
    assert len(made) == count


def test_a_weight_of_0_leaves_every_site_idle(model: toys.ToyModel, adapters: ak.Adapters, made: list[Site]) -> None:
    adapters.activate({"a": 0.0, "kv": 0})
    model(X)
    assert not made


def test_few_plans_are_kept_and_no_dead_selection_with_them(model: toys.ToyModel, adapters: ak.Adapters) -> None:
    dead: list[weakref.ref[object]] = []
    for weight in range(1, 20):
        with adapters.activated({"a": weight / 10}):
            model(X)
            dead.append(weakref.ref(adapters._state.switch.current))
    gc.collect()
    assert max(len(site.plans) for site in sites_of(model)) == 8
    assert sum(ref() is not None for ref in dead) <= 8
    assert dead[-1]() is not None


def test_threads_in_turn_find_their_plans(model: toys.ToyModel, adapters: ak.Adapters, made: list[Site]) -> None:
    switch = adapters._state.switch
    selections = [adapters._selection({"a": weight}) for weight in (0.25, 0.5, 1.0)]
    for selection in selections * 3:
        with switch.overridden(selection):
            model(X)
    assert len(made) == len(selections) * len(sites_of(model))


def test_plans_go_where_a_site_changes(model: toys.ToyModel, adapters: ak.Adapters) -> None:
    adapters.activate(["a", "neck"])
    y = model(X)
    switch = adapters._state.switch
    before = switch.default
    adapters.add("b", ak.LoRA(rank=1, targets="attn.q"))
    switch.default = before  # the very selection that was planned for
    changed = [site for site in sites_of(model) if not site.plans]
    assert len(changed) == len(adapters.modules("b"))
    assert torch.equal(model(X), y)
    adapters.remove("neck")
    switch.default = before
    with adapters.activated("a"):
        expected = model(X)
    assert torch.equal(model(X), expected)


def test_a_merge_and_its_end_are_followed(model: toys.ToyModel, adapters: ak.Adapters) -> None:
    adapters.activate("a")
    y = model(X)
    adapters.merge()
    assert torch.allclose(model(X), y, rtol=1e-10)
    adapters.unmerge()
    assert torch.equal(model(X), y)


def test_copies_have_plans_of_their_own(model: toys.ToyModel, adapters: ak.Adapters) -> None:
    adapters.activate(["a", "neck", "kv"])
    y = model(X)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.copy(sites_of(model)[0])):
        found = sites_of(twin) if isinstance(twin, nn.Module) else [twin]
        assert all(site.plans == {} for site in found)
        if isinstance(twin, nn.Module):
            other = ak.Adapters(twin)
            with torch.no_grad():
                for parameter in other.parameters("a"):
                    parameter.zero_()
            assert not torch.allclose(twin(X), y)
    assert torch.equal(model(X), y)


def test_what_acts_elsewhere_leaves_a_site_idle(model: toys.ToyModel, adapters: ak.Adapters) -> None:
    adapters.freeze()  # what trains may be computed again when something else acts there
    adapters.activate("a")
    model(X)
    idle = [site for site in sites_of(model) if site.plan is not None and site.plan.call is None]
    assert 0 < len(idle) < len(sites_of(model))
    assert all((plan.call is None) == (not plan.active) for site in sites_of(model) for plan in site.plans.values())


def test_a_replaced_parameter_is_used(model: toys.ToyModel, adapters: ak.Adapters) -> None:
    """A plan holds no tensor."""
    adapters.activate("a")
    model(X)
    module = adapters.modules("a")["attn.q@toy.0"]
    module.B = nn.Parameter(torch.zeros_like(module.B))  # type: ignore[arg-type]
    for key, other in adapters.modules("a").items():
        if key != "attn.q@toy.0":
            nn.init.zeros_(other.B)  # type: ignore[arg-type]
    with adapters.disabled():
        base = model(X)
    assert torch.equal(model(X), base)
