"""Adapters on vision transformers compute what their equations say, and go without a trace."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ViTForImageClassification, ViTModel

import adapterkit as ak
from adapterkit.adapter import Base
from adapterkit.points import InjectionPoint, Kind
from tests.backends import vision_checks as checks
from tests.backends import vision_models as models
from tests.backends.vit_variants import TIMM, WITHOUT_OUTPUTS, WITHOUT_PREFIX, classify, vit

LORA = ak.LoRA(rank=2, targets="*")
BOTTLENECK = ak.Bottleneck(width=3, targets="all", activation="gelu")
PREFIX = ak.Prefix(length=3, init_std=1.0)


def configs(name: str) -> list[ak.AdapterConfig]:
    found: list[ak.AdapterConfig] = [LORA]
    found += [] if name in WITHOUT_OUTPUTS else [BOTTLENECK]
    return found + ([] if name in WITHOUT_PREFIX else [PREFIX])


@pytest.mark.parametrize(
    ("name", "config"),
    [(name, config) for name in TIMM for config in configs(name)],
    ids=lambda v: v if isinstance(v, str) else type(v).__name__,
)
def test_timm_adapter_comes_acts_and_goes(name: str, config: ak.AdapterConfig) -> None:
    checks.check_adapter(models.timm_vit(**TIMM[name]), classify, config)


@pytest.mark.parametrize("config", [LORA, BOTTLENECK, PREFIX], ids=lambda c: type(c).__name__)
@pytest.mark.parametrize("cls", [ViTForImageClassification, ViTModel])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_vit_adapter_comes_acts_and_goes(cls: type, config: ak.AdapterConfig, implementation: str) -> None:
    model = vit(cls, attn_implementation=implementation)
    # The pooler is no part of the first output.
    checks.check_adapter(model, classify, config, silent=("head_pooler.a.A", "head_pooler.a.B"))


@pytest.mark.parametrize("name", TIMM)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["64", "32"])
def test_timm_merged_equals_unmerged(name: str, dtype: torch.dtype, tolerance: float) -> None:
    checks.check_merge(models.timm_vit(**TIMM[name]).to(dtype), classify, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["64", "32"])
def test_vit_merged_equals_unmerged(dtype: torch.dtype, tolerance: float) -> None:
    checks.check_merge(vit().to(dtype), classify, tolerance)


def test_lora_on_q_and_v_is_a_sum_on_their_rows() -> None:
    model = models.timm_vit().double()
    adapters = ak.Adapters(model)
    adapters.add("a", ak.LoRA(rank=2, alpha=5.0, targets="attn.{q,v}"))
    checks.randomise(adapters)
    qkv, modules, d = model.blocks[1].attn.qkv, adapters.modules("a"), models.WIDTH
    x = torch.randn(2, 5, d, dtype=torch.float64)
    expected = F.linear(x, qkv.weight, qkv.bias)
    for start, role in ((0, "attn.q"), (2 * d, "attn.v")):
        factors = modules[f"{role}@vision.1"]
        expected[..., start : start + d] += x @ factors.A.T @ factors.B.T * 2.5
    assert torch.allclose(qkv(x), expected, rtol=0, atol=1e-12)
    assert torch.equal(qkv(x)[..., d : 2 * d], F.linear(x, qkv.weight, qkv.bias)[..., d : 2 * d])


def bottleneck(module: Any, h: Tensor) -> Tensor:
    return module.up(F.relu(module.down(h)))


@pytest.mark.parametrize("form", ["pfeiffer", "houlsby", "parallel", "parallel_norm"])
def test_bottleneck_stands_between_the_sublayer_and_the_sum(form: str) -> None:
    """With layer scale: what is adapted is the scaled output, the last thing before the residual sum."""
    model: Any = checks.with_unlike_norms(models.timm_vit(init_values=0.5).double())
    adapters = ak.Adapters(model)
    adapters.add("a", ak.Bottleneck(width=3, targets="attn mlp", form=form))
    checks.randomise(adapters)
    modules, block = adapters.modules("a"), model.blocks[0]
    x = torch.randn(2, 5, models.WIDTH, dtype=torch.float64)
    with adapters.disabled():
        y = x
        for role, norm, sublayer, scale in (
            ("attn", block.norm1, block.attn, block.ls1),
            ("mlp", block.norm2, block.mlp, block.ls2),
        ):
            s = scale(sublayer(norm(y)))
            source = {"pfeiffer": s + y, "houlsby": s, "parallel": y, "parallel_norm": norm(y)}[form]
            y = y + s + bottleneck(modules[f"{role}@vision.0"], source)
    assert torch.allclose(block(x), y, rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", ["pfeiffer", "parallel_norm"])
def test_bottleneck_of_vit_stands_between_the_sublayer_and_the_sum(form: str) -> None:
    model: Any = checks.with_unlike_norms(vit().double())
    adapters = ak.Adapters(model)
    adapters.add("a", ak.Bottleneck(width=3, targets="attn mlp", form=form))
    checks.randomise(adapters)
    modules, block = adapters.modules("a"), model.vit.layers[0]
    x = torch.randn(2, 5, models.WIDTH, dtype=torch.float64)
    with adapters.disabled():
        s = block.attention(block.layernorm_before(x))[0]
        source = s + x if form == "pfeiffer" else block.layernorm_before(x)
        y = x + s + bottleneck(modules["attn@vision.0"], source)
        s = block.mlp(block.layernorm_after(y))
        source = s + y if form == "pfeiffer" else block.layernorm_after(y)
        y = y + s + bottleneck(modules["mlp@vision.0"], source)
    assert torch.allclose(block(x), y, rtol=0, atol=1e-12)


@dataclass(frozen=True)
class Register(ak.AdapterConfig):
    """Learnt tokens behind the embedded sequence: what the `tokens` kind is for."""

    kinds: ClassVar[frozenset[Kind]] = frozenset({"tokens"})
    targets: str = "tokens"
    count: int = 2

    def build(self, point: InjectionPoint) -> RegisterModule:
        return RegisterModule(self.count, point.out_features)


class RegisterModule(ak.AdapterModule):
    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.randn(count, width))

    def forward(self, x: Tensor, base: Base) -> Tensor:
        y = base(x)
        return torch.cat([y, self.rows.expand(y.shape[0], -1, -1)], dim=1)


@pytest.mark.parametrize("make", [models.timm_vit, partial(models.timm_vit, pos_embed="none", pre_norm=True), vit])
def test_the_embedded_sequence_can_be_extended(make: Any) -> None:
    model = make()
    core = model.vit if hasattr(model, "vit") else model
    adapters = ak.Adapters(model)
    adapters.add("a", Register())
    extended = classify(model)
    [module] = adapters.modules("a").values()
    lengths: list[int] = []
    first = (core.layers if hasattr(core, "layers") else core.blocks)[0]

    def by_hand(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *rest = args
        lengths.append(x.shape[1])
        return (torch.cat([x, module.rows.expand(x.shape[0], -1, -1)], dim=1), *rest)

    hook = first.register_forward_pre_hook(by_hand)
    with adapters.disabled():
        assert torch.allclose(classify(model), extended, atol=1e-6)
    hook.remove()
    assert lengths == [(models.IMAGE // models.PATCH) ** 2 + 1]


@pytest.mark.parametrize("config", [LORA, BOTTLENECK, PREFIX], ids=lambda c: type(c).__name__)
def test_gradient_checkpointing_changes_no_gradient(config: ak.AdapterConfig) -> None:
    checks.check_checkpointing(models.timm_vit(), classify, lambda m: m.set_grad_checkpointing(True), config)
    checks.check_checkpointing(vit(), classify, lambda m: m.activation_checkpointing_enable(), config)


@pytest.mark.parametrize("make", [models.timm_vit, vit])
def test_copies_and_pickles_act_alike(make: Any) -> None:
    model = make()
    adapters = ak.Adapters(model)
    for name, config in (("a", LORA), ("b", BOTTLENECK), ("c", PREFIX)):
        adapters.add(name, config)
        checks.randomise(adapters, name)
    adapters.activate(["a", "b", "c"])
    expected = classify(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(classify(twin), expected)
        ak.Adapters(twin).detach()
    assert torch.equal(classify(model), expected)


def test_prefix_of_vit_is_softmax_over_more_keys() -> None:
    model = vit(num_attention_heads=2).double()
    adapters = ak.Adapters(model)
    adapters.add("a", PREFIX)
    checks.randomise(adapters, scale=1.0)
    module = model.vit.layers[0].attention
    prefix = adapters.modules("a")["attn.kv@vision.0"]
    x = torch.randn(2, 5, models.WIDTH, dtype=torch.float64)
    query, key, value = (
        layer(x).unflatten(-1, (2, 4)).transpose(1, 2) for layer in (module.q_proj, module.k_proj, module.v_proj)
    )
    mixed = checks.soft(query, *checks.prefixed(prefix, key, value), 0.5)
    assert torch.allclose(module(x)[0], module.o_proj(mixed.transpose(1, 2).flatten(2)), rtol=0, atol=1e-12)


def test_adapters_move_between_the_layouts_of_transformers() -> None:
    new = vit()
    old = models.OldViT(copy.deepcopy(new))
    config = ak.Bottleneck(width=3, targets="attn mlp")
    outputs = []
    for model in (new, old):
        adapters = ak.Adapters(model, backend="vit")
        adapters.add("a", config)
        randomised_by_id(adapters)
        outputs.append(classify(model))
    assert torch.allclose(*outputs, atol=1e-6)


def randomised_by_id(adapters: ak.Adapters) -> None:
    with torch.no_grad():
        for index, (_, tensor) in enumerate(sorted(adapters.state_dict("a").items())):
            tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(index)))
