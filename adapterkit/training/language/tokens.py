"""From text to tokens, with which of them are learnt."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from adapterkit.errors import ConfigError
from adapterkit.training.language.conversations import Rendered, Span

_AT_ONCE = 256
_CHARACTERS = 1 << 18  # after which a portion is full, too
Learn = Literal["completions", "last", "everything"]


@dataclass(frozen=True)
class Encoded:
    """One example.

    Attributes:
        tokens: [tokens], int32.
        learnt: Which of them the loss is about: [tokens], boolean.
        whole: See `Rendered`.
    """

    tokens: Tensor
    learnt: Tensor
    whole: bool = False

    def __len__(self) -> int:
        return len(self.tokens)

    def part(self, start: int, end: int) -> Encoded:
        """A stretch of it."""
        return Encoded(self.tokens[start:end], self.learnt[start:end], self.whole)

    @property
    def teaches(self) -> bool:
        """Whether a token is learnt that has one before it."""
        return bool(self.learnt[1:].any())


class Encoder:
    """Tokenizes.

    Args:
        tokenizer: Of transformers; where only parts are learnt, one that tells where in the text a token is.
        learn: Which tokens the loss is about: those that are to be learnt, or prompts too.
    """

    def __init__(self, tokenizer: Any, learn: Learn = "completions") -> None:
        self.tokenizer, self.learn, self.everything = tokenizer, learn, learn == "everything"
        self.shared = 0
        """Answers whose first characters are in one token with what stands before them; that one is not learnt."""

    def __call__(self, texts: Iterable[Rendered]) -> Iterator[Encoded]:
        """The examples of the texts, in their order.

        Raises:
            ConfigError: The tokenizer does not tell where its tokens are, and only parts of a text are learnt.
        """
        for some in _portions(texts):
            partly = not all(self.everything or _all_of(one) for one in some)
            if partly and not self.tokenizer.is_fast:
                raise ConfigError(
                    [
                        f"model: the tokenizer {type(self.tokenizer).__name__} does not tell where in the text its "
                        "tokens are, so that prompts cannot be left out of the loss; set options.learn=everything, or "
                        "save its fast form (tokenizer.json) beside the model"
                    ],
                    "run",
                )
            beside = self.tokenizer.is_fast and any(one.before or one.after for one in some)
            found = self.tokenizer(
                [f"{one.before}{one.text}{one.after}" if beside else one.text for one in some],
                add_special_tokens=False,
                return_offsets_mapping=partly or beside,
                verbose=False,
            )
            for number, one in enumerate(some):
                tokens = found["input_ids"][number]
                if beside and (one.before or one.after):
                    tokens = _own(tokens, found["offset_mapping"][number], one)
                offsets = found["offset_mapping"][number] if partly and not (self.everything or _all_of(one)) else None
                yield self._encoded(tokens, one, offsets)

    def _encoded(self, tokens: list[int], one: Rendered, offsets: Sequence[Span] | None) -> Encoded:
        learnt = [True] * len(tokens) if offsets is None else self._learnt(offsets, one.learnt)
        if one.framed:
            begin = [] if one.before else begin_marks(self.tokenizer)
            end = [] if one.after else end_marks(self.tokenizer)
            tokens, learnt = [*begin, *tokens, *end], [*([False] * len(begin)), *learnt, *([True] * len(end))]
        return Encoded(torch.tensor(tokens, dtype=torch.int32), torch.tensor(learnt, dtype=torch.bool), one.whole)

    def _learnt(self, offsets: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
        starts = [start for start, _ in spans]
        learnt = []
        for start, end in offsets:
            place = bisect.bisect_right(starts, start) - 1
            learnt.append(place >= 0 and end <= spans[place][1])
            after = place + 1
            self.shared += after < len(spans) and not learnt[-1] and start < starts[after] < end
        return learnt


def forget_calls(tokenizer: Any) -> None:
    """Has a fast tokenizer forget how the last call cut and filled texts, which it would write into its file."""
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()


def begin_marks(tokenizer: Any) -> list[int]:
    """What the tokenizer itself puts before a text: its mark of the beginning, where it has one."""
    begin = tokenizer.bos_token_id
    return [begin] if begin is not None and tokenizer("")["input_ids"][:1] == [begin] else []


def end_marks(tokenizer: Any) -> list[int]:
    """What ends a text, where the tokenizer has it."""
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _own(tokens: Sequence[int], offsets: Sequence[Span], part: Rendered) -> list[int]:
    """Of a part of a text with what is beside it, the tokens that begin in the part."""
    first = len(part.before)
    last = first + len(part.text)
    return [token for token, (start, _) in zip(tokens, offsets, strict=True) if first <= start < last]


def _all_of(one: Rendered) -> bool:
    return list(one.learnt) == [(0, len(one.text))]


def _portions(texts: Iterable[Rendered]) -> Iterator[list[Rendered]]:
    some: list[Rendered] = []
    for one in texts:
        some.append(one)
        if len(some) == _AT_ONCE or sum(len(text.text) for text in some) > _CHARACTERS:
            yield some
            some = []
    if some:
        yield some
