"""Positions that are counted from each row's own first token, whatever padding stands before it."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn


def own_positions(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """For models whose own tokens know distances alone (rotary embeddings), beside which something stands without one.

    Where positions are not told, transformers counts padding too. That turns queries against what has no position.
    """
    names = [*inspect.signature(type(module).forward).parameters][1:]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    mask, x = given.get("attention_mask"), given.get("input_ids")
    x = given.get("inputs_embeds") if x is None else x
    if given.get("position_ids") is not None or not isinstance(mask, Tensor) or mask.ndim != 2 or x is None:
        return args, kwargs
    first = mask.ne(0).long().argmax(1, keepdim=True)
    given["position_ids"] = (torch.arange(mask.shape[1], device=mask.device) - first).clamp_min(0)[:, -x.shape[1] :]
    return (), given
