"""Reading and replacing the rows of a fused projection that belong to one point.

Shape:  the spanned axis has count * step entries, read as [count, step]; a span takes `size` of every `step`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adapterkit.points import Span


def read_span(tensor: Tensor, span: Span, dim: int) -> Tensor:
    """The span's entries along `dim`, in order: a view where the span is contiguous."""
    if span.count == 1:
        return tensor.narrow(dim, span.start, span.size)
    dim %= tensor.ndim
    grouped = tensor.unflatten(dim, (span.count, _step(span)))
    return grouped.narrow(dim + 1, span.start, span.size).flatten(dim, dim + 1)


def write_spans(tensor: Tensor, parts: Sequence[tuple[Span, Tensor]], dim: int) -> Tensor:
    """A copy of `tensor` with every span replaced. Out of place: a part may need the old values in its backward.

    Args:
        tensor: The whole.
        parts: Spans that do not overlap and are grouped alike, with their new entries.
        dim: The spanned axis.
    """
    dim %= tensor.ndim
    ordered = sorted(parts, key=lambda part: part[0].start)
    count = ordered[0][0].count
    whole = tensor if count == 1 else tensor.unflatten(dim, (count, _step(ordered[0][0])))
    axis = dim if count == 1 else dim + 1
    pieces: list[Tensor] = []
    cursor = 0
    for span, part in ordered:
        pieces.append(whole.narrow(axis, cursor, span.start - cursor))
        pieces.append(part if count == 1 else part.unflatten(dim, (count, span.size)))
        cursor = span.start + span.size
    pieces.append(whole.narrow(axis, cursor, whole.shape[axis] - cursor))
    joined = torch.cat([piece for piece in pieces if piece.shape[axis]], dim=axis)
    return joined if count == 1 else joined.flatten(dim, dim + 1)


def _step(span: Span) -> int:
    return span.size if span.step is None else span.step
