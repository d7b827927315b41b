"""Documents that stand one behind the other in a row, each with positions of its own from the start.

transformers keeps documents apart where positions restart, no mask is given, and no cache is filled; with flash
attention also by the lengths of the documents. So what is put to the sequence is put to each document.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FLASH = "flash"
"""How the names of implementations begin that take documents by their lengths."""


def documents_of(module: Any, given: dict[str, Any], length: int, *, restarts: bool) -> Tensor | None:
    """The number of each token's document, [rows, length] from 0; None where every row is one document.

    Args:
        module: A decoder.
        given: Its arguments by name.
        length: Of the sequence.
        restarts: Whether the model takes positions that restart for those of documents, whatever its attention.
    """
    told, lengths = given.get("position_ids"), given.get("cu_seq_lens_q")
    if given.get("attention_mask") is not None:
        return None
    implementation = str(getattr(module.config, "_attn_implementation", ""))
    flash = implementation.startswith(FLASH)
    if flash and isinstance(lengths, Tensor):
        ends, places = lengths[1:].to(torch.int64), torch.arange(length, device=lengths.device)
        return torch.searchsorted(ends, places, right=True)[None]
    if told is None or told.ndim != 2 or not (flash or (restarts and _uncached(module, given))):
        return None
    starts = told.diff(dim=1, prepend=told[:, :1] - 1) != 1
    return starts.cumsum(1) if bool(starts.any()) else None


def _uncached(module: Any, given: dict[str, Any]) -> bool:
    """Whether no cache is filled: transformers fills one where it is not told otherwise."""
    if given.get("past_key_values") is not None:
        return False
    asked = given.get("use_cache")
    asked = getattr(module.config, "use_cache", False) if asked is None else asked
    return not asked or (module.training and getattr(module, "gradient_checkpointing", False))


@dataclass(frozen=True)
class Longer:
    """A row of documents with positions in front of each.

    Attributes:
        given: The module's arguments for it.
        kept: Where the tokens stand in it, [rows, length].
        length: Of it.
    """

    given: dict[str, Any]
    kept: Tensor
    length: int


def longer_documents(
    given: dict[str, Any], embeds: Tensor, documents: Tensor, added: Tensor, visible: Tensor | None
) -> Longer:
    """Puts what was added in front of every document.

    What a row does not see, and what stands for documents that it does not have, is behind all documents, each position
    a document of its own.

    Args:
        given: The module's other arguments by name.
        embeds: [rows, length, features].
        documents: See `documents_of`.
        added: [rows, count, features].
        visible: [rows, count] boolean, or None for all.
    """
    rows, count, length = len(embeds), added.shape[1], embeds.shape[1]
    documents = documents.expand(rows, -1)
    number = int(documents.max()) + 1
    seen = torch.ones(rows, count, dtype=torch.bool, device=embeds.device) if visible is None else visible
    each = torch.arange(number, device=embeds.device)
    # Rank of an added position: that of its document, before the tokens; behind all where nobody sees it.
    there = seen[:, None] & (each[:, None] <= documents[:, -1, None, None])
    front = torch.where(there, 2 * each[:, None], 2 * number).flatten(1)
    order = torch.cat([front, 2 * documents + 1], dim=1).argsort(dim=1, stable=True)

    told = given.get("position_ids")
    told = torch.arange(length, device=embeds.device)[None] if told is None else told
    told, before = told.expand(rows, -1), seen.sum(1)
    first = told.new_full((rows, number), torch.iinfo(told.dtype).max).scatter_reduce(1, documents, told, "amin")
    counted = torch.where(there, first[:, :, None] + (seen.cumsum(1) - 1)[:, None], 0).flatten(1)
    given = {
        **given,
        "inputs_embeds": _ordered(torch.cat([added.to(embeds.dtype).repeat(1, number, 1), embeds], dim=1), order),
        "position_ids": torch.cat([counted, told + before[:, None]], dim=1).gather(1, order),
        "attention_mask": None,
        **_lengths(given, (torch.cat([front, 2 * documents], dim=1) // 2).gather(1, order)),
    }
    kinds = given.get("token_type_ids")
    if kinds is not None:
        given["token_type_ids"] = torch.cat([kinds.new_zeros(rows, number * count), kinds], dim=1).gather(1, order)
    return Longer(given, order.argsort(dim=1)[:, number * count :], length + number * count)


def _ordered(x: Tensor, order: Tensor) -> Tensor:
    return x.gather(1, order[..., None].expand_as(x))


def _lengths(given: dict[str, Any], documents: Tensor) -> dict[str, Any]:
    """What flash attention and recurrences are told of documents [rows, length], where they are told."""
    found: dict[str, Any] = {}
    if (numbers := given.get("seq_idx")) is not None:
        found["seq_idx"] = documents.to(numbers.dtype)
    ends = documents[0].diff().nonzero().flatten() + 1
    for side in ("q", "k"):
        if (lengths := given.get(f"cu_seq_lens_{side}")) is not None:
            bounds = [ends.new_zeros(1), ends, ends.new_full((1,), documents.shape[1])]
            found[f"cu_seq_lens_{side}"] = torch.cat(bounds).to(lengths)
            found[f"max_length_{side}"] = int(found[f"cu_seq_lens_{side}"].diff().max())
    return found
