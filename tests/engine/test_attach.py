"""What a module is while adapters are on it."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import adapterkit as ak
from adapterkit import errors
from adapterkit.engine import attach
from adapterkit.engine.first_call import place
from adapterkit.testing import families, models


def test_an_adapted_container_has_its_own_children_alone() -> None:
    families.register()
    model = models.ToyVision().double().eval().requires_grad_(False)  # torch rounds another way where a weight trains
    before = [list(block.mlp) for block in model.blocks]  # type: ignore[arg-type,union-attr]
    x = torch.randn(2, 3, models.IMAGE, models.IMAGE, dtype=torch.float64)
    expected = model(x)
    adapters = ak.Adapters(model)
    adapters.add("a", ak.Bottleneck(width=2, targets="mlp"))
    for block, children in zip(model.blocks, before, strict=True):
        assert list(block.mlp) == children  # type: ignore[arg-type]
        assert len(block.mlp) == len(children)  # type: ignore[arg-type]
    with adapters.disabled():
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("make", [torch.jit.script, lambda module: torch.jit.trace(module, torch.zeros(1, 2))])
def test_what_is_scripted_or_traced_is_refused(make: object) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # both are deprecated
        made = make(nn.Linear(2, 2))  # type: ignore[operator]
    root = nn.Sequential(made)
    assert attach.refusal(root, "0", made) == "it is scripted or traced; attach adapters before that"
    assert attach.refusal(nn.Sequential(nn.Linear(2, 2)), "0", nn.Linear(2, 2)) is None


def test_what_is_put_into_a_model_is_in_its_modes() -> None:
    families.register()
    model = models.ToyVision().eval()
    model.blocks[0].train()  # type: ignore[index,operator]
    before = {name: module.training for name, module in model.named_modules()}
    ak.Adapters(model).add("a", ak.LoRA(rank=2, dropout=0.5))
    added = {name: one.training for name, one in model.named_modules() if name not in before}
    assert {*added.values()} == {True, False}
    assert all(mode == before[name.partition(f".{attach.CHILD}")[0]] for name, mode in added.items())


def test_a_child_of_the_adapters_name_is_told() -> None:
    layer = nn.Linear(2, 2)
    root = nn.Sequential(layer)
    layer.add_module(attach.CHILD, nn.Identity())
    assert attach.refusal(root, "0", layer) == f"it already has a child called {attach.CHILD!r}"
    before = dict(root.named_modules())
    with pytest.raises(errors.AttachError, match=f"0.*already has a child called '{attach.CHILD}'"):
        ak.Adapters(root).add("a", ak.LoRA(rank=1, targets="all"))
    assert dict(root.named_modules()) == before
    assert type(layer) is nn.Linear


def test_weights_that_are_spread_already_are_told() -> None:
    layer = nn.Linear(2, 2)
    layer.weight.device_mesh = None  # type: ignore[attr-defined] # what a DTensor has
    told = attach.refusal(nn.Sequential(layer), "0", layer)
    assert told == "its weights are sharded; add adapters before fully_shard, which then shards them too"


def test_adapters_go_where_hooks_have_their_module_compute() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    model = nn.Sequential(nn.Linear(2, 2))
    adapters = ak.Adapters(model)
    adapters.add("a", ak.LoRA(rank=1, targets="all"))
    site = attach.site_of(model[0])
    assert site is not None
    place(site, model[0])
    assert {parameter.device.type for parameter in adapters.parameters("a")} == {"cpu"}
    hooks.add_hook_to_module(model[0], hooks.AlignDevicesHook(execution_device="meta"))
    place(site, model[0])
    assert {parameter.device.type for parameter in adapters.parameters("a")} == {"meta"}
