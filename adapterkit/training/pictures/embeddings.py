"""What a model is told about captions, computed once for each, and kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from adapterkit.training.pictures.store import Store, Tensors, key_of, make

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
        key = self._key(caption)
        found = self.store.get(key)
        if found is None:
            found = self._made(caption)
            self.store.put(key, found)
        return found

    def prepare(self, captions: Sequence[str], tell: Callable[[str], object]) -> None:
        """Sees to it that all are there."""
        keys = [self._key(caption) for caption in captions]
        make(self.store, "captions", keys, lambda number: self._made(captions[number]), tell)

    def _key(self, caption: str) -> str:
        return key_of(_VERSION, self.model, caption)

    def _made(self, caption: str) -> Tensors:
        return {name: tensor.detach().cpu() for name, tensor in self.encode(caption).items()}
