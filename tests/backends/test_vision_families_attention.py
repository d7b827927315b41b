"""The seam of timm's other attentions: a prefix is softmax over more keys, whatever made the keys."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.models.eva import EvaAttention
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.backends.called_attention import CalledAttentionSeam, attend
from adapterkit.errors import AdapterKitError, IncompatibleTargetError
from tests.backends import vision_checks as checks
from tests.backends import vision_families as families

PREFIX = ak.Prefix(length=3, init_std=1.0)
LAST = ("norm", "proj", "o_proj", "out_proj")  # what takes the mixed values first
NAMES = [f"timm {name}" for name in families.TIMM if f"timm {name}" not in families.WITHOUT_PREFIX]


def attentions(model: nn.Module) -> dict[str, Any]:
    """The attention modules, by the id of their point."""
    return {p.id: model.get_submodule(p.path) for p in ak.points(model, "attn.kv")}


def switch(model: nn.Module, fused: bool) -> nn.Module:
    for module in attentions(model).values():
        module.fused_attn = fused
    return model


class Calls:
    """What scaled_dot_product_attention is called with, and what goes into each output projection."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, model: nn.Module) -> None:
        self.given: list[tuple[Tensor, Tensor, Tensor, Tensor | None]] = []
        self.mixed: list[Tensor] = []
        original = F.scaled_dot_product_attention

        def recorded(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
            self.given.append((q, k, v, attn_mask))
            return original(q, k, v, attn_mask=attn_mask, **options)

        monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
        for module in attentions(model).values():
            last = next(child for name, child in module.named_children() if name in LAST)
            last.register_forward_pre_hook(lambda _, args: self.mixed.append(args[0]))


def extended(given: tuple[Tensor, Tensor, Tensor, Tensor | None], prefix: Any, weight: float, scale: float) -> Tensor:
    """Softmax over [prefix; tokens] by its definition, where the weight multiplies the prefix's mass."""
    query, key, value, mask = given
    windowed = query.dim() == 5
    front = [p[:, None] if windowed else p for p in (prefix.keys, prefix.values)]
    keys, values = (
        torch.cat([p.expand(*t.shape[:-2], -1, -1), t], -2) for p, t in zip(front, (key, value), strict=True)
    )
    logits = torch.zeros(keys.shape[-2], dtype=torch.float64)
    logits[: prefix.keys.shape[1]] = math.log(weight)
    mixed = checks.soft(query, keys, values, scale, logits if mask is None else logits + F.pad(mask, (3, 0)))
    return mixed.transpose(1, 3 if windowed else 2)


BLOCKS = [(name, 0) for name in NAMES] + [("timm swin", 1), *(("timm hiera", index) for index in (1, 2, 3))]


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize(("name", "index"), BLOCKS)
def test_a_prefix_is_softmax_over_more_keys(
    name: str, index: int, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one block, so that its queries, keys and values are the base's."""
    model = switch(families.build(name, torch.float64), fused=True)
    key, module = list(attentions(model).items())[index]
    with monkeypatch.context() as patch:
        base = Calls(patch, model)
        families.see(model)
    switch(model, fused)
    adapters = ak.Adapters(model)
    adapters.add("a", ak.Prefix(length=3, init_std=1.0, targets=f"path:{ak.points(model, 'attn.kv')[index].path}"))
    checks.randomise(adapters, scale=1.0)
    adapters.activate({"a": 0.4})
    base.mixed.clear()
    families.see(model)
    expected = extended(base.given[index], adapters.modules("a")[key], 0.4, module.scale)
    torch.testing.assert_close(base.mixed[index], expected.reshape(base.mixed[index].shape), rtol=0, atol=1e-12)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(("name", "index"), [(name, 0) for name in families.TRANSFORMERS] + [("swin", 1)])
def test_a_prefix_of_transformers_is_softmax_over_more_keys(
    name: str, index: int, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rotary embeddings, position biases and the masks of shifted windows are as without it."""
    model = families.build(name, torch.float64)
    path = ak.points(model, "attn.kv")[index].path
    key, module = list(attentions(model).items())[index]
    with monkeypatch.context() as patch:
        base = Calls(patch, model)
        families.see(model)
    model.set_attn_implementation(implementation)
    adapters = ak.Adapters(model)
    adapters.add("a", ak.Prefix(length=3, init_std=1.0, targets=f"path:{path}"))
    checks.randomise(adapters, scale=1.0)
    adapters.activate({"a": 0.4})
    base.mixed.clear()
    families.see(model)
    scale = module.scaling if hasattr(module, "scaling") else module.scale
    expected = extended(base.given[index], adapters.modules("a")[key], 0.4, scale)
    bound = 1e-12 if implementation == "sdpa" else 1e-6  # eager attention takes the softmax in single precision
    torch.testing.assert_close(base.mixed[index], expected.reshape(base.mixed[index].shape), rtol=0, atol=bound)


def test_the_blocks_above_have_shifted_windows_and_pooled_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    swin, hiera = families.build("timm swin"), families.build("timm hiera")
    assert swin.layers[0].blocks[1].attn_mask is not None
    calls = Calls(monkeypatch, hiera)
    families.see(hiera)
    shapes = [(q.dim(), q.shape[-2] < k.shape[-2]) for q, k, _, _ in calls.given]
    assert shapes == [(5, False), (5, True), (4, False), (4, True)]


@pytest.mark.parametrize("name", NAMES)
def test_without_a_prefix_nothing_changes(name: str) -> None:
    model = families.build(name)
    before = families.see(model)
    adapters = ak.Adapters(model)
    adapters.add("a", PREFIX)
    with torch.no_grad():
        assert not torch.equal(families.see(model), before)
        adapters.activate(())
        assert torch.equal(families.see(model), before)
    module: Any = next(iter(attentions(families.build(name)).values()))
    assert CalledAttentionSeam().refusal(module) is None


def test_without_an_extension_attend_is_the_modules_forward() -> None:
    module = EvaAttention(8, num_heads=2, norm_layer=nn.LayerNorm)
    x = torch.randn(2, 5, 8)
    assert torch.equal(attend(module, x), module(x))


class Silent(EvaAttention):
    """Looks as if it called, and does not."""

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        return self.proj(x) if x.numel() else F.scaled_dot_product_attention(x, x, x)


class Unmixed(EvaAttention):
    """Does not even look as if."""

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        return self.proj(x)


def test_what_cannot_make_the_call_is_refused_and_the_model_stays() -> None:
    model = families.build("timm eva")
    model.blocks[0].attn = Unmixed(8, num_heads=2, norm_layer=nn.LayerNorm)
    before, base = checks.snapshot(model), families.see(model)
    with pytest.raises(AdapterKitError, match="Unmixed"):
        ak.Adapters(model).add("a", PREFIX)
    checks.assert_restored(model, before)
    assert torch.equal(families.see(model), base)


def test_an_attention_that_makes_no_such_call_is_an_error() -> None:
    model = families.build("timm eva")
    model.blocks[0].attn = Silent(8, num_heads=2, norm_layer=nn.LayerNorm)
    ak.Adapters(model).add("a", PREFIX)
    with pytest.raises(IncompatibleTargetError, match="Silent did not call"):
        families.see(model)


@pytest.mark.parametrize("name", ["timm eva", "timm swin", "timm hiera"])
def test_copies_and_pickles_act_alike(name: str) -> None:
    model = families.build(name)
    adapters = ak.Adapters(model)
    adapters.add("a", PREFIX)
    checks.randomise(adapters)
    expected = families.see(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(families.see(twin), expected)


@pytest.mark.parametrize("name", ["timm eva", "timm beit", "timm hiera"])
def test_gradient_checkpointing_changes_no_gradient(name: str) -> None:
    def switch_on(model: Any) -> None:
        model.set_grad_checkpointing(True)

    checks.check_checkpointing(families.build(name), families.see, switch_on, PREFIX)


@pytest.mark.parametrize("name", ["timm swin", "timm hiera"])
def test_a_prefix_compiles_without_a_break(name: str) -> None:
    model = families.build(name)
    adapters = ak.Adapters(model)
    adapters.add("a", PREFIX)
    checks.randomise(adapters)
    x = torch.randn(2, 3, 32, 32) if name == "timm hiera" else torch.randn(2, 3, 16, 16)
    torch.compiler.reset()
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=1e-6)


def test_dropout_of_attention_is_kept() -> None:
    """In training, the call gets the module's own dropout: two runs with one seed agree, with two they do not."""
    model = families.build("timm swin").train()
    for module in attentions(model).values():
        module.attn_drop.p = 0.5
    adapters = ak.Adapters(model)
    adapters.add("a", PREFIX)
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(families.see(model))
    assert torch.equal(runs[0], runs[1])
    assert not torch.allclose(runs[0], runs[2])
