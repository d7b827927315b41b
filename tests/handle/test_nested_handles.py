"""Handles that meet in modules: on a model and a part of it, and on pipelines that share a part."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adapterkit as ak
from adapterkit import errors
from adapterkit.testing import toys
from tests.handle.test_handle import assert_same, snapshot
from tests.values import randomize


@pytest.fixture(autouse=True)
def _toys() -> None:
    toys.register()


class Pipeline(SimpleNamespace):
    @property
    def components(self) -> dict[str, Any]:
        return dict(vars(self))


class ValueHead(nn.Module):
    """As libraries of reinforcement learning put one on a model."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.value = inner, nn.Linear(toys.VOCABULARY, 1).double()

    def forward(self, ids: Tensor) -> Tensor:
        return self.value(self.inner(ids))


def toy() -> toys.ToyModel:
    return toys.ToyModel(layers=1).double().eval()


def sharing(part: nn.Module) -> tuple[ak.Adapters, ak.Adapters]:
    """Two handles that have this part in common, and nothing else."""
    first, second = (ak.Adapters(Pipeline(unet=toys.ToyModel(layers=1).double(), text=part)) for _ in range(2))
    return first, second


PAIRS: dict[str, tuple[ak.AdapterConfig, ak.AdapterConfig]] = {
    "weights": (ak.LoRA(rank=2, targets="mlp.*"), ak.LoRA(rank=3, targets="mlp.up")),
    "spans": (ak.LoRA(rank=2, targets="attn.{q,k,v}"), ak.LoRA(rank=2, targets="attn.{q,v}")),
    "outputs": (ak.Bottleneck(targets="attn mlp", reduction=2), ak.Bottleneck(targets="mlp", reduction=4)),
    "attention": (ak.Prefix(length=2), ak.Prefix(length=3)),
    "attention and outputs": (ak.Prefix(length=2), ak.Bottleneck(targets="attn", reduction=2)),
    "outputs and attention": (ak.Bottleneck(targets="attn", reduction=2), ak.Prefix(length=2)),
    "embeddings": (ak.LoRA(rank=2, targets="embed.tokens"), ak.LoRA(rank=2, targets="head embed.tokens")),
}


def narrowed(config: ak.AdapterConfig) -> ak.AdapterConfig:
    """The same at the shared part alone."""
    return dataclasses.replace(config, targets=" ".join(f"{role}@component=text" for role in config.targets.split()))


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
@pytest.mark.parametrize("first_goes", [True, False], ids=["first goes", "second goes"])
@torch.no_grad()
def test_adapters_of_two_handles_add_up_and_leave_one_by_one(
    pair: tuple[ak.AdapterConfig, ak.AdapterConfig], first_goes: bool
) -> None:
    part, ids = toy(), toys.ids()
    before, base = snapshot(part), part(ids)
    handles = sharing(part)
    twin = toy()
    single = ak.Adapters(Pipeline(unet=twin, text=(one := toy())))
    for seed, (name, handle, config) in enumerate(zip("ab", handles, map(narrowed, pair), strict=True)):
        handle.add("a", config, seed=seed)  # one name in both
        single.add(name, config, seed=seed)
        for ours, theirs in zip(handle.parameters("a"), single.parameters(name), strict=True):
            ours.normal_(generator=torch.Generator().manual_seed(seed), std=0.3)
            theirs.copy_(ours)
    outputs = all(isinstance(config, ak.Bottleneck) for config in pair)  # the later is around the earlier
    single.activate(ak.Stack("a", "b") if outputs else ["a", "b"])
    torch.testing.assert_close(part(ids), one(ids), rtol=1e-10, atol=1e-10)
    single.activate("b")
    with handles[0].disabled():
        torch.testing.assert_close(part(ids), one(ids), rtol=1e-10, atol=1e-10)
    single.activate("a")
    handles[1].activate(None)
    torch.testing.assert_close(part(ids), one(ids), rtol=1e-10, atol=1e-10)
    handles[1].activate("a")
    gone, left = handles if first_goes else handles[::-1]
    gone.detach()
    single.activate("b" if first_goes else "a")
    torch.testing.assert_close(part(ids), one(ids), rtol=1e-10, atol=1e-10)
    assert list(left) == ["a"]
    left.detach()
    assert torch.equal(part(ids), base)
    assert_same(before, snapshot(part))


@pytest.mark.parametrize("outer_first", [True, False], ids=["outer first", "inner first"])
def test_a_model_and_the_model_in_it(outer_first: bool) -> None:
    inner = toy()
    outer, ids = ValueHead(inner), toys.ids()
    base, logits = outer(ids), inner(ids)
    models = [outer, inner] if outer_first else [inner, outer]
    handles = [ak.Adapters(model) for model in models]
    for handle in handles:
        handle.add("a", ak.LoRA(rank=2, targets="path:*attn.proj"))
        randomize(handle, "a")
    assert all(parameter.requires_grad for handle in handles for parameter in handle.parameters())
    outer(ids).sum().backward()
    assert all(p.grad is not None for handle in handles for p in handle.parameters())
    assert [handle.report().beside for handle in handles] == [1, 1]
    assert "beside adapters of other handles, in 1 modules" in str(handles[0].report())
    both = inner(ids)
    with handles[0].disabled():
        alone = inner(ids)
    assert not torch.equal(both, alone)
    assert not torch.equal(alone, logits)
    handles[0].remove("a")
    assert torch.equal(inner(ids), alone)
    handles[1].detach()
    assert torch.equal(inner(ids), logits)
    assert torch.equal(outer(ids), base)
    assert all(parameter.requires_grad for parameter in outer.parameters())


class Reading(nn.Module):
    """Reads the weight of its layer, a whole one for one handle and rows of it for another."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 6).double()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.layer.weight, self.layer.bias)


@torch.no_grad()
def test_a_weight_that_is_read_has_the_adapters_of_both() -> None:
    model, x = Reading(), torch.randn(3, 4).double()
    outer = nn.Sequential(model)
    handles = [ak.Adapters(model), ak.Adapters(outer)]
    delta = torch.zeros(6, 4).double()
    for handle in handles:
        handle.add("a", ak.LoRA(rank=2, targets="path:*layer"))
        randomize(handle, "a")
        module: Any = next(iter(handle.modules("a").values()))
        delta += module.B @ module.A
    expected = F.linear(x, model.layer.weight.detach() + delta, model.layer.bias)
    torch.testing.assert_close(outer(x), expected, rtol=1e-10, atol=1e-10)


def test_rows_of_one_handle_have_the_adapter_of_the_other_all() -> None:
    part, ids = toy(), toys.ids()
    first, second = sharing(part)
    for handle in (first, second):
        handle.add("a", narrowed(ak.LoRA(rank=2, targets="attn.* mlp.*")))
        randomize(handle, "a")
    with second.disabled():
        plain = part(ids)
    both = part(ids)
    for handle, other in ((second, plain), (first, None)):
        with handle.routed(["a", None]):
            rows = part(ids[:2])
        with handle.disabled():
            without = part(ids)
        torch.testing.assert_close(rows[0], both[0], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(rows[1], without[1], rtol=1e-10, atol=1e-10)
        assert other is None or torch.equal(without, other)


def test_what_cannot_be_shared_is_told() -> None:
    part = toy()
    first, second = sharing(part)
    first.add("a", narrowed(ak.LoRA(rank=2, targets="attn.*")))
    first.merge()
    with pytest.raises(errors.AttachError, match=r"adapters of another handle.* merged; unmerge\(\)"):
        second.add("b", narrowed(ak.LoRA(rank=2, targets="attn.o")))
    first.unmerge()
    second.add("b", narrowed(ak.LoRA(rank=2, targets="attn.o")))
    for handle in (first, second):
        with pytest.raises(errors.NotMergeableError, match="has adapters of another handle too"):
            handle.merge()
    first.detach()
    y = part(toys.ids())
    with second.merged():
        torch.testing.assert_close(part(toys.ids()), y, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_the_adapters_of_both(copied: Any) -> None:
    part, ids = toy(), toys.ids()
    outer = ValueHead(part)
    for model in (outer, part):
        handle = ak.Adapters(model)
        handle.add("a", ak.LoRA(rank=2, targets="path:*attn.proj"))
        randomize(handle, "a")
    twin = copied(outer)
    assert torch.equal(twin(ids), outer(ids))
    ak.Adapters(twin).detach()
    ak.Adapters(twin.inner).detach()
    assert torch.equal(twin.inner(ids), toy()(ids))
    assert not any("adapterkit" in key for key in twin.state_dict())


def test_both_follow_a_head_that_has_grown() -> None:
    part, ids = toy(), toys.ids()
    part.head.weight = nn.Parameter(torch.randn_like(part.head.weight))
    handles = sharing(part)
    for handle in handles:
        handle.add("a", narrowed(ak.LoRA(rank=2, targets="head")))
        randomize(handle, "a")
    y = part(ids)
    head = nn.Linear(toys.WIDTH, toys.VOCABULARY + 2, bias=False).double()
    head.weight.data[: toys.VOCABULARY] = part.head.weight.data
    part.head = head
    torch.testing.assert_close(part(ids)[..., : toys.VOCABULARY], y, rtol=1e-10, atol=1e-10)
    for handle in handles:
        handle.report()
        handle.detach()
    assert type(part.head) is nn.Linear
    assert not any("adapterkit" in key for key in part.state_dict())


def test_a_part_that_is_exchanged_is_followed_where_nothing_acts_in_it() -> None:
    pipe = Pipeline(unet=toy(), text=toy())
    adapters = ak.Adapters(pipe)
    adapters.add("text", ak.LoRA(rank=2, targets="mlp.*@component=text"))
    pipe.unet = other = toy()
    adapters.add("both", ak.LoRA(rank=2, targets="attn.q"))
    randomize(adapters, "both", 1)
    y, before = other(toys.ids()), toys.ToyModel(layers=1).double()
    before.load_state_dict({key: value for key, value in other.state_dict().items() if "adapterkit" not in key})
    assert not torch.allclose(y, before.eval()(toys.ids()))
    pipe.unet = toy()
    with pytest.raises(errors.ReplacedError, match="unet"):
        adapters.activate("both")
    adapters.remove("both")
    adapters.activate("text")
