"""New tokens in a tokenizer of transformers."""

from __future__ import annotations

from adapterkit import Adapters
from adapterkit.errors import ConfigError
from adapterkit_textual_inversion.inversion import TextualInversion
from adapterkit_textual_inversion.vocabulary import Tokenizer


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
    return dict(config.teach(modules, tokenizer))


def _check_others(adapters: Adapters, name: str, tokens: list[str]) -> None:
    for other in adapters:
        config = adapters.config(other)
        theirs = set(config.placeholders) if isinstance(config, TextualInversion) and other != name else set()
        if shared := [token for token in tokens if token in theirs]:
            told = f"{shared[0]!r} is a token of {other!r} too; remove one of them, or train it with another string"
            raise ConfigError([told], "add_tokens()")
