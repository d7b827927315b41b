"""Between a model and files: which format reads a file, and what of an adapter goes into one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from adapterkit.building import SHARED, own_state, shared_of
from adapterkit.checkpoint import Checkpoint, Format
from adapterkit.errors import CheckpointError, PluginError, StateError, UnsupportedFileError
from adapterkit.mapping import MappedModel
from adapterkit.plugins import get_plugin_manager
from adapterkit.state import Attached


def find_format(path: Path, name: str | None = None) -> Format:
    """The format of this name, or the one that recognises the file's content.

    Raises:
        UnknownNameError: No format has the name.
        CheckpointError: No format recognises the file; says what is wrong with it where a format can tell.
    """
    manager = get_plugin_manager()
    if name is not None:
        return manager.format(name).load()()
    if not path.exists() and not path.is_symlink():
        raise CheckpointError("there is no such file", path)
    candidates: list[Format] = [spec.load()() for spec in manager.formats().values()]
    for candidate in candidates:
        if candidate.recognises(path):
            return candidate
    for candidate in candidates:
        candidate.diagnose(path)
    known = ", ".join(manager.formats())
    raise UnsupportedFileError(
        f"its content is of no format that is installed ({known}); name one with format=...", path
    )


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
