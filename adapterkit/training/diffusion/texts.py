"""What the denoiser is told about captions: computed once where the adapter leaves the text encoders alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from adapterkit.training.diffusion.conditioning import Conditioning, joined
from adapterkit.training.diffusion.recipe import Recipe
from adapterkit.training.pictures.embeddings import Embeddings
from adapterkit.training.pictures.store import MemoryStore, Store

_KEPT = 1024  # captions whose embeddings are in memory: of a long text up to a megabyte each


class Texts:
    """Captions to what the denoiser is told.

    Args:
        recipe: How captions are read.
        words: Writes them, where adapters have words of their own.
        device: Where the encoders are.
        live: Whether they change, so that nothing is kept.
        store: Keeps what they make of captions; by default memory.
        model: Says which encoders they are, where others share the store.
        reading: Gives a block in which the encoders are on the device.
    """

    def __init__(
        self,
        recipe: Recipe,
        words: Callable[[Sequence[str]], list[str]],
        device: torch.device,
        live: bool,
        store: Store | None = None,
        model: str = "",
        reading: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self.recipe, self.words, self.device, self.live, self.reading = recipe, words, device, live, reading
        self.kept = Embeddings(store or MemoryStore(_KEPT), model, self.encoded)

    def __call__(self, texts: Sequence[str]) -> Conditioning:
        """Of several captions, as one batch."""
        if self.live:
            return self.recipe.encode_text(self.words(texts), self.device)
        told = joined([self.kept(text) for text in texts])
        return {name: tensor.to(self.device) for name, tensor in told.items()}

    def prepare(self, texts: Sequence[str], tell: Callable[[str], object]) -> bool:
        """Encodes these captions now, where all can be kept; whether they were."""
        if isinstance(self.kept.store, MemoryStore) and len(texts) > _KEPT:
            return False
        self.kept.prepare(texts, tell)
        return True

    @torch.no_grad()
    def encoded(self, text: str) -> Conditioning:
        """Of one caption, in the encoders' own dtype."""
        with self.reading(), torch.autocast(self.device.type, enabled=False):
            return self.recipe.encode_text([text], self.device)
