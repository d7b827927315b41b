"""Prefix against the attention equation, without a model around it."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapterkit.adapters.prefix import Prefix, PrefixModule
from adapterkit.errors import ConfigError
from adapterkit.points import AttentionLayout, AttentionPoint, WeightLayout, WeightPoint

KV_HEADS, HEADS, WIDTH = 2, 4, 8
POINT = AttentionPoint("attn.kv", "attn", "0", 16, 16, AttentionLayout(KV_HEADS, WIDTH))


def built(config: Prefix, randomise: bool = False) -> Any:
    torch.manual_seed(0)
    module = config.build(POINT).double()
    if randomise:
        for parameter in module.parameters():
            nn.init.normal_(parameter)
    return module


def heads(length: int, count: int = KV_HEADS) -> Tensor:
    return torch.randn(3, count, length, WIDTH, dtype=torch.float64)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


CONFIGS = [
    Prefix(length=5),
    Prefix(length=5, reparam=3),
    Prefix(length=1, init_std=2.0),
    Prefix(length=7, reparam=9, init_std=3.0),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_initial_output_is_the_base_times_the_mass_left_to_it(config: Prefix) -> None:
    """At initialisation out = (1 - p) * base, where p is the softmax mass of the prefix's keys."""
    module = built(config)
    q, k, v = heads(4, HEADS), heads(6), heads(6)
    keys, values = module.extend(k, v)
    logits = q @ keys.repeat_interleave(HEADS // KV_HEADS, dim=1).mT / math.sqrt(WIDTH)
    mass = logits.softmax(-1)[..., : config.length].sum(-1, keepdim=True)
    assert mass.max() > 0.1
    assert torch.allclose(attention(q, keys, values), (1 - mass) * attention(q, k, v), atol=1e-12)


@pytest.mark.parametrize("config", CONFIGS)
def test_keys_differ_and_values_are_zero_at_initialisation(config: Prefix) -> None:
    keys, values = built(config).prefix()
    assert torch.equal(values, torch.zeros_like(values))
    assert keys.shape == values.shape == (KV_HEADS, config.length, WIDTH)
    assert len({tuple(row) for row in keys.transpose(0, 1).flatten(1).tolist()}) == config.length


def test_standard_deviation_of_the_initial_keys() -> None:
    keys, _ = built(Prefix(length=4096, init_std=0.3)).prefix()
    assert keys.std().item() == pytest.approx(0.3, rel=0.02)


def test_the_prefix_is_in_front_and_the_rest_untouched() -> None:
    module = built(Prefix(length=5), randomise=True)
    k, v = heads(6), heads(6)
    keys, values = module.extend(k, v)
    for made, front, rest in ((keys, module.keys, k), (values, module.values, v)):
        assert torch.equal(made[:, :, 5:], rest)
        assert torch.equal(made[:, :, :5], front.expand(3, -1, -1, -1))


def test_reparametrisation_is_the_papers_network() -> None:
    module = built(Prefix(length=5, reparam=3), randomise=True)
    state = module.state_dict()
    assert {n: tuple(t.shape) for n, t in state.items()} == {
        "embedding": (5, 16),
        "down.weight": (3, 16),
        "down.bias": (3,),
        "up.weight": (32, 3),
        "up.bias": (32,),
    }
    hidden = torch.tanh(state["embedding"] @ state["down.weight"].T + state["down.bias"])
    made = hidden @ state["up.weight"].T + state["up.bias"]
    keys, values = module.extend(heads(6), heads(6))
    for position in range(5):
        for head in range(KV_HEADS):
            start = head * WIDTH
            assert torch.allclose(keys[1, head, position], made[position, start : start + WIDTH])
            assert torch.allclose(values[1, head, position], made[position, 16 + start : 16 + start + WIDTH])


@pytest.mark.parametrize("config", CONFIGS[:2])
def test_values_of_another_width(config: Prefix) -> None:
    point = AttentionPoint("attn.kv", "attn", "0", 16, 6, AttentionLayout(KV_HEADS, WIDTH, value_dim=3))
    module = config.build(point).double()
    keys, values = module.prefix()
    assert (keys.shape, values.shape) == ((KV_HEADS, 5, WIDTH), (KV_HEADS, 5, 3))
    assert keys.std() > 0
    assert torch.equal(values, torch.zeros_like(values))
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    if config.reparam is None:
        front_keys, front_values = (part.permute(1, 0, 2).flatten(1) for part in module.parameters())
    else:
        assert module.up.weight.shape == (16 + 6, 3)  # type: ignore[union-attr]
        made = module.up(torch.tanh(module.down(module.embedding)))  # type: ignore[operator]
        front_keys, front_values = made[:, :16], made[:, 16:]
    k, v = heads(6), heads(6)[..., :3]
    keys, values = module.extend(k, v)
    for position in range(5):
        for head in range(KV_HEADS):
            assert torch.equal(keys[1, head, position], front_keys[position, head * WIDTH : (head + 1) * WIDTH])
            assert torch.equal(values[1, head, position], front_values[position, head * 3 : (head + 1) * 3])
    assert torch.equal(keys[:, :, 5:], k)
    assert torch.equal(values[:, :, 5:], v)
    assert attention(heads(2, HEADS), keys, values).shape == (3, HEADS, 2, 3)


@pytest.mark.parametrize("config", [Prefix(length=3), Prefix(length=3, reparam=4)])
def test_gradients(config: Prefix) -> None:
    module = built(config, randomise=True)
    q, k, v = heads(2, HEADS), heads(3), heads(3)

    def run(*_: Tensor) -> Tensor:
        return attention(q, *module.extend(k, v))

    assert torch.autograd.gradcheck(run, list(module.parameters()), fast_mode=True)


@pytest.mark.parametrize("config", CONFIGS)
def test_every_parameter_is_reached_by_training(config: Prefix) -> None:
    """Two steps from the initial prefix: values move first, and then everything that makes keys."""
    module = built(config)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    q, k, v, target = heads(2, HEADS), heads(3), heads(3), heads(2, HEADS)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = F.mse_loss(attention(q, *module.extend(k, v)), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in module.parameters())


@pytest.mark.parametrize("config", CONFIGS[:2])
def test_takes_the_dtype_of_the_keys(config: Prefix) -> None:
    module = config.build(POINT)
    keys, values = module.extend(heads(2).bfloat16(), heads(2).bfloat16())
    assert keys.dtype == values.dtype == torch.bfloat16
    assert next(module.parameters()).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        keys, values = module.extend(heads(2).float(), heads(2).float())
    assert keys.dtype == values.dtype == torch.float32


def test_empty_cache_and_empty_batch() -> None:
    module: PrefixModule = built(Prefix(length=5))
    assert module.extend(heads(0), heads(0))[0].shape == (3, KV_HEADS, 5, WIDTH)
    assert module.extend(heads(4)[:0], heads(4)[:0])[0].shape == (0, KV_HEADS, 9, WIDTH)


def test_builds_on_the_meta_device() -> None:
    for config in CONFIGS:
        with torch.device("meta"):
            module = config.build(POINT)
        assert all(p.is_meta for p in module.parameters())


def test_has_no_equivalent_weight() -> None:
    from adapterkit.errors import NotMergeableError

    with pytest.raises(NotMergeableError):
        built(Prefix()).merged(torch.zeros(2, 2), None)


def test_round_trip_through_json() -> None:
    for config in CONFIGS:
        assert Prefix.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_refuses_weights() -> None:
    point = WeightPoint("attn.k", "attn.k", "0", 16, 16, WeightLayout("linear"))
    assert "attention" in str(Prefix().accepts(point))
    assert Prefix().accepts(POINT) is None


@pytest.mark.parametrize("value", [0, -4, 4.5, "4", True, 2**16 + 1, math.nan])
def test_wrong_lengths(value: Any) -> None:
    with pytest.raises(ConfigError, match="length must be"):
        Prefix(length=value)
    with pytest.raises(ConfigError, match="reparam must be"):
        Prefix(reparam=value)
    with pytest.raises(ConfigError, match="length must be"):
        Prefix(length=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [0, -0.1, math.nan, math.inf, "1", None, 1e9])
def test_wrong_standard_deviations(value: Any) -> None:
    with pytest.raises(ConfigError, match="init_std must be"):
        Prefix(init_std=value)
