"""Examples that are longer than a model is to read: split, cut or left out, and told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal

from adapterkit.training.language.tokens import Encoded

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

    def __call__(self, examples: Sequence[Encoded]) -> list[Encoded]:
        """Examples of at most `limit` tokens, each with something to learn."""
        return [part for one in examples for part in self._fit(one)]

    def notes(self, total: int) -> list[str]:
        """A sentence for each thing that was done, of that many examples."""
        return [f"{what}: {count} of {total} examples" for what, count in self.counts.items()]

    def _fit(self, one: Encoded) -> list[Encoded]:
        if len(one) <= self.limit:
            return [one] if self._teaches(one, "left out, nothing to learn in them") else []
        way = self.too_long or ("split" if one.whole else "cut")
        if way == "leave out":
            self.counts[f"left out, longer than {self.limit} tokens"] += 1
            return []
        if way == "cut":
            cut = one.part(0, self.limit)
            if not self._teaches(cut, f"left out, nothing to learn in the first {self.limit} tokens"):
                return []
            self.counts[f"cut after {self.limit} tokens"] += 1
            return [cut]
        self.counts[f"split, longer than {self.limit} tokens"] += 1
        parts = (one.part(start, start + self.limit) for start in range(0, len(one), self.limit))
        return [part for part in parts if part.teaches]

    def _teaches(self, one: Encoded, otherwise: str) -> bool:
        if not one.teaches:
            self.counts[otherwise] += 1
        return one.teaches
