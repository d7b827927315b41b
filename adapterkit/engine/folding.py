"""Weights with the effect of adapters in them: for a merge, and for weights that a model reads instead of calling.

Shape:  a weight here is canonical, [out, in / groups, *kernel].
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from adapterkit.errors import IncompatibleTargetError
from adapterkit.kernels.spans import read_span, write_spans
from adapterkit.kernels.sums import Active, add_bias, merge_weights
from adapterkit.points import InjectionPoint, Span

Part = tuple[InjectionPoint, Active]


def fold(weight: Tensor, bias: Tensor | None, parts: Sequence[Part]) -> tuple[Tensor, Tensor | None]:
    """A weight and bias with every part's adapters in them; the very `bias` where it does not change."""
    if len(parts) == 1 and parts[0][0].span is None and parts[0][0].in_span is None:
        return merge_weights(weight, bias, parts[0][1])
    for _, active in (part for part in parts if part[0].span is None and part[0].in_span is None):
        weight, bias = merge_weights(weight, bias, active)  # what acts on the layer acts before what acts on its parts
    rows: list[tuple[Span, Tensor]] = []
    columns: list[tuple[Span, Tensor]] = []
    biases: list[tuple[Span, Tensor]] = []
    total_bias = bias
    for point, active in parts:
        if point.in_span is not None:
            merged, merged_bias = merge_weights(read_span(weight, point.in_span, 1), bias, active)
            columns.append((point.in_span, merged))
            total_bias = add_bias(total_bias, bias, merged_bias, 1.0)
        elif point.span is not None:
            own_bias = None if bias is None else read_span(bias, point.span, 0)
            merged, merged_bias = merge_weights(read_span(weight, point.span, 0), own_bias, active)
            rows.append((point.span, merged))
            if merged_bias is not None and merged_bias is not own_bias:
                biases.append((point.span, merged_bias))
    if biases:
        total_bias = write_spans(weight.new_zeros(weight.shape[0]) if bias is None else bias, biases, 0)
    folded = write_spans(weight, rows, 0) if rows else weight
    return (write_spans(folded, columns, 1) if columns else folded), total_bias


def check_bias(bias: Tensor | None, folded: Tensor | None, parts: Sequence[Part]) -> None:
    """Raises IncompatibleTargetError where adapters add a bias and the model, which reads the weight, reads none."""
    if bias is None and folded is not None:
        raise IncompatibleTargetError(
            f"an adapter at {parts[0][0].id} adds a bias, and the model reads a weight there but no bias, so that it "
            "would be lost; narrow its targets"
        )
