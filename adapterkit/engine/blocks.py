"""A whole block whose output is a point: it runs where an adapter asks for its base, and not where none does.

What it is told of its sequence tells adapters which tokens are there.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adapterkit.engine.bases import SublayerBase
from adapterkit.errors import AttachError
from adapterkit.kernels.packed_documents import Documents, by_lengths, by_mask, by_positions
from adapterkit.mapping.everywhere import MASKS

ALONE = 0
"""Number of a tuple's entries where a block returns its stream alone."""


def _untold() -> None:
    """Each row is one document."""


class BlockBase(SublayerBase):
    """The base at a block's output.

    Args:
        x: The residual stream before it.
        run: Runs the block, and gives all that it returns.
        beside: What else `SublayerBase` is given.
        told: Tells which tokens are there.
    """

    def __init__(
        self, x: Tensor, run: Callable[[], Any], *beside: Any, told: Callable[[], Documents | None] = _untold
    ) -> None:
        super().__init__(x, x, *beside)
        self._run, self._ran, self._told = run, False, told
        self._result: Any = None

    def __call__(self, x: Tensor, /) -> Tensor:
        super().__call__(x)
        if not self._ran:
            self._result, self._ran = self._run(), True
        return self._result[0] if isinstance(self._result, tuple) else self._result

    @property
    def documents(self) -> Documents | None:
        """See `adapterkit.contract.base.Sublayer.documents`."""
        return self._told()

    def returned(self, y: Tensor, entries: MutableMapping[str, int], key: str) -> Any:
        """What the block is to return where its stream is `y`.

        A block that was left out is run once in its life, to see what it returns.

        Args:
            y: The stream after it.
            entries: Point id -> how many entries its block returns.
            key: The point's id.

        Raises:
            AttachError: It was left out, and returns more than its stream.
        """
        result = self._result
        if self._ran:
            return (y, *result[1:]) if isinstance(result, tuple) else y
        if key not in entries:
            with torch.no_grad():
                seen = self._run()
            entries[key] = len(seen) if isinstance(seen, tuple) else ALONE
        if entries[key] > 1:
            raise AttachError(f"the block at {key} returns {entries[key]} values, so it cannot be left out")
        return y if entries[key] == ALONE else (y,)


def argument_names(block: type[nn.Module]) -> Sequence[str]:
    """The names of what a block's forward takes."""
    return [*inspect.signature(block.forward).parameters][1:]


def documents_told(
    block: nn.Module, names: Sequence[str], args: Sequence[Any], kwargs: dict[str, Any], x: Tensor, *, hides: bool
) -> Documents | None:
    """What a block is told of the tokens of x [rows, length, features]; None where each row is one document, unpadded.

    Args:
        block: The block.
        names: See `argument_names`.
        args, kwargs: Its arguments.
        x: Its first one.
        hides: See `adapterkit.backend.Reach`.
    """
    length = x.shape[1] if x.ndim == 3 else 1
    if length == 1:
        return None
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    mask = next((given[name] for name in MASKS if isinstance(given.get(name), Tensor)), None)
    if mask is not None:
        return by_mask(mask, length, hides=hides)
    lengths, positions = given.get("cu_seq_lens_q"), given.get("position_ids")
    if isinstance(lengths, Tensor):
        return by_lengths(lengths, length)
    if isinstance(positions, Tensor) and positions.ndim == 2 and _by_positions(block):
        return by_positions(positions)
    return None


def _by_positions(block: nn.Module) -> bool:
    """Whether its attention has no mask for documents: flash attention finds them by their positions."""
    config = next((found for part in block.modules() if (found := getattr(part, "config", None)) is not None), None)
    return str(getattr(config, "_attn_implementation", "")).startswith("flash")
