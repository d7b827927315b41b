"""Low rank said once: a type that writes `factors` alone has a forward, a merge and an equivalent weight."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit import errors
from adapterkit.kernels import low_rank
from adapterkit.kernels.weights import call_weight, canonical
from adapterkit.points import WeightLayout, WeightPoint

LAYERS: Mapping[str, tuple[nn.Module, WeightLayout, Tensor]] = {
    "linear": (nn.Linear(6, 4), WeightLayout("linear"), torch.randn(2, 3, 6)),
    "embedding": (nn.Embedding(6, 4), WeightLayout("embedding", scale=1.5), torch.tensor([[1, 5, 5], [0, 2, 3]])),
    "conv": (
        nn.Conv2d(6, 4, 3, 2, 1, 1, 2),
        WeightLayout("conv", True, (3, 3), (2, 2), (1, 1), (1, 1), groups=2),
        torch.randn(2, 6, 5, 5),
    ),
}


class Thin(ak.AdditiveModule):
    """Writes nothing but `factors`."""

    def __init__(self, layout: WeightLayout, shape: tuple[int, ...], scale: float = 1.0) -> None:
        super().__init__()
        out, *rest = shape
        self.layout, self.scale = layout, scale
        self.A, self.B = nn.Parameter(torch.randn(3, *rest)), nn.Parameter(torch.randn(out, 3))

    def factors(self) -> ak.Factors:
        return ak.Factors(self.A, self.B, self.layout, self.scale)


class Bent(Thin):
    def delta(self, x: Tensor) -> Tensor:
        return super().delta(x) * 2


@pytest.mark.parametrize("scale", [0.7, 1.0, 2.0])
@pytest.mark.parametrize("form", LAYERS)
def test_factors_alone_are_a_type(form: str, scale: float) -> None:
    layer, layout, x = LAYERS[form]
    layer = layer.double()
    x = x.double() if x.is_floating_point() else x
    weight = canonical(layer.weight.detach(), layout)  # type: ignore[arg-type]
    module = Thin(layout, tuple(weight.shape), scale).double()
    base = layer(x) * layout.scale
    dense = scale * torch.einsum("or,r...->o...", module.B, module.A)
    torch.testing.assert_close(module.delta_weight(), dense)
    bias = getattr(layer, "bias", None)
    merged, same = module.merged(weight, bias)
    assert same is bias
    torch.testing.assert_close(merged, weight + dense)
    expected = call_weight(x, weight + dense, bias, layout)
    torch.testing.assert_close(module(x, lambda _: base), expected)
    assert module.factors().rank == 3
    assert module.factors().shape == tuple(weight.shape)


def test_low_rank_is_what_no_subclass_bends() -> None:
    assert Thin.abilities.low_rank
    assert not Bent.abilities.low_rank
    assert not ak.AdditiveModule.abilities.low_rank
    layout = WeightLayout("linear")
    assert Thin.abilities.adds
    with pytest.raises(errors.PluginError, match=r"gave \(4, 6\), and the weight is \(5, 6\)"):
        Thin(layout, (4, 6)).merged(torch.zeros(5, 6), None)


def test_a_merge_scales_and_rounds_once() -> None:
    factors = ak.Factors(torch.randn(2, 6).bfloat16(), torch.randn(4, 2).bfloat16(), WeightLayout("linear"), 0.5)
    weight = torch.randn(4, 6)
    exact = weight + 1.5 * (factors.B.float() @ factors.A.float())
    torch.testing.assert_close(low_rank.added(weight, factors, 3.0), exact)
    assert low_rank.dense(factors).dtype == torch.float32


@pytest.mark.parametrize(
    "config", [ak.LoRA(rank=2, dropout=0.5), ak.LoRA(rank=2, rank_dropout=0.5), ak.LoRA(rank=2, module_dropout=0.5)]
)
def test_no_factors_while_training_drops(config: ak.LoRA) -> None:
    point = WeightPoint("attn.q", "q", "", 6, 4, WeightLayout("linear"))
    module = config.build(point)
    assert isinstance(module, ak.AdditiveModule)
    assert module.train().factors() is None
    assert module.delta_weight().shape == (4, 6)
    factors = module.eval().factors()
    assert factors is not None
    assert math.prod(factors.shape) == 24
    assert module.abilities.low_rank
