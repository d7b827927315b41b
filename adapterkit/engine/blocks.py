"""A whole block whose output is a point: it runs where an adapter asks for its base, and not where none does."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any

import torch
from torch import Tensor

from adapterkit.engine.bases import SublayerBase
from adapterkit.errors import AttachError

ALONE = 0
"""Number of a tuple's entries where a block returns its stream alone."""


class BlockBase(SublayerBase):
    """The base at a block's output.

    Args:
        x: The residual stream before it.
        run: Runs the block, and gives all that it returns.
        beside: What else `SublayerBase` is given.
    """

    def __init__(self, x: Tensor, run: Callable[[], Any], *beside: Any) -> None:
        super().__init__(x, x, *beside)
        self._run, self._ran = run, False
        self._result: Any = None

    def __call__(self, x: Tensor, /) -> Tensor:
        super().__call__(x)
        if not self._ran:
            self._result, self._ran = self._run(), True
        return self._result[0] if isinstance(self._result, tuple) else self._result

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
