"""Words that adapters bring: tokens that the pipeline's tokenizers do not have."""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from adapterkit.adapter import AdapterModule
from adapterkit.contract.config import AdapterConfig
from adapterkit.errors import AttachError
from adapterkit.handle.adapters import Adapters
from adapterkit.training.diffusion.recipe import Recipe

_LARGEST = 2
"""With this for the id of the token that ends a text, CLIP takes the largest id there is."""


class Words:
    """Writes texts for those adapters that act now.

    Args:
        recipe: Knows the tokenizers.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._known: set[str] = set()
        self._before: dict[str, Any] = {}
        self._ends: list[Any] = []
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

    @contextlib.contextmanager
    def untaught(self) -> Iterator[None]:
        """In which tokenizers and encoders are as they were loaded, and every text is written as it is."""
        names = dict(zip(self.recipe.encoders, self.recipe.tokenizers, strict=True))
        taught, known, ends = {part: self.recipe.readers()[part] for part in self._before}, self._known, self._ends
        ids = [module.eos_token_id for module in ends]
        self._known = set()
        for part, tokenizer in self._before.items():
            setattr(self.recipe.pipe, names[part], copy.deepcopy(tokenizer))
        for module in ends:
            module.eos_token_id = _LARGEST
        try:
            yield
        finally:
            for part, tokenizer in taught.items():
                setattr(self.recipe.pipe, names[part], tokenizer)
            for module, end in zip(ends, ids, strict=True):
                module.eos_token_id = end
            self._known = known

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
        readers = self.recipe.readers()
        self._before = {part: copy.deepcopy(one) for part, one in readers.items()} if not self._before else self._before
        for component, tokenizer in readers.items():
            own = {point: module for point, module in modules.items() if components[point] == component}
            if own:
                config.teach(own, tokenizer)
                self._ends += _end_texts(self.recipe.text_parts()[component], tokenizer.eos_token_id)
        self._known |= {*config.words}
        self._taught |= weakref.WeakSet(modules.values())


def _end_texts(encoder: nn.Module, end: int) -> list[nn.Module]:
    """Tells CLIP which token ends a text: with the 2 of early configs it takes the largest, and so a new word."""
    found = [module for module in encoder.modules() if vars(module).get("eos_token_id") == _LARGEST]
    for module in found:
        module.eos_token_id = end  # type: ignore[assignment]
    return found
