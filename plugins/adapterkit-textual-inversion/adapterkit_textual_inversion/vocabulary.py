"""Strings and their ids in a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from adapterkit.errors import ConfigError


class Tokenizer(Protocol):
    """What is asked of a tokenizer; all of transformers have it."""

    @property
    def all_special_tokens(self) -> list[str]: ...

    def get_vocab(self) -> dict[str, int]: ...

    def get_added_vocab(self) -> dict[str, int]: ...

    def add_tokens(self, new_tokens: list[str], /) -> int: ...


def added(tokenizer: Tokenizer, tokens: Sequence[str], expected: Sequence[int] | None) -> dict[str, int]:
    """The tokens' ids in the tokenizer, which has them afterwards.

    Args:
        tokenizer: Left as it was where anything is wrong.
        tokens: The strings.
        expected: Their ids, where they are known.

    Raises:
        ConfigError: A string is a token already that means something else; or has another id than is expected.
    """
    vocabulary, there = tokenizer.get_vocab(), tokenizer.get_added_vocab()
    special = set(tokenizer.all_special_tokens)
    taken = [token for token in tokens if token in vocabulary and (token not in there or token in special)]
    if taken:
        told = f"{taken[0]!r} is a token of the tokenizer's own ({vocabulary[taken[0]]}); choose another string"
        raise ConfigError([told], "add_tokens()")
    fresh = [token for token in tokens if token not in vocabulary]
    first = max(vocabulary.values(), default=-1) + 1
    ids = {**there, **{token: first + i for i, token in enumerate(fresh)}}
    wrong = [(token, i) for token, i in zip(tokens, expected or (), strict=False) if ids[token] != i]
    if wrong:
        told = f"{wrong[0][0]!r} is {ids[wrong[0][0]]} in this tokenizer, and the config says {wrong[0][1]}"
        raise ConfigError([told], "add_tokens()")
    if fresh:
        tokenizer.add_tokens(fresh)
    found = tokenizer.get_vocab()
    return {token: found[token] for token in tokens}
