"""Which tokens of a batch are there, and which of them are one document: told by the mask of an attention."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

_NOWHERE = torch.iinfo(torch.int64).max


class Documents:
    """The documents of a batch whose rows are padded, or are several documents one behind the other.

    Args:
        number: That of each token's document in its row, from 1; 0 at padding: [rows, length], int64.
    """

    def __init__(self, number: Tensor) -> None:
        self.number = number

    @functools.cached_property
    def from_start(self) -> Tensor:
        """How many tokens of its document are before each token; more than there are at padding."""
        return _before(self.number)

    @functools.cached_property
    def from_end(self) -> Tensor:
        """How many are behind it."""
        return _before(self.number.flip(1)).flip(1)


def _before(number: Tensor) -> Tensor:
    real = number != 0
    count = real.cumsum(1)
    start = real & (number != _last(number, real))
    return torch.where(real, count - torch.where(start, count, 0).cummax(1).values, _NOWHERE)


def _last(values: Tensor, real: Tensor) -> Tensor:
    """For each token the value of the last one before it that is there; 0 where there is none."""
    place = _place(real)
    return torch.where(place < 0, 0, values.gather(1, place.clamp_min(0)))


def _place(real: Tensor) -> Tensor:
    """For each token the place of the last one before it that is there; -1 where there is none."""
    places = torch.where(real, torch.arange(real.shape[1], device=real.device), -1).cummax(1).values
    return torch.nn.functional.pad(places[:, :-1], (1, 0), value=-1)


def by_mask(mask: Tensor, length: int, *, hides: bool = False) -> Documents | None:
    """The documents that an attention keeps apart: a token that sees the one before it is of the same.

    Args:
        mask: [rows, keys], other than zero at what is there; or [rows, heads, queries or 1, keys], where that is
            visible: additive, or boolean.
        length: Tokens; of more keys they are the last that anybody sees.
        hides: Whether a boolean mask is True at what is hidden.

    Returns:
        None where the mask is of another form.
    """
    if mask.ndim == 2:
        return Documents((mask[:, -length:] != 0).long())
    if mask.ndim != 4 or mask.shape[2] not in (1, length):
        return None
    visible = _visible(mask[:, 0], hides)
    keys = visible.shape[-1]
    if keys != length:  # a cache that grows holds what was before; one that does not is not yet full
        seen = visible.flatten(0, 1).any(0)
        own = keys - seen.flip(0).long().argmax() - length + torch.arange(length, device=mask.device)
        visible = visible.index_select(2, own.clamp_min(0))
    if visible.shape[1] == 1:
        return Documents(visible[:, 0].long())
    real = visible.diagonal(dim1=1, dim2=2)
    place = _place(real)
    joined = visible.gather(2, place.clamp_min(0)[..., None])[..., 0] & (place >= 0)
    return Documents(torch.where(real, (real & ~joined).cumsum(1), 0))


def _visible(mask: Tensor, hides: bool) -> Tensor:
    if mask.is_floating_point():
        return mask > torch.finfo(mask.dtype).min / 2
    return mask == 0 if hides else mask != 0


def by_positions(positions: Tensor) -> Documents:
    """Those of positions [rows, length] that begin anew with each document."""
    return Documents((positions.diff(dim=1, prepend=positions[:, :1]) != 1).cumsum(1))


def by_lengths(bounds: Tensor, length: int) -> Documents:
    """Those of one row, where `bounds` [documents + 1] are the places at which they begin, and the end."""
    places = torch.arange(length, device=bounds.device)
    return Documents(torch.searchsorted(bounds[1:].to(places), places, right=True)[None] + 1)
