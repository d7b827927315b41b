"""Before the first call of an adapted module: whether its adapters have values, and where they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from adapterkit.engine.slots import has_meta
from adapterkit.errors import StateError
from adapterkit.mapping import offload_hooks

if TYPE_CHECKING:
    from adapterkit.engine.site import Site


def place(site: Site, module: nn.Module) -> None:
    """What acts must have values, and goes to where hooks have the module compute.

    Raises:
        StateError: It has none.
    """
    _require_values(site, module)
    site.placed = True
    device = offload_hooks.hook_device(module)
    if device is not None:
        site.slots.to(device)


def _require_values(site: Site, module: nn.Module) -> None:
    names = site.switch.current.names
    base = next(module.parameters(), None)  # children come first that are the model's own
    away = base is not None and not base.is_meta
    for name, adapter in ((name, one) for slot in site.slots for name, one in slot.adapters() if name in names):
        if adapter.empty or (away and has_meta(adapter)):
            raise StateError(
                f"{name!r} has no values: it was attached on the meta device; initialise({name!r}) gives it those of "
                "add(), load_into() those of a file"
            )
