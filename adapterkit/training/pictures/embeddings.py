"""What a model is told about captions, computed once for each, and kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from adapterkit.training.pictures.store import Store, Tensors, key_of

_VERSION = 1  # of what an entry holds


class Embeddings:
    """What a model makes of captions.

    Args:
        store: Keeps them.
        model: Says which model encodes, see `identity_of`, and with which settings.
        encode: A caption to tensors [1, ...] by name.
    """

    def __init__(self, store: Store, model: str, encode: Callable[[str], Tensors]) -> None:
        self.store, self.model, self.encode = store, model, encode

    def __call__(self, caption: str) -> Tensors:
        """The caption's tensors, on the CPU."""
        key = key_of(_VERSION, self.model, caption)
        found = self.store.get(key)
        if found is None:
            found = {name: tensor.detach().cpu() for name, tensor in self.encode(caption).items()}
            self.store.put(key, found)
        return found

    def prepare(self, captions: Iterable[str]) -> None:
        """Sees to it that all are there."""
        for caption in captions:
            self(caption)
