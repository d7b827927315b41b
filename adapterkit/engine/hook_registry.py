"""Adapters under libraries that find the layers to offload by type, wherever they are (diffusers' leaf groups)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from adapterkit.mapping.offload_hooks import DIFFUSERS

if TYPE_CHECKING:
    from adapterkit.engine.site import Site


class NoHooks:
    """What stands in an adapter's modules where diffusers keeps its hooks, and takes none.

    A hook runs where its module is called, and an adapter is not called for all that it does. Its site puts it where
    the adapted module computes, and hears of it where somebody tries.
    """

    def __init__(self, site: Site) -> None:
        self.hooks: dict[str, Any] = {}
        self._site = site

    def register_hook(self, hook: object, name: str) -> None:
        """Takes none."""
        self._site.changed()

    def get_hook(self, name: str) -> None:
        """There is none."""

    def remove_hook(self, name: str, recurse: bool = True) -> None:
        """There is none."""

    def reset_stateful_hooks(self, recurse: bool = True) -> None:
        """There is none."""


def unhook(adapter: nn.Module, site: Site) -> None:
    """Puts it into every module of an adapter."""
    registry, waiting = NoHooks(site), [adapter]
    while waiting:  # as `Module.modules()` goes, in a fraction of its time
        module = waiting.pop()
        module.__dict__[DIFFUSERS] = registry
        waiting += [child for child in module._modules.values() if child is not None]


def release(adapter: nn.Module) -> None:
    """Takes it out again."""
    for module in adapter.modules():
        module.__dict__.pop(DIFFUSERS, None)
