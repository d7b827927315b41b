"""Captions that are longer than CLIP reads, in chunks of whole words that are encoded one by one."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def chunks_of(text: str, tokenizer: Any, count: int) -> list[str]:
    """The text in so many chunks, each as long as the tokenizer's limit allows; the last ones may be empty.

    Words that do not fit into all of them are left out.
    """
    limit = tokenizer.model_max_length - tokenizer.num_special_tokens_to_add()
    lengths = [len(tokenizer(word, add_special_tokens=False)["input_ids"]) for word in text.split()]
    chunks: list[list[str]] = [[]]
    used = 0
    for word, length in zip(text.split(), lengths, strict=True):
        if used + length > limit and chunks[-1]:
            chunks.append([])
            used = 0
        chunks[-1].append(word)
        used += length
    return [" ".join(words) for words in [*chunks, *[[]] * count][:count]]


def side_by_side(states: Tensor, count: int) -> Tensor:
    """Chunks [texts x count, tokens, features], a text's one after the other, as [texts, count x tokens, features]."""
    return states.reshape(-1, count * states.shape[1], states.shape[2])
