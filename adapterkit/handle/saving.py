"""An adapter on a model, as a checkpoint that a format can write."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from adapterkit.checkpoint import Checkpoint
from adapterkit.errors import (
    PluginError,
    StateError,
)
from adapterkit.handle.building import SHARED, own_state, shared_of
from adapterkit.handle.state import Attached
from adapterkit.mapping.model import MappedModel
from adapterkit.plugins import get_plugin_manager


def to_checkpoint(attached: Attached, mapped: MappedModel) -> Checkpoint:
    """One adapter with all that a file must know of it; the tensors are copies on the CPU.

    Raises:
        PluginError: The adapter's type is not registered, so no file could name it.
    """
    spec = get_plugin_manager().spec_of(type(attached.config))
    if spec is None:
        raise PluginError(
            f"{type(attached.config).__name__} is not a registered adapter type, so a file could not name it. "
            "Register it: get_plugin_manager().register(module) with an adapterkit_register_adapters hook"
        )
    components = {point.component for point in attached.points.values()}
    return Checkpoint(
        type=spec.name,
        config=attached.config.to_dict(),
        tensors=_tensors(attached),
        distribution=spec.origin.distribution if spec.origin else "",
        version=spec.origin.version if spec.origin else "",
        base={k: v for k, v in mapped.fingerprint(mapped.points()).items() if k in components},
        backends={k: c.backend_name for k, c in mapped.components.items() if k in components},
    )


def _tensors(attached: Attached) -> dict[str, dict[str, Tensor]]:
    tensors = {key: _copies(own_state(module)) for key, module in attached.modules.items()}
    shared = shared_of(attached.modules)
    return tensors if shared is None else {SHARED: _copies(shared.state_dict()), **tensors}


def _copies(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: _whole(tensor.detach()).cpu().clone().contiguous() for name, tensor in state.items()}


def _whole(tensor: Tensor) -> Tensor:
    if tensor.is_meta:
        raise StateError(
            "the adapter's parameters have no values here: they are on the meta device (offloaded by a hook?)"
        )
    # Of a tensor that fully_shard has spread, every process has a part; all of them must ask.
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # pyright: ignore
