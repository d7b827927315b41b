"""Words that adapters bring: tokens that the pipeline's tokenizers do not have."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence

from torch import nn

from adapterkit.adapter import AdapterModule
from adapterkit.contract.config import AdapterConfig
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

    def __call__(self, texts: Sequence[str]) -> list[str]:
        """The texts with the words of adapters that act, and without those of others, which would have no vectors."""
        configs = self._acting()
        own = {word for config in configs for word in config.words}
        for word in sorted(self._known - own, key=len, reverse=True):
            texts = [" ".join(text.replace(word, " ").split()) for text in texts]
        for config in configs:
            texts = [config.written(text) for text in texts]
        return [*texts]

    def _acting(self) -> list[AdapterConfig]:
        """The configs of those that act and have words, which the tokenizers know now."""
        try:
            adapters = Adapters(self.recipe.pipe)
        except AttachError:  # another library has put layers of its own there, and nothing of ours acts
            return []
        acting = {name: adapters.config(name) for name in adapters.active if isinstance(name, str)}
        found = {name: config for name, config in acting.items() if config.words}
        for name, config in found.items():
            self._teach(config, adapters.modules(name), adapters)
        return [*found.values()]

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
