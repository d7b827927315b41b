"""Spans and layouts against torch's own modules."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from adapterkit.kernels.spans import read_span, write_spans
from adapterkit.kernels.weights import apply_weight, canonical, mix_features
from adapterkit.mapping.family import weight_layout
from adapterkit.points import Span, WeightPoint

HEADS, WIDTH = 3, 2
CONTIGUOUS = [Span(0, 6), Span(6, 6), Span(12, 6)]
UNEQUAL = [Span(0, 8), Span(8, 4), Span(12, 6)]
PER_HEAD = [Span(i * WIDTH, WIDTH, count=HEADS, step=3 * WIDTH) for i in range(3)]
GROUPED = [Span(0, 4, count=3, step=6), Span(4, 1, count=3, step=6), Span(5, 1, count=3, step=6)]
INTERLEAVED = [Span(0, 1, count=9, step=2), Span(1, 1, count=9, step=2)]


def rows(span: Span) -> list[int]:
    return [g * (span.step or 0) + span.start + i for g in range(span.count) for i in range(span.size)]


@pytest.mark.parametrize("spans", [CONTIGUOUS, UNEQUAL, PER_HEAD, GROUPED, INTERLEAVED])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_spans_read_and_write_the_rows_they_name(spans: list[Span], dim: int) -> None:
    shape = [4, 5, 6]
    shape[dim] = 18
    x = torch.randn(shape)
    assert sorted(row for span in spans for row in rows(span)) == list(range(18))
    for span in spans:
        assert span.features == len(rows(span))
        assert torch.equal(read_span(x, span, dim), x.index_select(dim, torch.tensor(rows(span))))
    parts = [(span, -read_span(x, span, dim)) for span in spans]
    assert torch.equal(write_spans(x, parts[::-1], dim), -x)
    expected = x.clone().index_fill_(dim, torch.tensor(rows(spans[1])), 0)
    assert torch.equal(write_spans(x, [(spans[1], torch.zeros_like(parts[1][1]))], dim), expected)


CONVOLUTIONS = [
    nn.Conv1d(4, 6, 3, padding=1),
    nn.Conv2d(4, 6, 3),
    nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(2, 1)),
    nn.Conv2d(4, 6, 3, padding="same", dilation=2),
    nn.Conv2d(4, 6, 4, padding="same", padding_mode="circular"),
    nn.Conv2d(4, 6, 3, padding="valid", padding_mode="reflect"),
    nn.Conv2d(4, 6, 3, padding=(2, 1), padding_mode="reflect"),
    nn.Conv2d(4, 6, 3, padding=1, padding_mode="replicate", groups=2),
    nn.Conv2d(4, 8, 3, padding=1, groups=4),
    nn.Conv3d(4, 6, 3, padding=1),
]


@pytest.mark.parametrize("module", [nn.Linear(4, 6), nn.Embedding(9, 6), *CONVOLUTIONS], ids=str)
def test_apply_weight_is_what_the_module_computes(module: nn.Module) -> None:
    module.double()
    found = weight_layout(module)
    assert found is not None
    layout, inputs, outputs = found
    axes = len(layout.kernel)
    x = (
        torch.randint(0, 9, (2, 3))
        if layout.form == "embedding"
        else torch.randn(2, *((4, *(8,) * axes) if axes else (3, 4))).double()
    )
    weight = canonical(module.weight, layout)  # type: ignore[arg-type]
    assert weight.shape == (outputs, inputs // layout.groups, *layout.kernel)
    y = module(x)
    bias = 0 if getattr(module, "bias", None) is None else module.bias.view(-1, *(1 for _ in layout.kernel))  # type: ignore[union-attr,operator]
    if layout.groups == 1:
        assert torch.allclose(apply_weight(x, weight, layout) + bias, y, atol=1e-12)
    first = torch.randn(3, *weight.shape[1:], dtype=torch.float64)
    second = torch.randn(outputs, 3, dtype=torch.float64)
    product = (second @ first.flatten(1)).view_as(weight)
    with torch.no_grad():
        module.weight.copy_(canonical(product, layout))  # type: ignore[operator,union-attr]
    factored = mix_features(apply_weight(x, first, layout), second, layout) + bias
    assert torch.allclose(factored, module(x), atol=1e-10)
    point = WeightPoint("", "", "", inputs, outputs, layout)
    assert y.shape[point.feature_axis] == outputs


def test_transformers_conv1d() -> None:
    from transformers.pytorch_utils import Conv1D

    module = Conv1D(6, 4).double()
    found = weight_layout(module)
    assert found is not None
    layout, inputs, outputs = found
    assert (layout.form, inputs, outputs) == ("linear_t", 4, 6)
    x = torch.randn(2, 4, dtype=torch.float64)
    assert torch.allclose(
        apply_weight(x, canonical(module.weight, layout), layout) + module.bias, module(x), atol=1e-12
    )


def test_the_widths_of_a_tied_layer_are_its_weights() -> None:
    module = nn.Linear(4, 6, bias=False)
    module.weight = nn.Embedding(9, 8).weight
    found = weight_layout(module)
    assert found is not None
    assert found[1:] == (8, 9)
    assert module(torch.randn(2, 8)).shape == (2, 9)
