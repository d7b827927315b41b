"""Words that adapters bring: tokens that the pipeline's tokenizers do not have."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping

from torch import nn

from adapterkit.adapter import AdapterModule
from adapterkit.config import AdapterConfig
from adapterkit.errors import AttachError
from adapterkit.handle.adapters import Adapters
from adapterkit.training.diffusion.recipe import Recipe


class Words:
    """Writes texts for those adapters that act now.

    Args:
        recipe: Knows the tokenizers.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._known: set[str] = set()
        self._taught: weakref.WeakSet[AdapterModule] = weakref.WeakSet()

    def __call__(self, text: str) -> str:
        """The text with the words of adapters that act, and without those of others, which would have no vectors."""
        try:
            adapters = Adapters(self.recipe.pipe)
        except AttachError:  # another library has put layers of its own there, and nothing of ours acts
            return self._without(text, self._known)
        acting = {name for name in adapters.active if isinstance(name, str)}
        configs = {name: adapters.config(name) for name in acting}
        text = self._without(text, self._known - {word for config in configs.values() for word in config.words})
        for name, config in configs.items():
            if config.words:
                self._teach(config, adapters.modules(name), adapters)
                text = config.written(text)
        return text

    @staticmethod
    def _without(text: str, words: Iterable[str]) -> str:
        for word in sorted(words, key=len, reverse=True):
            text = " ".join(text.replace(word, " ").split())
        return text

    def _teach(self, config: AdapterConfig, modules: Mapping[str, AdapterModule], adapters: Adapters) -> None:
        """Once for all modules; a checkpoint or a file brings new ones."""
        if all(module in self._taught for module in modules.values()):
            return
        components = {point.id: point.component for point in adapters.points()}
        for component, tokenizer in self.recipe.readers().items():
            own = {point: module for point, module in modules.items() if components[point] == component}
            if own:
                config.teach(own, tokenizer)
                _end_texts(self.recipe.text_parts()[component], tokenizer.eos_token_id)
        self._known |= {*config.words}
        self._taught |= weakref.WeakSet(modules.values())


def _end_texts(encoder: nn.Module, end: int) -> None:
    """Tells CLIP which token ends a text: with the 2 of early configs it takes the largest, and so a new word."""
    for module in encoder.modules():
        if vars(module).get("eos_token_id") == 2:
            module.eos_token_id = end  # type: ignore[assignment]
