"""Adapt pretrained PyTorch models with small trainable parts.

    import adapterkit as ak

    adapters = ak.Adapters(model)
    adapters.add("ink", ak.LoRA(rank=8, targets="attn.*"))

Importing this package imports no torch: every public name is fetched when it is first used.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adapterkit import errors, specs
    from adapterkit.adapter import AdapterConfig, AdapterModule, AdditiveModule
    from adapterkit.adapters.adalora import AdaLoRA
    from adapterkit.adapters.bottleneck import Bottleneck
    from adapterkit.adapters.compacter import Compacter
    from adapterkit.adapters.dora import DoRA
    from adapterkit.adapters.fuse import Fuse
    from adapterkit.adapters.invertible import Invertible
    from adapterkit.adapters.lora import LoRA
    from adapterkit.adapters.prefix import Prefix
    from adapterkit.adapters.prompt import Prompt
    from adapterkit.adapters.reft import ReFT
    from adapterkit.adapters.tied import Tied
    from adapterkit.adapters.trainable import Trainable
    from adapterkit.adapters.union import Union
    from adapterkit.composition import Average, Parallel, Split, Stack
    from adapterkit.contract.factors import Factors
    from adapterkit.errors import (
        AdapterKitError,
        AdapterMismatchError,
        AmbiguousBackendError,
        AmbiguousFormatError,
        AttachError,
        BaseMismatchError,
        BaseNeededError,
        BrokenFormatError,
        CheckpointError,
        ConfigError,
        ContextError,
        CorruptFileError,
        DataChangedError,
        DataError,
        DtypeMismatchError,
        IncompatibleTargetError,
        InvalidHeaderError,
        InvalidNameError,
        LengthError,
        MissingDependencyError,
        MissingKeysError,
        ModelNotFoundError,
        NonFiniteError,
        NoSpecimen,
        NotMergeableError,
        NotRegularFileError,
        PluginConflictError,
        PluginError,
        PluginIncompatibleError,
        PluginLoadError,
        ProofError,
        ReplacedError,
        RoutingError,
        RowError,
        SelectorError,
        ShapeMismatchError,
        StateError,
        TargetNotFoundError,
        TrainingError,
        UnexpectedKeysError,
        UnknownAdapterTypeError,
        UnknownNameError,
        UnregisteredTypeWarning,
        UnsupportedFileError,
        UnsupportedModelError,
    )
    from adapterkit.handle.adapters import Adapters
    from adapterkit.handle.listing import points
    from adapterkit.hookspecs import hookimpl
    from adapterkit.plugins import get_plugin_manager
    from adapterkit.points import InjectionPoint

__version__ = "0.1.0"

__all__ = [
    "AdaLoRA",
    "AdapterConfig",
    "AdapterKitError",
    "AdapterMismatchError",
    "AdapterModule",
    "Adapters",
    "AdditiveModule",
    "AmbiguousBackendError",
    "AmbiguousFormatError",
    "AttachError",
    "Average",
    "BaseMismatchError",
    "BaseNeededError",
    "Bottleneck",
    "BrokenFormatError",
    "CheckpointError",
    "Compacter",
    "ConfigError",
    "ContextError",
    "CorruptFileError",
    "DataChangedError",
    "DataError",
    "DoRA",
    "DtypeMismatchError",
    "Factors",
    "Fuse",
    "IncompatibleTargetError",
    "InjectionPoint",
    "InvalidHeaderError",
    "InvalidNameError",
    "Invertible",
    "LengthError",
    "LoRA",
    "MissingDependencyError",
    "MissingKeysError",
    "ModelNotFoundError",
    "NoSpecimen",
    "NonFiniteError",
    "NotMergeableError",
    "NotRegularFileError",
    "Parallel",
    "PluginConflictError",
    "PluginError",
    "PluginIncompatibleError",
    "PluginLoadError",
    "Prefix",
    "Prompt",
    "ProofError",
    "ReFT",
    "ReplacedError",
    "RoutingError",
    "RowError",
    "SelectorError",
    "ShapeMismatchError",
    "Split",
    "Stack",
    "StateError",
    "TargetNotFoundError",
    "Tied",
    "Trainable",
    "TrainingError",
    "UnexpectedKeysError",
    "Union",
    "UnknownAdapterTypeError",
    "UnknownNameError",
    "UnregisteredTypeWarning",
    "UnsupportedFileError",
    "UnsupportedModelError",
    "__version__",
    "errors",
    "get_plugin_manager",
    "hookimpl",
    "points",
    "specs",
]

_HOMES = {
    "AdaLoRA": "adapterkit.adapters.adalora",
    "AdapterConfig": "adapterkit.adapter",
    "AdapterModule": "adapterkit.adapter",
    "Adapters": "adapterkit.handle.adapters",
    "AdditiveModule": "adapterkit.adapter",
    "Average": "adapterkit.composition",
    "Bottleneck": "adapterkit.adapters.bottleneck",
    "Compacter": "adapterkit.adapters.compacter",
    "DoRA": "adapterkit.adapters.dora",
    "Factors": "adapterkit.contract.factors",
    "Fuse": "adapterkit.adapters.fuse",
    "InjectionPoint": "adapterkit.points",
    "Invertible": "adapterkit.adapters.invertible",
    "LoRA": "adapterkit.adapters.lora",
    "Parallel": "adapterkit.composition",
    "Prefix": "adapterkit.adapters.prefix",
    "Prompt": "adapterkit.adapters.prompt",
    "ReFT": "adapterkit.adapters.reft",
    "Split": "adapterkit.composition",
    "Stack": "adapterkit.composition",
    "Trainable": "adapterkit.adapters.trainable",
    "Tied": "adapterkit.adapters.tied",
    "Union": "adapterkit.adapters.union",
    "get_plugin_manager": "adapterkit.plugins",
    "hookimpl": "adapterkit.hookspecs",
    "points": "adapterkit.handle.listing",
}
_ERRORS = "adapterkit.errors"  # the home of every other public name
_TORCH_FREE = frozenset({_ERRORS, "adapterkit.plugins", "adapterkit.hookspecs", "adapterkit.points"}) | {
    "adapterkit.composition",
    "adapterkit.contract.factors",
}
_SUBMODULES = frozenset({"errors", "specs"})


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOMES.get(name, _ERRORS)
    if home not in _TORCH_FREE:
        # Whoever asks for these is about to import a model's library, which may import torchvision.
        importlib.import_module(f"{__name__}.torchvision_ops").ensure_torchvision_ops()
    value = getattr(importlib.import_module(home), name)
    setattr(sys.modules[__name__], name, value)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Keeps `adapterkit.points` the public function whatever is imported first.

    Importing the submodule of the same name makes the import system bind it here, which would hide the function.
    `from adapterkit.points import InjectionPoint` does not read this attribute and is not affected.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name == "points" and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
