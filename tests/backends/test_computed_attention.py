"""Attentions that compute their softmax themselves, with a prefix: compared with the softmax over all keys."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import adapterkit as ak
from adapterkit.errors import IncompatibleTargetError

WIDTH, HEADS, LENGTH, PREFIX = 8, 2, 5, 3
Mix = Callable[["Attention", Tensor, Tensor, Tensor], Tensor]


def plain(module: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.dropout(torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]) + module.bias, dim=-1), 0.5, module.training) @ v


def scaled_before(module: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-1, -2))
    scores += module.bias
    return torch.matmul(scores.softmax(-1), v)


def folded(module: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (part.flatten(0, 1) for part in (q, k, v))
    scores = torch.bmm(q, k.transpose(1, 2)).mul(q.shape[-1] ** -0.5)
    scores = scores.view(-1, HEADS, LENGTH, LENGTH) + module.bias
    scores = torch.max(scores, torch.tensor(torch.finfo(scores.dtype).min)).view(-1, LENGTH, LENGTH)
    return torch.bmm(F.softmax(scores, dim=-1, dtype=torch.float64).to(q.dtype), v).unflatten(0, (-1, HEADS))


def summed(module: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("b h i d, b h j d -> b h i j", q, k) * q.shape[-1] ** -0.5
    scores = torch.where(module.bias.expand_as(scores) > -5, scores + module.bias, -1e30)
    return torch.einsum("bhij,bhjd->bhid", nn.Softmax(dim=-1)(scores), v)


class Attention(nn.Module):
    _softmax: Mix

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.query, self.key, self.value, self.dense = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.register_buffer("bias", torch.randn(1, HEADS, LENGTH, LENGTH))

    def forward(self, x: Tensor) -> Tensor:
        parts = (layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        return self.dense(self._softmax(*parts).transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self, mix: Mix) -> None:
        super().__init__()
        self.attention: Attention = type("Attention", (Attention,), {"_softmax": mix})()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x)


def build(mix: Mix) -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return Model(mix).double().eval().requires_grad_(False)


def tokens() -> Tensor:
    return torch.randn(2, LENGTH, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


def expected(model: Model, x: Tensor, keys: Tensor, values: Tensor, weight: float = 1.0) -> Tensor:
    """Keys and values [heads, prefix, width] in front, their mass times a weight."""
    own = model.attention
    q, k, v = (layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (own.query, own.key, own.value))
    scale = q.shape[-1] ** -0.5
    front = scale * q @ keys.mT + math.log(weight)
    scores = torch.cat([front, scale * q @ k.mT + own.bias], dim=-1)
    mixed = scores.softmax(-1) @ torch.cat([values.expand(len(x), -1, -1, -1), v], dim=2)
    return x + own.dense(mixed.transpose(1, 2).flatten(2))


@pytest.fixture(params=[plain, scaled_before, folded, summed], ids=lambda mix: mix.__name__)
def model(request: pytest.FixtureRequest) -> Model:
    return build(request.param)


def prefixed(model: Model) -> tuple[ak.Adapters, Tensor, Tensor]:
    adapters = ak.Adapters(model)
    adapters.add("p", ak.Prefix(length=PREFIX))
    for parameter in adapters.parameters("p"):
        parameter.data.normal_(generator=torch.Generator().manual_seed(5))
    (module,) = adapters.modules("p").values()
    empty = torch.zeros(1, HEADS, 0, WIDTH // HEADS, dtype=torch.float64)
    keys, values = module.extend(empty, empty)  # type: ignore[operator]
    return adapters, keys[0], values[0]


@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_a_prefix_joins_the_softmax(model: Model, weight: float) -> None:
    x, base = tokens(), model(tokens())
    adapters, keys, values = prefixed(model)
    with adapters.activated({"p": weight}):
        torch.testing.assert_close(model(x), expected(model, x, keys, values, weight), atol=1e-12, rtol=1e-12)
    with adapters.disabled():
        assert torch.equal(model(x), base)


def test_gradients_reach_it(model: Model) -> None:
    adapters, keys, values = prefixed(model)
    model(tokens()).square().sum().backward()
    found = [parameter.grad for parameter in adapters.parameters("p")]
    assert all(grad is not None and bool(grad.abs().sum() > 0) for grad in found)
    assert keys.shape == values.shape


def unsoftened(module: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.softmax(-1) @ (k.softmax(-2).mT @ v)


def test_what_has_no_softmax_over_keys_says_so_when_it_runs() -> None:
    model = build(unsoftened)
    prefixed(model)
    with pytest.raises(IncompatibleTargetError, match="mixes values by a softmax over keys 0 times, not once"):
        model(tokens())


eager_attention_forward = plain
"""By this name, beside the registry, it is found of files of transformers."""


class Unregistered(Attention):
    """Asks transformers' registry for an attribute, as Kosmos-2.5 does, and so computes its softmax whatever it has."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(_attn_implementation="sdpa")

    def forward(self, x: Tensor) -> Tensor:
        parts = (layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        function = getattr(ALL_ATTENTION_FUNCTIONS, self.config._attn_implementation, eager_attention_forward)
        return self.dense(function(self, *parts).transpose(1, 2).flatten(2))


def test_a_function_that_a_registry_is_not_asked_for_by_key_is_not_put_there() -> None:
    model = build(plain)
    attention = Unregistered().double().requires_grad_(False)
    attention.load_state_dict(model.attention.state_dict())
    model.attention = attention.eval()
    adapters, keys, values = prefixed(model)
    with adapters.activated("p"):
        torch.testing.assert_close(model(tokens()), expected(model, tokens(), keys, values), atol=1e-12, rtol=1e-12)
