"""New tokens in a tokenizer of transformers."""

from __future__ import annotations

from typing import Protocol, cast

import torch

from adapterkit import Adapters
from adapterkit.errors import ConfigError
from adapterkit_textual_inversion.inversion import TextualInversion


class Tokenizer(Protocol):
    """What is asked of a tokenizer; all of transformers have it."""

    @property
    def all_special_tokens(self) -> list[str]: ...

    def get_vocab(self) -> dict[str, int]: ...

    def get_added_vocab(self) -> dict[str, int]: ...

    def add_tokens(self, new_tokens: list[str], /) -> int: ...


def add_tokens(adapters: Adapters, name: str, tokenizer: Tokenizer, *, component: str | None = None) -> dict[str, int]:
    """Puts an adapter's strings into a tokenizer, and tells the adapter their ids. A second time changes nothing.

    Call it after `add` and after `load`: other tokens may have the ids that a file was written with.

    Args:
        adapters: The model's.
        name: The adapter, a `TextualInversion`.
        tokenizer: Of the model, or of one of its components.
        component: The component that the tokenizer is for, such as `text_encoder_2`; all of them by default.

    Returns:
        Token -> id, for every vector.

    Raises:
        ConfigError: A string is a token already that means something else; or has another id than the config says. The
            tokenizer is left as it was.
    """
    config = adapters.config(name)
    if not isinstance(config, TextualInversion):
        raise ConfigError([f"{name!r} is a {type(config).__name__}, not a TextualInversion"], "add_tokens()")
    components = {point.id: point.component for point in adapters.points()}
    modules = {key: one for key, one in adapters.modules(name).items() if component in (None, components[key])}
    if not modules:
        raise ConfigError([f"{name!r} has no tokens in {component!r}"], "add_tokens()")
    tokens = config.placeholders
    _check_others(adapters, name, tokens)
    ids = _added(tokenizer, tokens, config.ids)
    for module in modules.values():
        cast("torch.Tensor", module.ids).copy_(torch.tensor([ids[token] for token in tokens]))
    return ids


def _check_others(adapters: Adapters, name: str, tokens: list[str]) -> None:
    for other in adapters:
        config = adapters.config(other)
        theirs = set(config.placeholders) if isinstance(config, TextualInversion) and other != name else set()
        if shared := [token for token in tokens if token in theirs]:
            told = f"{shared[0]!r} is a token of {other!r} too; remove one of them, or train it with another string"
            raise ConfigError([told], "add_tokens()")


def _added(tokenizer: Tokenizer, tokens: list[str], expected: tuple[int, ...] | None) -> dict[str, int]:
    """The tokens' ids in the tokenizer, which has them afterwards."""
    vocabulary, added = tokenizer.get_vocab(), tokenizer.get_added_vocab()
    special = set(tokenizer.all_special_tokens)
    taken = [token for token in tokens if token in vocabulary and (token not in added or token in special)]
    if taken:
        told = f"{taken[0]!r} is a token of the tokenizer's own ({vocabulary[taken[0]]}); choose another string"
        raise ConfigError([told], "add_tokens()")
    fresh = [token for token in tokens if token not in vocabulary]
    first = max(vocabulary.values(), default=-1) + 1
    ids = {**added, **{token: first + i for i, token in enumerate(fresh)}}
    wrong = [(token, i) for token, i in zip(tokens, expected or (), strict=False) if ids[token] != i]
    if wrong:
        told = f"{wrong[0][0]!r} is {ids[wrong[0][0]]} in this tokenizer, and the config says {wrong[0][1]}"
        raise ConfigError([told], "add_tokens()")
    if fresh:
        tokenizer.add_tokens(fresh)
    found = tokenizer.get_vocab()
    return {token: found[token] for token in tokens}
