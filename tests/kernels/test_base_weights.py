"""The part of a layer's weight and bias that belongs to a point: its rows, its columns, its expert."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from adapterkit.kernels.weights import base_weight
from adapterkit.points import Span, TokensLayout, TokensPoint, WeightLayout, WeightPoint

COLUMNS = [Span(0, 4), Span(4, 2), Span(1, 1, count=3, step=2)]
ROWS = [Span(0, 3), Span(3, 5), Span(1, 2, count=2, step=4)]


def entries(span: Span) -> list[int]:
    return [group * (span.step or 0) + span.start + i for group in range(span.count) for i in range(span.size)]


def point(bias: bool, span: Span | None = None, in_span: Span | None = None) -> WeightPoint:
    layout = WeightLayout("linear", bias=bias)
    inputs, outputs = in_span.features if in_span else 6, span.features if span else 8
    return WeightPoint("mlp.up", "", "", inputs, outputs, layout, span, in_span=in_span)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("span", COLUMNS, ids=str)
def test_a_part_of_the_input_has_its_columns_and_the_whole_bias(span: Span, bias: bool) -> None:
    layer = nn.Linear(6, 8, bias=bias)
    weight, own = base_weight(layer, point(bias, in_span=span))
    assert weight is not None
    assert torch.equal(weight, layer.weight[:, entries(span)])
    assert own is None if layer.bias is None else own is not None and torch.equal(own, layer.bias)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("span", ROWS, ids=str)
def test_a_part_of_the_output_has_its_rows_of_both(span: Span, bias: bool) -> None:
    layer = nn.Linear(6, 8, bias=bias)
    weight, own = base_weight(layer, point(bias, span))
    assert weight is not None
    assert torch.equal(weight, layer.weight[entries(span)])
    assert own is None if layer.bias is None else own is not None and torch.equal(own, layer.bias[entries(span)])


def test_the_whole_is_a_view_without_grad() -> None:
    layer = nn.Linear(6, 8)
    weight, bias = base_weight(layer, point(bias=True))
    assert weight is not None
    assert bias is not None
    assert weight.data_ptr() == layer.weight.data_ptr()
    assert bias.data_ptr() == layer.bias.data_ptr()
    assert not weight.requires_grad
    assert not bias.requires_grad


def test_a_point_without_a_weight_is_told() -> None:
    with pytest.raises(TypeError, match=r"embed\.tokens@model is no weight point"):
        base_weight(nn.Linear(6, 8), TokensPoint("embed.tokens", "embed", "", 6, 8, TokensLayout()))
