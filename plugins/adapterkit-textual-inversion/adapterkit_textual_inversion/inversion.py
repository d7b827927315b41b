"""Textual inversion: new tokens, whose vectors an embedding looks up here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapterkit import AdapterConfig, AdapterModule, InjectionPoint
from adapterkit.adapter import Base
from adapterkit.points import Kind
from adapterkit_textual_inversion.vocabulary import Tokenizer, added

_MAX_TOKENS = _MAX_VECTORS = 2**12


class NewTokens(AdapterModule):
    """Vectors of its own for some ids; the embedding and its other adapters never see those.

    Args:
        width: Of a vector.
        ids: The tokens'. They are kept with the vectors, as the buffer `ids`.
        scale: What the embedding's rows are multiplied with.
        start: Tokens of the base from whose vectors these start, over and over; none means the mean of all.
    """

    scalable = False
    outermost = True

    def __init__(self, width: int, ids: Sequence[int], scale: float = 1.0, start: Sequence[int] = ()) -> None:
        super().__init__()
        self.scale, self.start = scale, tuple(start)
        self.values = nn.Parameter(torch.zeros(len(ids), width))
        self.register_buffer("ids", torch.tensor(ids))

    def initialise(self, weight: Tensor, bias: Tensor | None) -> None:
        """See `AdapterModule.initialise`: rows of the embedding, or their mean."""
        if not self.start:
            self.values.copy_(weight.mean(1).expand_as(self.values))
            return
        places = torch.arange(len(self.values)) % len(self.start)
        self.values.copy_(weight.mT[torch.tensor(self.start)[places].to(weight.device)])

    def forward(self, x: Tensor, base: Base) -> Tensor:
        ids = cast("Tensor", self.ids)
        matches = x[..., None] == ids
        mine = matches.any(-1)
        y = base(x.masked_fill(mine, 0))
        rows = F.embedding(matches.int().argmax(-1), self.values.to(y.dtype)) * self.scale
        return torch.where(mine[..., None], rows, y)


@dataclass(frozen=True)
class TextualInversion(AdapterConfig):
    """Vectors for new tokens, which are all that trains (Gal et al. 2022, arXiv:2208.01618, eq. 2).

    The embedding keeps its size and its bits: ids behind its last row, or rows that its tokenizer does not use, are
    looked up here. `adapterkit_textual_inversion.tokens.add_tokens` puts the strings into a tokenizer. With a LoRA
    beside it in one file it is pivotal tuning. Logits of the new tokens there are none.

    Attributes:
        targets: Token embeddings.
        tokens: The strings.
        vectors: Vectors of each string: tokens `<cat>`, `<cat>#1`, `<cat>#2`, ...
        init_ids: Tokens of the base, such as those of a word, from whose vectors these start; by default from the mean.
        ids: Theirs, one after the other for each string; by default those behind the embedding's last row, until a
            tokenizer says others.
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset({"weight"})
    forms: ClassVar[frozenset[str] | None] = frozenset({"embedding"})
    targets: str = "embed.tokens"
    tokens: tuple[str, ...] = ("<new>",)
    vectors: int = 1
    init_ids: tuple[int, ...] | None = None
    ids: tuple[int, ...] | None = None

    @property
    def neutral(self) -> bool:  # type: ignore[override]
        """Whether its ids are behind the vocabulary."""
        return self.ids is None

    @property
    def placeholders(self) -> list[str]:
        """The tokens of all vectors, in order. With `_1` diffusers' pipelines would write them a second time."""
        return [token if i == 0 else f"{token}#{i}" for token in self.tokens for i in range(self.vectors)]

    @property
    def words(self) -> Sequence[str]:
        """The same: tokens that are its own."""
        return self.placeholders

    def teach(self, modules: Mapping[str, AdapterModule], tokenizer: Tokenizer) -> dict[str, int]:
        """See `AdapterConfig.teach`.

        Returns:
            Token -> id, for every vector.
        """
        ids = added(tokenizer, self.placeholders, self.ids)
        for module in modules.values():
            cast("Tensor", module.ids).copy_(torch.tensor([ids[token] for token in self.placeholders]))
        return ids

    def written(self, text: str) -> str:
        """A text in which each string stands for all its vectors: `a <cat>` is `a <cat> <cat>#1`."""
        for token in sorted(self.tokens, key=len, reverse=True):
            text = text.replace(token, " ".join([token, *(f"{token}#{i}" for i in range(1, self.vectors))]))
        return text

    def problems(self) -> list[str]:
        found = []
        if not _distinct(self.tokens, str) or any(not t or t != "".join(t.split()) for t in self.tokens):
            return [f"tokens must be a tuple of different strings without spaces, not {str(self.tokens)[:80]}"]
        if not 1 <= self.vectors <= _MAX_VECTORS or not 1 <= len(self.tokens) <= _MAX_TOKENS:
            return [f"vectors must be from 1 to {_MAX_VECTORS}, not {self.vectors!r}"]
        if len(set(self.placeholders)) < len(self.placeholders):
            found.append(f"tokens: two vectors would be named alike among {', '.join(self.placeholders)[:80]}")
        for name in ("ids", "init_ids"):
            ids = getattr(self, name)
            if ids is not None and (not _distinct(ids, int) or min(ids) < 0):
                found.append(f"{name} must be None or a tuple of different whole numbers from 0, not {str(ids)[:80]}")
        if not found and self.ids is not None and len(self.ids) != len(self.placeholders):
            found.append(f"ids must be {len(self.placeholders)}, one for each vector, not {len(self.ids)}")
        return found

    def accepts(self, point: InjectionPoint) -> str | None:
        if point.is_read:
            return "the model reads this embedding instead of calling it, and new ids have no row there"
        if self.init_ids is not None and max(self.init_ids) >= point.in_features:
            return f"it has {point.in_features} rows, and init_ids names {max(self.init_ids)}"
        return super().accepts(point)

    def build(self, point: InjectionPoint) -> NewTokens:
        first = point.in_features
        ids = self.ids if self.ids is not None else range(first, first + len(self.placeholders))
        return NewTokens(point.out_features, list(ids), point.layout.scale, self.init_ids or ())  # type: ignore[union-attr]


def _distinct(values: object, kind: type) -> bool:
    """Whether it is a tuple of different values of this very type, at least one."""
    return isinstance(values, tuple) and 0 < len(set(values)) == len(values) and all(type(v) is kind for v in values)
