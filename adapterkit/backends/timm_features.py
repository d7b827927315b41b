"""What readers of timm's features see where a prompt stands behind the tokens: the tokens."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor


def forward_intermediates(
    model: Any,
    read: Callable[..., Any],
    lengths: Callable[[], tuple[int, int]],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """What `model.forward_intermediates` returns, as tokens first, of which maps are made when the prompt is off them.

    Args:
        model: timm's VisionTransformer.
        read: The method.
        lengths: See `adapterkit.backend.Reading`.
        args, kwargs: Its arguments.
    """
    given = {**dict(zip(inspect.signature(read).parameters, args, strict=False)), **kwargs}
    wanted = given.get("output_fmt", "NCHW")
    found = read(**{**given, "output_fmt": "NLC"} if wanted == "NCHW" else given)
    size = model.patch_embed.dynamic_feat_size(tuple(given["x"].shape[-2:])) if wanted == "NCHW" else None

    def taken(feature: Any) -> Any:
        if isinstance(feature, tuple):  # with its class and register tokens
            return (taken(feature[0]), *feature[1:])
        length, added = lengths()
        longer = feature.shape[1] == length - model.num_prefix_tokens  # what the last norm saw is not
        return _shaped(feature[:, : feature.shape[1] - added] if longer else feature, size)

    if isinstance(found, dict):
        return {**found, "image_intermediates": [taken(one) for one in found["image_intermediates"]]}
    return (found[0], [taken(one) for one in found[1]]) if isinstance(found, tuple) else [taken(one) for one in found]


def _shaped(feature: Tensor, size: tuple[int, int] | None) -> Tensor:
    """[rows, tokens, features] as a map [rows, features, height, width], where a size is given."""
    return feature if size is None else feature.unflatten(1, size).permute(0, 3, 1, 2).contiguous()
