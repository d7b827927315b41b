"""Compacter against its equation, its parameter counts, and its starts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import adapterkit as ak
from adapterkit.adapters.compacter import KroneckerLinear
from adapterkit.errors import ConfigError, IncompatibleTargetError
from adapterkit.points import InjectionPoint, OutputLayout, OutputPoint
from adapterkit.testing import toys
from tests.values import randomize

X = toys.ids()


def point(features: int) -> InjectionPoint:
    return OutputPoint("mlp", "mlp", "0", features, features, OutputLayout("norm"))


@pytest.fixture
def model() -> toys.ToyModel:
    toys.register()
    return toys.ToyModel().double().eval()


@pytest.mark.parametrize(("inputs", "outputs", "n", "rank"), [(12, 8, 4, 1), (8, 12, 2, 3), (6, 3, 3, 2), (5, 7, 1, 2)])
def test_a_layer_is_its_sum_of_kronecker_products(inputs: int, outputs: int, n: int, rank: int) -> None:
    layer = KroneckerLinear(inputs, outputs, n, rank, torch.nn.init.normal_).double()
    torch.nn.init.normal_(layer.bias)
    rule, x = torch.randn(n, n, n, dtype=torch.float64), torch.randn(5, inputs, dtype=torch.float64)
    weight = sum(torch.kron(rule[i], layer.left[i] @ layer.right[i]) for i in range(n))
    assert torch.allclose(layer(x, rule), x @ weight + layer.bias, rtol=1e-12, atol=1e-12)


def test_every_layer_uses_one_rule(model: toys.ToyModel, tmp_path: Path) -> None:
    adapters = ak.Adapters(model)
    base = model(X)
    adapters.add("a", ak.Compacter())
    assert torch.equal(model(X), base)
    modules: list[Any] = list(adapters.modules("a").values())
    assert len(modules) == 2 * toys.LAYERS
    assert len({id(module.shared.rule) for module in modules}) == 1
    randomize(adapters, "a")
    y = model(X)
    assert not torch.allclose(y, base, atol=1e-3)
    y.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in adapters.parameters("a"))
    path = adapters.save("a", tmp_path / "a.safetensors")
    adapters.detach()
    adapters.load(path)
    adapters.activate("a")
    assert torch.equal(model(X), y)


@pytest.mark.parametrize(("n", "rank", "width"), [(4, 1, 4), (2, 3, 6)])
def test_parameters_are_the_papers(model: toys.ToyModel, n: int, rank: int, width: int) -> None:
    """`4 L rank (k + d) + n^3` for L layers of two adapters, and the biases: `2 L (k + d)`."""
    report = ak.Adapters(model).add("a", ak.Compacter(n=n, rank=rank, width=width))
    both = width + toys.WIDTH
    assert report.parameters == 4 * toys.LAYERS * rank * both + n**3 + 2 * toys.LAYERS * both


def factors(init: str, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    module = ak.Compacter(init=init, n=4, rank=8, width=256, **options).build(point(1024))
    return tuple(t.detach() for t in (module.down.left, module.down.right, module.up.left))  # type: ignore[return-value]


def test_starts_are_what_they_say() -> None:
    """AdapterHub took the normal start for "glorot-uniform" as well."""
    for uniform, normal in zip(factors("glorot_uniform"), factors("glorot_normal"), strict=True):
        deviation = math.sqrt(2 / sum(uniform.shape[1:]))
        for found in (uniform, normal):
            assert abs(found.std().item() / deviation - 1) < 0.05
        assert uniform.abs().max() <= deviation * math.sqrt(3)
        assert normal.abs().max() > deviation * math.sqrt(3)
    for found in factors("normal", init_range=0.2):
        assert abs(found.std().item() / 0.2 - 1) < 0.05
    assert abs(ak.Compacter(n=16, init_range=0.2).shared([]).rule.std().item() / 0.2 - 1) < 0.05


@pytest.mark.parametrize(
    ("config", "width"),
    [
        (ak.Compacter(), 24),
        (ak.Compacter(n=5, reduction=32), 20),
        (ak.Compacter(reduction=10000), 4),
        (ak.Compacter(width=12), 12),
    ],
)
def test_hidden_width_is_a_multiple_of_n(config: ak.Compacter, width: int) -> None:
    assert config.width_at(point(768)) == width


def test_half_precision_goes_through_in_half_precision(model: toys.ToyModel) -> None:
    model = model.bfloat16()
    adapters = ak.Adapters(model)
    adapters.add("a", ak.Compacter())
    randomize(adapters, "a")
    assert {p.dtype for p in adapters.parameters("a")} == {torch.float32}
    assert model(X).dtype == torch.bfloat16


def test_plus_plus_and_json() -> None:
    config = ak.Compacter.plus_plus(rank=2)
    assert (config.targets, config.form, config.rank, config.n) == ("mlp", "pfeiffer", 2, 4)
    assert ak.Compacter.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("n", v) for v in (0, -1, 65, 4.0, True, None)),
        *(("rank", v) for v in (0, 2**13, "1")),
        *(("init_range", v) for v in (0, -1.0, math.inf, math.nan, 1e3)),
        *(("init", v) for v in ("lora", "glorot-uniform", "", None)),
        ("width", 6),
    ],
)
def test_wrong_values(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=key) as caught:
        ak.Compacter(**{key: value})
    assert repr(value) in str(caught.value)


def test_features_that_n_does_not_divide_are_refused(model: toys.ToyModel) -> None:
    with pytest.raises(IncompatibleTargetError, match=r"mlp@toy.*n=3 does not divide its 8 features"):
        ak.Adapters(model).add("a", ak.Compacter(n=3))
