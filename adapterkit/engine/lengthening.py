"""How the active adapters of one point make a sequence longer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from adapterkit.backend import Positions
from adapterkit.engine.context import Beside, Side
from adapterkit.errors import AttachError
from adapterkit.kernels.batches import Share
from adapterkit.kernels.sums import Acting, Active, Strength


class Gathered:
    """What active adapters put to a sequence: see `adapterkit.backend.Positions`.

    Args:
        active: Theirs.
        side: The side inputs.
        told: Is told the length of the sequence, and how many positions are added.
    """

    def __init__(self, active: Active, side: Side, told: Callable[[int, int], None] | None = None) -> None:
        self._active, self._side, self._told = active, side, told
        self.padded = any(_has(one, "padded") for one, _ in active)
        self.pooled = any(_has(one, "pooled") for one, _ in active)

    def __call__(self, tokens: Tensor, /) -> tuple[Tensor, Tensor | None]:
        """See `adapterkit.backend.Positions`."""
        added, visible = gathered(self._active, self._side, tokens)
        if self._told is not None:
            self._told(tokens.shape[1], added.shape[1])
        return added, visible


def counts_of(acting: Sequence[object]) -> tuple[int, bool] | None:
    """How many positions in front of keys count for tokens, and whether padding does; None where nothing acts."""
    if not acting:
        return None
    return max(int(_has(one, "front") or 0) for one in acting), any(_has(one, "padded") for one in acting)


def _has(acting: object, name: str) -> Any:
    return getattr(getattr(acting, "module", acting), name, None)


def gathered(active: Active, side: Side, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
    """What active adapters put to a sequence, one behind the other; see `adapterkit.backend.Positions`."""
    parts: list[Tensor] = []
    visible: list[Tensor] = []
    for adapter, weight in _each_once(active):
        given = (Beside(tokens, side),) if "lengthen" in adapter.abilities.beside else ()
        part = adapter.lengthen(tokens, *given)  # type: ignore[call-arg]
        parts.append(part if part.ndim == 3 else part.expand(len(tokens), *part.shape))
        rows = weight.rows(tokens) if isinstance(weight, Share) else tokens.new_ones(len(tokens))
        visible.append((rows != 0)[:, None].expand(-1, part.shape[-2]))
    routed = any(isinstance(weight, Share) for _, weight in active)
    return torch.cat(parts, dim=1), torch.cat(visible, dim=1) if routed else None


def _each_once(active: Active) -> Active:
    """An adapter that is in several expressions, as routes may be, stands in the sequence once."""
    found: dict[int, tuple[Acting, Strength]] = {}
    for adapter, weight in active:
        _, before = found.get(id(adapter), (adapter, 0.0))
        found[id(adapter)] = (adapter, weight + before)  # type: ignore[operator]
    return [*found.values()]


def with_behind(
    forward: Callable[..., Any], positions: Positions, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    """What a module returns, and the adapters' positions behind it."""
    tokens = forward(*args, **kwargs)
    if not isinstance(tokens, Tensor) or tokens.ndim != 3:
        told = f"a tensor {tuple(tokens.shape)}" if isinstance(tokens, Tensor) else type(tokens).__name__
        raise AttachError(f"a sequence [batch, length, features] was expected to be made longer, but there is {told}")
    return torch.cat([tokens, positions(tokens)[0].to(tokens.dtype)], dim=1)
