"""Adapters folded into a weight that several points share: the weight and the bias, against sums written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit import errors
from adapterkit.engine.folding import fold
from adapterkit.kernels.gates import Gates
from adapterkit.kernels.sums import Active, merge_weights
from adapterkit.testing import toys
from tests.engine import test_read_weights


class Shifted(ak.AdapterModule):
    """Adds numbers to the weight and, if told to, to the bias."""

    def __init__(self, weight: float, bias: float | None) -> None:
        super().__init__()
        self.by_weight, self.by_bias = weight, bias

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.by_bias is None:
            return weight + self.by_weight, bias
        shift = weight.new_full((weight.shape[0],), self.by_bias)
        return weight + self.by_weight, shift if bias is None else bias + shift


def active(weight: float, bias: float | None, scale: float = 1.0) -> Active:
    return [(Shifted(weight, bias), scale)]


def layer(rows: int, columns: int, bias: bool) -> tuple[Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return weight, torch.randn(rows, generator=generator, dtype=torch.float64) if bias else None


def rows() -> tuple[ak.InjectionPoint, ak.InjectionPoint, int, int]:
    """Two of three spans of rows, and the size of the whole weight."""
    toys.register()
    q, _, v = list(ak.points(toys.ToyModel(layers=1), "attn.q attn.k attn.v"))
    return q, v, 3 * toys.WIDTH, toys.WIDTH


def columns() -> tuple[ak.InjectionPoint, ak.InjectionPoint, int, int]:
    test_read_weights.register()
    model = test_read_weights.ReadModel(test_read_weights.Reader())
    first, second = list(ak.points(model, "attn.o mlp.down"))
    return first, second, *model.inner.out.weight.shape  # type: ignore[union-attr,return-value]


def added(bias: Tensor | None, shift: Tensor) -> Tensor:
    return shift if bias is None else bias + shift


@pytest.mark.parametrize("bias", [True, False])
def test_each_span_of_rows_gets_its_own_bias(bias: bool) -> None:
    q, v, *shape = rows()
    weight, base = layer(*shape, bias)
    folded, new = fold(weight, base, [(q, active(1.0, 0.25)), (v, active(2.0, 0.5, 2.0))])
    change = torch.tensor([1.0, 0.0, 4.0], dtype=torch.float64).repeat_interleave(toys.WIDTH)
    shift = torch.tensor([0.25, 0.0, 1.0], dtype=torch.float64).repeat_interleave(toys.WIDTH)
    assert torch.allclose(folded, weight + change[:, None], rtol=1e-12)
    assert new is not None
    assert torch.allclose(new, added(base, shift), rtol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
def test_a_span_whose_bias_changes_beside_one_whose_does_not(bias: bool) -> None:
    q, v, *shape = rows()
    weight, base = layer(*shape, bias)
    _, new = fold(weight, base, [(q, active(1.0, None)), (v, active(2.0, 0.5))])
    shift = torch.tensor([0.0, 0.0, 0.5], dtype=torch.float64).repeat_interleave(toys.WIDTH)
    assert new is not None
    assert torch.allclose(new, added(base, shift), rtol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("where", [rows, columns])
def test_a_bias_that_nobody_changes_is_the_very_one(where: object, bias: bool) -> None:
    first, second, *shape = where()  # type: ignore[operator]
    weight, base = layer(*shape, bias)
    _, new = fold(weight, base, [(first, active(1.0, None)), (second, active(2.0, None))])
    assert new is base


@pytest.mark.parametrize("bias", [True, False])
def test_spans_of_columns_share_one_bias(bias: bool) -> None:
    first, second, *shape = columns()
    weight, base = layer(*shape, bias)
    folded, new = fold(weight, base, [(first, active(1.0, 0.25)), (second, active(2.0, 0.5, 0.5))])
    change = torch.full((shape[1],), 1.0, dtype=torch.float64)
    assert second.in_span is not None
    change[second.in_span.start :] = 1.0  # half of 2
    assert torch.allclose(folded, weight + change, rtol=1e-12)
    assert new is not None
    assert torch.allclose(new, added(base, torch.full((shape[0],), 0.5, dtype=torch.float64)), rtol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
def test_several_at_one_weight_add_up_by_their_scales(bias: bool) -> None:
    weight, base = layer(4, 3, bias)
    several = [*active(1.0, 0.25, 0.5), *active(2.0, None, 3.0), *active(0.0, 0.5, 2.0)]
    merged, new = merge_weights(weight, base, several)
    assert torch.allclose(merged, weight + 6.5, rtol=1e-12)
    assert new is not None
    assert torch.allclose(new, added(base, torch.full((4,), 1.125, dtype=torch.float64)), rtol=1e-12)


def test_weights_of_rows_fit_no_weight_that_serves_them_all() -> None:
    weight, base = layer(4, 3, True)
    several = [*active(1.0, None), (Shifted(2.0, None), Gates(torch.ones(2)))]
    with pytest.raises(errors.RoutingError, match="samples cannot be routed where one weight serves the whole batch"):
        merge_weights(weight, base, several)  # type: ignore[arg-type]


def test_the_base_of_an_output_point_is_asked_for_its_own_input_alone() -> None:
    """It has already run: another input would need another run of the sublayer."""
    toys.register()
    model = toys.ToyModel().double().eval()
    adapters = ak.Adapters(model)
    adapters.add("a", ak.Bottleneck(width=2, targets="mlp"))
    asked: list[str] = []

    def forward(x: Tensor, base: ak.Base) -> Tensor:
        y = base(x)
        with pytest.raises(ValueError, match="only be asked for the x that forward was given"):
            base(x.clone())
        asked.append("both")
        return y

    module: nn.Module
    for module in adapters.modules("a").values():
        module.forward = forward
    with adapters.disabled():
        expected = model(toys.ids())
    assert torch.equal(model(toys.ids()), expected)
    assert len(asked) == toys.LAYERS
