"""What other libraries put around a module's forward: hooks of accelerate and diffusers that move or cast its weights.

Both keep the module's own forward, bound, and put theirs on the instance. Neither library is imported here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

_ACCELERATE = "_hf_hook"
DIFFUSERS = "_diffusers_hook"
"""Where diffusers keeps the hooks of a module."""

RECORDS = frozenset({"forward", "_old_forward", _ACCELERATE, DIFFUSERS})
"""The attributes of a module in which they keep what they do."""


def is_hooked(module: nn.Module) -> bool:
    """Whether something other than its class says what a call of the module does."""
    return "forward" in module.__dict__


def held_forwards(module: nn.Module) -> list[tuple[dict[str, Any], str]]:
    """Where what is around a module's forward keeps the module's own: dictionaries, and the keys in them."""
    if not is_hooked(module):
        return []
    registry = module.__dict__.get(DIFFUSERS)
    holders = [module.__dict__, *(vars(one) for one in getattr(registry, "_fn_refs", ()))]
    return [(holder, key) for holder in holders for key, value in holder.items() if _is_forward_of(module, value)]


def exchange_forward(module: nn.Module, forward: MethodType) -> MethodType | None:
    """Gives what is around a module's forward another one to call. Returns what it has called; None where none is."""
    found = [(holder, key, holder[key]) for holder, key in held_forwards(module)]
    for holder, key, _ in found:
        holder[key] = forward
    return found[0][2] if found else None


def _is_forward_of(module: nn.Module, value: object) -> bool:
    return isinstance(value, MethodType) and value.__self__ is module and value.__name__ == "forward"


def being_hooked(module: nn.Module) -> bool:
    """Whether a hook is around the module, or is being put there."""
    own = module.__dict__
    return DIFFUSERS in own or "_old_forward" in own


def exchanges_data(module: nn.Module) -> bool:
    """Whether hooks put other data into the parameters of a module after each call: cast, or on another device."""
    if not module._modules and DIFFUSERS not in module.__dict__:  # the usual case, and quick
        return False
    registered = (hook for one in module.modules() if DIFFUSERS in one.__dict__ for hook in _hooks(one))
    return any(hasattr(hook, "storage_dtype") or hasattr(hook, "group") for hook in registered)


def stored_elsewhere(root: nn.Module, path: str) -> str | None:
    """Why a weight of a module cannot be replaced: hooks keep it in another place or dtype. None where none do."""
    *around, module = _chain(root, path)
    for hook in (*_hooks(module), *(hook for one in around for hook in _hooks(one) if _holds_all_below(hook))):
        if getattr(hook, "offload", False) or hasattr(hook, "group"):
            return "the weight is offloaded; merge before the offload hooks are added, or remove them first"
        if hasattr(hook, "storage_dtype"):
            return f"the weight is kept in {hook.storage_dtype}, by layerwise casting; merge before that is enabled"
    return None


def takes_along(root: nn.Module, path: str, weight: Tensor) -> str | None:
    """Why nothing new can be put below a module: a hook would look for its tensors among those that it has kept."""
    if not weight.is_meta and not _has_registry(root, path):
        return None
    for hook in (hook for module in _chain(root, path) for hook in _hooks(module)):
        as_a_block = getattr(hook, "offload", False) and _holds_all_below(hook)
        if as_a_block or getattr(getattr(hook, "group", None), "cpu_param_dict", None):
            return "its weights are offloaded as one block, with copies of what was in it; attach before such hooks"
    return None


def _holds_all_below(hook: Any) -> bool:
    return getattr(hook, "place_submodules", False) or hasattr(hook, "group") or hasattr(hook, "storage_dtype")


def compute_device(root: nn.Module, path: str, stored: torch.device) -> torch.device:
    """Where a module computes, whose weights are on `stored` between calls, as the nearest hook says."""
    if stored.type != "meta" and not _has_registry(root, path):
        return stored
    around = _chain(root, path)[::-1]
    return _first_device([*around, *around[0].modules(), *root.modules()], moving=stored.type != "meta") or stored


def hook_device(module: nn.Module) -> torch.device | None:
    """Where hooks on a module, or in it, have it compute wherever its weights are; None without such hooks."""
    return _first_device(module.modules(), moving=False)


def _first_device(modules: Iterable[nn.Module], *, moving: bool) -> torch.device | None:
    """What the first hook says that tells.

    Args:
        modules: Where to look, in order.
        moving: Whether to ask those alone that move weights which are on a device.
    """
    hooked = (module for module in modules if _ACCELERATE in module.__dict__ or DIFFUSERS in module.__dict__)
    for hook in (hook for module in hooked for hook in _hooks(module)):
        device = getattr(getattr(hook, "group", hook), "onload_device", None)
        if device is None and not moving:
            device = getattr(hook, "execution_device", None)
        if device is not None:
            return torch.device(device)
    return None


def _has_registry(module: nn.Module, path: str) -> bool:
    # Asked for every point of every adapter that is added: no list is made.
    for name in path.split(".") if path else ():
        if DIFFUSERS in module.__dict__ or _ACCELERATE in module.__dict__:
            return True
        module = module._modules[name]  # type: ignore[assignment]
    if _ACCELERATE in module.__dict__:
        return True
    if module._parameters:
        return DIFFUSERS in module.__dict__ and bool(module.__dict__[DIFFUSERS].hooks)
    return any(one.__dict__[DIFFUSERS].hooks for one in module.modules() if DIFFUSERS in one.__dict__)


@contextlib.contextmanager
def as_computed(root: nn.Module, path: str) -> Iterator[None]:
    """Inside of it the weights of a module are where they are when it is called."""
    with contextlib.ExitStack() as stack:
        for module in _chain(root, path):
            for hook in _hooks(module):
                if getattr(hook, "offload", False):
                    hook.pre_forward(module)
                    stack.callback(hook.post_forward, module, None)
                elif hasattr(hook, "group"):
                    hook.group.onload_()
                    stack.callback(hook.group.offload_)
        yield


def _chain(root: nn.Module, path: str) -> list[nn.Module]:
    """The modules on the way to a path, the model itself first; wrappers answer for what they wrap."""
    found = [root]
    for name in path.split(".") if path else ():
        child = found[-1]._modules.get(name)
        found.append(getattr(found[-1], name) if child is None else child)
    return found


def _hooks(module: nn.Module) -> list[Any]:
    own = module.__dict__
    found: list[Any] = []
    if (hook := own.get(_ACCELERATE)) is not None:
        found += getattr(hook, "hooks", [hook])
    if (registry := own.get(DIFFUSERS)) is not None:
        found += registry.hooks.values()
    return found
