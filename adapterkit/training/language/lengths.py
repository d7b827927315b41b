"""Examples that are longer than a model is to read: split, cut or left out, and told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Literal

from adapterkit.training.language.tokens import Encoded

Stretch = tuple[int, int]
TooLong = Literal["split", "cut", "leave out"]


class Fitting:
    """Makes examples fit.

    Args:
        limit: Tokens of an example.
        too_long: What becomes of longer ones; None splits documents, and cuts conversations at their end.
    """

    def __init__(self, limit: int, too_long: TooLong | None = None) -> None:
        self.limit, self.too_long = limit, too_long
        self.counts: Counter[str] = Counter()

    def __call__(self, length: int, part: Callable[[int, int], Encoded], *, whole: bool = False) -> list[Stretch]:
        """Which stretches of an example are kept: of at most `limit` tokens, each with something to learn.

        Args:
            length: Its tokens.
            part: Reads a stretch of it.
            whole: Whether it is a document.
        """
        if length <= self.limit:
            return [(0, length)] if self._teaches(part(0, length), "left out, nothing to learn in them") else []
        way = self.too_long or ("split" if whole else "cut")
        if way == "leave out":
            self.counts[f"left out, longer than {self.limit} tokens"] += 1
            return []
        if way == "cut":
            otherwise = f"left out, nothing to learn in the first {self.limit} tokens"
            if not self._teaches(part(0, self.limit), otherwise):
                return []
            self.counts[f"cut after {self.limit} tokens"] += 1
            return [(0, self.limit)]
        self.counts[f"split, longer than {self.limit} tokens"] += 1
        parts = ((start, min(start + self.limit, length)) for start in range(0, length, self.limit))
        return [one for one in parts if part(*one).teaches]

    def notes(self, total: int) -> list[str]:
        """A sentence for each thing that was done, of that many examples."""
        return [f"{what}: {count} of {total} examples" for what, count in self.counts.items()]

    def _teaches(self, one: Encoded, otherwise: str) -> bool:
        if not one.teaches:
            self.counts[otherwise] += 1
        return one.teaches
