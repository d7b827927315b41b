"""What a causal language model makes of rows of tokens."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from adapterkit.training.language.packing import IGNORED

_SOME = "logits_to_keep"
"""By this name models of transformers take the places whose logits are wanted."""


def token_losses(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """The cross entropy of the tokens that are learnt, in float32: [rows, places].

    The places are those where some row learns a token; it is zero in rows that do not. No logits are computed of
    others, where the model can leave them out: with a large vocabulary they take most of the memory.

    Args:
        model: A causal language model of transformers.
        batch: See `collated`.
    """
    labels = batch["labels"][:, 1:]
    places = (labels != IGNORED).any(0).nonzero()[:, 0]
    told = {key: value for key, value in batch.items() if key != "labels"}
    if _SOME in inspect.signature(model.forward).parameters:
        logits = model(**told, use_cache=False, **{_SOME: places}).logits
    else:
        logits = model(**told, use_cache=False).logits[:, places]
    labels = labels[:, places]
    losses = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="none")
    return losses.view_as(labels)


def learnt_in(batch: Mapping[str, Tensor]) -> Tensor:
    """How many tokens the loss of a batch is the mean of."""
    return (batch["labels"][:, 1:] != IGNORED).sum()


def tokens_in(batch: Mapping[str, Tensor]) -> int:
    """How many tokens the model reads, but for padding that a mask tells."""
    return int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["input_ids"].numel()
