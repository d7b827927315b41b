"""How a model of transformers is told that its head is no longer its embedding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def untying(model: nn.Module, names: Sequence[Sequence[str]]) -> Callable[[], None] | None:
    """See `Backend.untying`. A config says at once of all ties of its model that there are none.

    So a model that keeps one of them cannot be told (an encoder and a decoder with one embedding), nor can one whose
    config forgets it (T5).
    """
    groups = [frozenset(group) for group in names]
    apart: list[Any] = []
    told: set[str] = set()
    for part, pairs in _tied(model):
        parted = [pair for pair in pairs if any(pair <= group for group in groups)]
        if parted and len(parted) < len(pairs):
            return None
        if parted:
            apart.append(part)
            told |= frozenset().union(*parted)
    if not frozenset().union(*groups) <= told or not all(_remembers(part.config) for part in apart):
        return None

    def tell() -> None:
        for part in apart:
            part.config.tie_word_embeddings = False
        for part, _ in [*_tied(model)]:
            part.all_tied_weights_keys = part.get_expanded_tied_weights_keys(all_submodels=True)

    return tell


def _tied(model: nn.Module) -> Iterator[tuple[Any, list[frozenset[str]]]]:
    """Every model in a model that knows of ties, with the names of each pair, as the outer model has them."""
    for path, part in model.named_modules():
        expanded: Any = getattr(part, "get_expanded_tied_weights_keys", None)  # since transformers 5
        if expanded is not None:
            prefix = f"{path}." if path else ""
            yield part, [frozenset((prefix + one, prefix + other)) for one, other in expanded().items()]


def _remembers(config: Any) -> bool:
    """Whether a config that is read back says what it was told."""
    return type(config).from_dict({**config.to_dict(), "tie_word_embeddings": False}).tie_word_embeddings is False
