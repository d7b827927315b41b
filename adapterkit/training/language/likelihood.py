"""What a causal language model makes of rows of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from adapterkit.training.language.packing import IGNORED


def token_losses(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """The cross entropy of each token that is learnt, in float32; zero at others: [rows, length - 1].

    Args:
        model: A causal language model of transformers.
        batch: See `collated`.
    """
    labels = batch["labels"][:, 1:]
    told = {key: value for key, value in batch.items() if key != "labels"}
    logits = model(**told, use_cache=False).logits[:, :-1]
    losses = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="none")
    return losses.view_as(labels)


def learnt_in(batch: Mapping[str, Tensor]) -> Tensor:
    """How many tokens the loss of a batch is the mean of."""
    return (batch["labels"][:, 1:] != IGNORED).sum()


def tokens_in(batch: Mapping[str, Tensor]) -> int:
    """How many tokens the model reads, but for padding that a mask tells."""
    return int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["input_ids"].numel()
