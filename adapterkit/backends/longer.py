"""Running a module on a longer sequence than it was given, so that nothing outside sees the added positions."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adapterkit.backend import Positions
from adapterkit.backends.packed import documents_of, longer_documents
from adapterkit.errors import LengthError, RoutingError, StateError
from adapterkit.kernels.sequences import cut
from adapterkit.mapping.everywhere import MASKS

# Where what a row does not see stands: so that tokens are the last ones, or so that positions can be counted from 0.
_IN_FRONT, _BEHIND = 0, 4


def _longer_blocks(
    module: nn.Module,
    forward: Callable[..., Any],
    positions: Positions,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    front: bool,
) -> Any:
    names, given = _by_name(module, args, kwargs)
    first = names[0] if args else next(iter(kwargs))
    x = given[first]
    added, visible = positions(x)
    count, length = added.shape[1], x.shape[1]
    given[first] = torch.cat([added.to(x.dtype), x] if front else [x, added.to(x.dtype)], dim=1)
    name = next((name for name in MASKS if name in names), None)
    mask = None if name is None else given.get(name)
    if isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[2] != 1 and _is_stack(module):
        _check_alike(mask)
    if name is not None and (mask is not None or visible is not None):
        wider = _wider(_full(module, x) if mask is None else mask, count, visible)
        given[name] = _last_first(wider, count) if front else wider
    elif visible is not None:
        raise RoutingError("these blocks have no mask, so that rows cannot have positions of their own")
    kept = slice(count, None) if front else slice(0, length)
    if positions.pooled:
        kept = torch.arange(length, device=x.device) + (count if front else 0)
        kept = kept.index_fill(0, kept.new_zeros(1), 0 if front else length).expand(len(x), -1)
    return cut(forward(**given), kept, length + count)


longer_blocks = functools.partial(_longer_blocks, front=False)
"""For blocks to which the order of positions is nothing, as those of bidirectional encoders without relative ones.

More are put behind, where they stand out of the way of class and register tokens; masks are widened, so that all tokens
see them and they see what any token sees.
"""

longer_rotary_blocks = functools.partial(_longer_blocks, front=True)
"""The same, put in front: for blocks that rotate as many positions as there are patches, the last ones."""


def _is_stack(module: nn.Module) -> bool:
    return any(isinstance(child, nn.ModuleList) for child in module.children())


def _check_alike(mask: Tensor) -> None:
    """Raises StateError where tokens do not see the same: what one sees would reach another through the prompt."""
    if torch.compiler.is_compiling():
        return
    visible = mask > torch.finfo(mask.dtype).min / 2 if mask.is_floating_point() else mask != 0
    there = visible.any(dim=3, keepdim=True)
    if bool((visible != visible.any(dim=2, keepdim=True)).logical_and(there).any()):
        raise StateError(
            "the tokens of a row do not see the same (documents one behind the other?), and a prompt that goes through "
            "all blocks would carry from one to another what they must not see: give each document a row of its own, "
            "or use targets='prompt.layer'"
        )


def _last_first(mask: Tensor, count: int) -> Tensor:
    """A mask whose last positions become the first: those of keys, and of queries where it has any."""
    queries = mask.ndim == 4 and mask.shape[-2] != 1
    return mask.roll(count, dims=-1).roll(count, dims=-2) if queries else mask.roll(count, dims=-1)


def longer_recurrence(
    module: Any, forward: Callable[..., Any], positions: Positions, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """`longer_decoder` for a state-space decoder, whose state keeps what its first forward saw."""
    cache = _by_name(module, args, kwargs)[1].get("cache_params")
    if cache is not None and cache.has_previous_state():
        return forward(*args, **kwargs)
    return longer_decoder(module, forward, positions, args, kwargs)


def attend_longer(
    module: Any, positions: Positions, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """For the decoder behind a `longer_encoder`: its mask is widened as the encoder's was."""
    _, given = _by_name(module, args, kwargs)
    x, mask = given.get("encoder_hidden_states"), given.get("encoder_attention_mask")
    if x is None:
        return args, kwargs
    added, visible = positions(x)
    count = added.shape[1]
    if mask is None and visible is None:
        return args, kwargs
    own = x.new_ones(len(x), x.shape[1] - count, dtype=torch.int64) if mask is None else mask
    if not isinstance(own, Tensor) or own.ndim != 2 or own.shape[1] + count != x.shape[1]:
        told = f"of shape {tuple(own.shape)}" if isinstance(own, Tensor) else f"that is a {type(own).__name__}"
        raise StateError(
            f"an encoder's output of {x.shape[1]} positions, prompts of {count} among them, needs a mask of shape "
            f"{(len(x), x.shape[1] - count)}, not one {told}. If other adapters acted then, run the encoder again"
        )
    unseen = None if positions.padded else _BEHIND
    _, _, given["encoder_attention_mask"] = _widened(own, count, visible, unseen=unseen)
    return (), given


def _by_name(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Sequence[str], dict[str, Any]]:
    """What a forward accepts, and its arguments by name."""
    names = [name for name in inspect.signature(type(module).forward).parameters if name != "self"]
    return names, {**dict(zip(names, args, strict=False)), **kwargs}


def _longer_decoder(
    module: Any,
    forward: Callable[..., Any],
    positions: Positions,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    counts: bool = False,
    keeps: bool = False,
    packs: bool = False,
) -> Any:
    accepted, given = _by_name(module, args, kwargs)
    ids, embeds = given.pop("input_ids", None), given.pop("inputs_embeds", None)
    embeds = module.get_input_embeddings()(ids) if embeds is None else embeds
    added, visible = positions(embeds)
    count, length = added.shape[1], embeds.shape[1]
    seen = _seen(given.get("past_key_values"))
    documents = None if seen else documents_of(module, given, length, restarts=packs)
    if documents is not None:
        longer = longer_documents(given, embeds, documents, added, visible)
        _check_length(module, count, length, longer.given["position_ids"])
        return cut(forward(**longer.given), longer.kept, longer.length)
    own = _own_mask(given.get("attention_mask"), embeds, seen, count)
    unseen = None if positions.padded else _BEHIND if keeps else _IN_FRONT
    front, order, given["attention_mask"] = _widened(own, count, visible, unseen=unseen)
    told = None if positions.padded else given.get("position_ids")
    if "position_ids" in accepted and not (counts and told is None):
        ids = _position_ids(told, front, own, length, first=not seen, padded=positions.padded)
        given["position_ids"] = ids if seen else ids.gather(1, order)
    _check_length(module, count, own.shape[1], given.get("position_ids"), mask=given["attention_mask"])
    kinds = given.get("token_type_ids")
    if kinds is not None and not seen:
        given["token_type_ids"] = torch.cat([kinds.new_zeros(len(kinds), count), kinds], dim=1)
    given.pop("cache_position", None)
    given["inputs_embeds"] = embeds if seen else _ordered(torch.cat([added.to(embeds.dtype), embeds], dim=1), order)
    result = forward(**given)
    return result if seen or keeps else cut(result, slice(count, None), count + length)


longer_decoder = functools.partial(_longer_decoder, packs=True)
"""For causal decoders of transformers, also with a cache, which keeps the added positions of its first forward.

They stand right before the first token that a row sees, behind its padding: at positions 0, 1, ... where there is none,
and the tokens' own positions move behind them. Masks are widened. So distances are those of the row alone, in windows
and in relative positions too; what is returned at padding means nothing, as without. Where a row is several documents
(positions that restart), they stand before each.
"""

longer_single_decoder = functools.partial(_longer_decoder)
"""The same, for models to which a row is one document, whatever its positions are."""

longer_counting_decoder = functools.partial(_longer_decoder, counts=True)
"""The same, for decoders that count positions by the mask where they are not told them (OPT)."""

longer_encoder = functools.partial(_longer_decoder, keeps=True)
"""The same for an encoder, which returns the added positions too: its decoder attends to them (`attend_longer`)."""


_TABLES = ("wpe", "embed_positions", "embeddings.position_embeddings")
"""Where a learnt position for each place is, in families that have them."""


def _check_length(module: Any, count: int, own: int, ids: Tensor | None, mask: Tensor | None = None) -> None:
    """Raises LengthError where the model has too few positions. The values are looked at only where it may be so."""
    table = next((found for path in _TABLES if (found := _child(module, path)) is not None), None)
    limit = getattr(module.config, "max_seq_len", None)  # that of linear biases, where they are a table
    if table is not None:
        limit = table.num_embeddings - getattr(table, "offset", 0)
    if limit is None or count + own <= limit:
        return
    needed = count + own
    if table is not None:
        needed = int(ids.max()) + 1 if ids is not None else needed if mask is None else int(mask.sum(1).max())
    if needed > limit:
        raise LengthError(
            f"{type(module).__name__} has {limit} positions, and this sequence of up to {needed - count} tokens with a "
            f"prompt of {count} needs {needed}: cut it to {limit - count} tokens, or use a shorter prompt"
        )


def _child(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = None if module is None else module._modules.get(name)
    return module


def _widened(own: Tensor, count: int, visible: Tensor | None, *, unseen: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """The mask of `count` added positions; the order of [added, own]; the mask of all in that order.

    A row's padding in front, what it sees, its tokens; what it does not see at an end, as `unseen` says. Where that is
    None, the added positions come first in every row.
    """
    front = own.new_ones(len(own), count) if visible is None else visible.to(own)
    if unseen is None:
        both = torch.cat([front, own], dim=1)
        return front, torch.arange(both.shape[1], device=own.device).expand_as(both), both
    padding = own.ne(0).cumsum(1) == 0
    rank = torch.cat([torch.where(front.ne(0), 2, unseen), torch.where(padding, 1, 3)], dim=1)
    order = rank.argsort(dim=1, stable=True)
    return front, order, torch.cat([front, own], dim=1).gather(1, order)


def _ordered(x: Tensor, order: Tensor) -> Tensor:
    return x.gather(1, order[..., None].expand_as(x))


def _seen(cache: Any) -> int:
    if cache is None:
        return 0
    if getattr(cache, "is_compileable", False):
        raise StateError("prompts need a cache that grows: leave out cache_implementation, or use 'dynamic'")
    return int(cache.get_seq_length())


def _own_mask(mask: Any, embeds: Tensor, seen: int, count: int) -> Tensor:
    """The mask of the tokens alone, [batch, all so far]; the cache holds the added positions too."""
    batch, length = embeds.shape[:2]
    before = seen - count if seen else 0
    if mask is None and before >= 0:
        return torch.ones(batch, before + length, dtype=torch.int64, device=embeds.device)
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        told = f"one of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise StateError(f"prompts need a two-dimensional attention mask, or none, not {told}")
    if mask.shape[1] != before + length:
        raise StateError(
            f"the cache holds {seen} positions, and with this prompt of {count} and a mask of {mask.shape[1]} it "
            f"should hold {mask.shape[1] - length + count}: it was filled while other adapters acted. "
            "Begin with an empty cache"
        )
    return mask


def _position_ids(
    given: Tensor | None, front: Tensor, own: Tensor, length: int, *, first: bool, padded: bool
) -> Tensor:
    if given is None:  # transformers counts every position, masked or not
        given = torch.arange(own.shape[1] - length, own.shape[1], device=own.device)[None]
    moved = given + front.sum(1, keepdim=True)
    if not first:
        return moved
    first_token = own[:, :length].ne(0).int().argmax(1, keepdim=True)
    start = 0 if padded else given.expand(len(front), -1).gather(1, first_token)
    return torch.cat([start + (front.cumsum(1) - 1).clamp_min(0), moved.expand(len(front), -1)], dim=1)


def _full(module: Any, x: Tensor) -> Tensor:
    """A mask that hides nothing: an additive one, which every attention takes but flash attention, which counts."""
    batch, length = x.shape[:2]
    implementation = str(getattr(getattr(module, "config", None), "_attn_implementation", ""))
    if implementation.startswith("flash"):
        return torch.ones(batch, length, dtype=torch.int64, device=x.device)
    return torch.zeros(batch, 1, 1, length, dtype=x.dtype, device=x.device)


def _wider(mask: Any, count: int, visible: Tensor | None) -> Tensor:
    """A mask [batch, keys], or [batch, 1 or heads, 1 or queries, keys], boolean or additive, with `count` more."""
    if not isinstance(mask, Tensor) or mask.ndim not in (2, 4):
        told = f"one of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise StateError(f"prompts need an attention mask of two or four dimensions, or none, not {told}")
    additive = mask.is_floating_point()
    if mask.ndim == 4 and mask.shape[2] != 1:
        rows = mask.amax(dim=2, keepdim=True) if additive else mask.any(dim=2, keepdim=True)
        mask = torch.cat([mask, rows.expand(-1, -1, count, -1)], dim=2)
    if visible is None:
        seen = torch.ones((*mask.shape[:-1], count), dtype=torch.bool, device=mask.device)
    else:
        mask = mask.expand(len(visible), *mask.shape[1:])
        seen = visible if mask.ndim == 2 else visible[:, None, None].expand(*mask.shape[:-1], count)
    if additive:
        lowest = torch.finfo(mask.dtype).min
        columns = torch.zeros(seen.shape, dtype=mask.dtype, device=mask.device).masked_fill(~seen, lowest)
    else:
        columns = seen.to(mask.dtype)
    return torch.cat([mask, columns], dim=-1)
