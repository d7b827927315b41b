"""Running a module on a longer sequence than it was given, so that nothing outside sees the added positions."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from adapterkit.backend import Positions
from adapterkit.errors import RoutingError, StateError


def longer_blocks(
    module: nn.Module,
    forward: Callable[..., Any],
    positions: Positions,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """For blocks that treat all positions alike, as a vision transformer's do: more are put behind, and cut off again.

    Their place does not matter to the blocks, and class and register tokens stay where they are looked for.
    """
    x = args[0] if args else next(iter(kwargs.values()))
    added, visible = positions(x)
    if visible is not None:
        raise RoutingError("these blocks have no mask, so that rows cannot have positions of their own")
    longer = torch.cat([x, added.to(x.dtype)], dim=1)
    named = kwargs if args else {**kwargs, next(iter(kwargs)): longer}
    result = forward(*((longer, *args[1:]) if args else ()), **named)
    return _cut(result, slice(0, x.shape[1]), longer.shape[1])


def longer_decoder(
    module: Any, forward: Callable[..., Any], positions: Positions, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """For causal decoders of transformers, also with a cache, which keeps the added positions of its first forward.

    They stand in front, at positions 0, 1, ...; the tokens' own positions move behind them, and masks are widened.
    """
    accepted = inspect.signature(type(module).forward).parameters
    given = {**dict(zip([name for name in accepted if name != "self"], args, strict=False)), **kwargs}
    ids, embeds = given.pop("input_ids", None), given.pop("inputs_embeds", None)
    embeds = module.get_input_embeddings()(ids) if embeds is None else embeds
    added, visible = positions(embeds)
    count, length = added.shape[1], embeds.shape[1]
    seen = _seen(given.get("past_key_values"))
    own = _own_mask(given.get("attention_mask"), embeds, seen, count)
    front = torch.ones(len(embeds), count, dtype=own.dtype, device=own.device) if visible is None else visible.to(own)
    given["attention_mask"] = torch.cat([front, own], dim=1)
    if "position_ids" in accepted:
        given["position_ids"] = _position_ids(given.get("position_ids"), front, own, length, first=not seen)
    given.pop("cache_position", None)
    given["inputs_embeds"] = embeds if seen else torch.cat([added.to(embeds.dtype), embeds], dim=1)
    result = forward(**given)
    return result if seen else _cut(result, slice(count, None), count + length)


def _seen(cache: Any) -> int:
    if cache is None:
        return 0
    if getattr(cache, "is_compileable", False):
        raise StateError("prompts need a cache that grows: leave out cache_implementation, or use 'dynamic'")
    return int(cache.get_seq_length())


def _own_mask(mask: Tensor | None, embeds: Tensor, seen: int, count: int) -> Tensor:
    """The mask of the tokens alone, [batch, all so far]; the cache holds the added positions too."""
    batch, length = embeds.shape[:2]
    before = seen - count if seen else 0
    if mask is None and before >= 0:
        return torch.ones(batch, before + length, dtype=torch.int64, device=embeds.device)
    if mask is None or mask.ndim != 2:
        raise StateError(
            "prompts need a two-dimensional attention mask, or none, "
            f"not one of shape {None if mask is None else tuple(mask.shape)}"
        )
    if mask.shape[1] != before + length:
        raise StateError(
            f"the cache holds {seen} positions, and with this prompt of {count} and a mask of {mask.shape[1]} it "
            f"should hold {mask.shape[1] - length + count}: it was filled while other adapters acted. "
            "Begin with an empty cache"
        )
    return mask


def _position_ids(given: Tensor | None, front: Tensor, own: Tensor, length: int, *, first: bool) -> Tensor:
    if given is None:  # transformers counts every position, masked or not
        given = torch.arange(own.shape[1] - length, own.shape[1], device=own.device)[None]
    moved = given + front.sum(1, keepdim=True)
    if not first:
        return moved
    return torch.cat([(front.cumsum(1) - 1).clamp_min(0), moved.expand(len(front), -1)], dim=1)


def _cut(result: Any, kept: slice, length: int) -> Any:
    """The result with every tensor [batch, length, ...] in it cut to the kept positions."""
    if isinstance(result, Tensor):
        return result[:, kept] if result.ndim == 3 and result.shape[1] == length else result
    if isinstance(result, tuple):
        return tuple(_cut(part, kept, length) for part in result)
    if hasattr(result, "items"):  # a ModelOutput
        return type(result)(**{key: _cut(value, kept, length) for key, value in result.items()})
    return result
