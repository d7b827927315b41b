"""Positions that are counted from each row's own first token, whatever padding stands before it."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn


def own_positions(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, front: int = 0, padded: bool = False
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """For models whose own tokens know distances alone (rotary embeddings), beside which something stands without one.

    Where positions are not told, transformers counts padding too. That turns queries against what has no position.
    """
    given = _by_name(module, args, kwargs)
    mask, x = given.get("attention_mask"), _sequence(given)
    if front or padded:
        return moved_positions(module, args, kwargs, front=front, padded=padded)
    if given.get("position_ids") is not None or not isinstance(mask, Tensor) or mask.ndim != 2 or x is None:
        return args, kwargs
    given["position_ids"] = _own(mask)[:, -x.shape[1] :]
    return (), given


def moved_positions(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, front: int = 0, padded: bool = False
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """For models that know absolute positions: they begin behind what counts in front, whatever positions are told.

    Args:
        module, args, kwargs: The call.
        front: How many count.
        padded: Whether padding counts too.
    """
    given = _by_name(module, args, kwargs)
    mask, x = given.get("attention_mask"), _sequence(given)
    if not front or x is None or "position_ids" not in inspect.signature(type(module).forward).parameters:
        return args, kwargs
    cache = given.get("past_key_values")
    seen = 0 if cache is None else int(cache.get_seq_length())
    ids = torch.arange(seen, seen + x.shape[1], device=x.device)[None]
    if not padded and isinstance(mask, Tensor) and mask.ndim == 2:
        ids = _own(mask)[:, -x.shape[1] :]
    given["position_ids"] = ids + front
    return (), given


def _by_name(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    names = [*inspect.signature(type(module).forward).parameters][1:]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _sequence(given: dict[str, Any]) -> Tensor | None:
    x = given.get("input_ids")
    return given.get("inputs_embeds") if x is None else x


def _own(mask: Tensor) -> Tensor:
    """Positions from each row's first token on."""
    first = mask.ne(0).long().argmax(1, keepdim=True)
    return (torch.arange(mask.shape[1], device=mask.device) - first).clamp_min(0)
