"""Embeddings of texts, losses that make them alike, and how well they find each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

_AT_ONCE = 512  # anchors that are compared with all texts
Pooling = Literal["mean", "cls", "last"]


def pooled(hidden: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    """Embeddings of length 1: [texts, features], in float32.

    Args:
        hidden: What a model makes of tokens: [texts, length, features].
        mask: Which tokens there are, on the left: [texts, length].
        pooling: The mean of the tokens, the first, or the last.
    """
    if pooling == "cls":
        found = hidden[:, 0]
    elif pooling == "last":
        found = hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(1) - 1]
    else:
        there = mask[..., None].to(hidden.dtype)
        found = (hidden * there).sum(1) / there.sum(1)
    return F.normalize(found.float(), dim=-1)


def contrast(anchors: Tensor, others: Tensor, same: Tensor, temperature: float) -> Tensor:
    """InfoNCE with the other rows' texts as negatives (van den Oord 2018, eq. 4; Henderson 2017).

    Args:
        anchors: [rows, features].
        others: The positives of the rows in their order, then further negatives: [others, features].
        same: [rows, others], true where a text is no negative, being the row's own; the row's own place is left in.
        temperature: Cosines are divided by it.
    """
    place = torch.arange(len(anchors), device=anchors.device)
    hidden = same.clone()
    hidden[place, place] = False
    logits = (anchors @ others.T / temperature).masked_fill(hidden, -torch.inf)
    return F.cross_entropy(logits, place)


def likeness(anchors: Tensor, positives: Tensor, scores: Tensor) -> Tensor:
    """Mean squared difference of cosines and scores."""
    return F.mse_loss((anchors * positives).sum(-1), scores.to(anchors))


def retrieval(anchors: Tensor, others: Tensor, texts: Tensor, belonging: Sequence[Sequence[int]]) -> dict[str, float]:
    """How often an anchor's own text is the nearest of all, and the mean of one by its rank.

    Args:
        anchors, others: Embeddings, in the order of the rows: [rows, features].
        texts: A number for what each of the others says: [rows].
        belonging: Of every anchor the numbers of the texts that belong to it.
    """
    nearer = torch.cat(
        [
            _nearer(anchors[start : start + _AT_ONCE], others, start, texts, belonging)
            for start in range(0, len(anchors), _AT_ONCE)
        ]
    )
    return {"accuracy": (nearer == 0).double().mean().item(), "mrr": (1 / (1 + nearer.double())).mean().item()}


def _nearer(some: Tensor, others: Tensor, start: int, texts: Tensor, belonging: Sequence[Sequence[int]]) -> Tensor:
    """Of some anchors, the first of which is that of row `start`, how many texts of others are nearer: [anchors]."""
    place = torch.arange(len(some))
    cosines = some @ others.T
    own = cosines[place, place + start]
    same = [torch.isin(texts, torch.tensor(belonging[start + row])) for row in range(len(some))]
    return ((cosines > own[:, None]) & ~torch.stack(same)).sum(1)


def rank_correlation(one: Tensor, other: Tensor) -> float:
    """Spearman's: the correlation of ranks, equal values having the mean of theirs."""
    ranks = torch.stack([_ranks(one), _ranks(other)])
    return torch.corrcoef(ranks)[0, 1].nan_to_num().item()


def _ranks(values: Tensor) -> Tensor:
    ordered = values.sort().values
    below, to = (torch.searchsorted(ordered, values, right=right) for right in (False, True))
    return below.double() + (to - below - 1).double() / 2
