"""Every architecture of the installed libraries, by lines, and its skeleton from the library's own defaults.

Nothing here is a list of architectures: the libraries say which there are, so that the next release's come
by themselves. What is written down is how a default is mended that the library itself cannot build (`AMENDED`).
"""

from __future__ import annotations

from adapterkit.torchvision_ops import ensure_torchvision_ops

ensure_torchvision_ops()

import functools  # noqa: E402 - only after the lines above
import importlib  # noqa: E402
import pkgutil  # noqa: E402
import warnings  # noqa: E402
from collections.abc import Mapping  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
from torch import nn  # noqa: E402

from tests.architectures.amendments import AMENDED  # noqa: E402

_AUTO = {
    "causal": ("CAUSAL_LM",),
    "masked": ("MASKED_LM",),
    "seq2seq": ("SEQ_TO_SEQ_CAUSAL_LM",),
    "image_classification": ("IMAGE_CLASSIFICATION",),
    "image_text": ("IMAGE_TEXT_TO_TEXT",),
    "audio": ("CTC", "AUDIO_CLASSIFICATION"),
}
"""Line of transformers -> its auto classes' mappings, `MODEL_FOR_..._MAPPING_NAMES`, the first that has the name."""

_HEARD = ("input_values", "input_features")
"""Main inputs of a bare model of transformers that make it an audio encoder."""

_FOLDERS = ("transformers", "unets", "controlnets")
"""Folders of diffusers.models whose models count."""

LINES = (*_AUTO, "timm", "diffusers")


class BrokenDefaultError(Exception):
    """The library cannot build this architecture from its own default config, and no amendment is known."""


def names(line: str) -> list[str]:
    """The architectures of a line, sorted: model types, one model a module of timm, classes of diffusers."""
    if line in _AUTO:
        return sorted(_transformers(line))
    return sorted(_timm().values() if line == "timm" else _diffusers())


def skeleton(line: str, name: str) -> nn.Module:
    """The model on the meta device, from its own default config.

    Raises:
        BrokenDefaultError: The library's default cannot be built; the cause says why.
    """
    make = {"timm": _timm_model, "diffusers": _diffusers_model}.get(line, functools.partial(_transformers_model, line))
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")  # of libraries, about their own defaults
        try:
            return make(name)
        except Exception as error:
            raise BrokenDefaultError(
                f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
            ) from error


@functools.cache
def _transformers(line: str) -> Mapping[str, str]:
    """Model type -> name of the class."""
    auto: Any = importlib.import_module("transformers.models.auto.modeling_auto")
    importlib.import_module("transformers").logging.set_verbosity_error()
    found: dict[str, Any] = {}
    for task in reversed(_AUTO[line]):
        found |= getattr(auto, f"MODEL_FOR_{task}_MAPPING_NAMES")
    if line == "audio":
        found = {kind: cls for kind, cls in auto.MODEL_MAPPING_NAMES.items() if _hears(_first(cls))} | found
    return {kind: _first(cls) for kind, cls in found.items()}


def _first(classes: str | tuple[str, ...] | list[str]) -> str:
    return classes if isinstance(classes, str) else classes[0]


def _hears(name: str) -> bool:
    try:
        return getattr(importlib.import_module("transformers"), name).main_input_name in _HEARD
    except (ImportError, AttributeError):  # its own library is not installed; the library lists it and has it not
        return False


def _transformers_model(line: str, name: str) -> nn.Module:
    cls: Any = getattr(importlib.import_module("transformers"), _transformers(line)[name])
    return cls(cls.config_class(**AMENDED.get(cls.__name__, {})))  # of a composite the text's, where it wants that


@functools.cache
def _timm() -> Mapping[str, str]:
    """Module of timm.models -> its first model."""
    timm: Any = importlib.import_module("timm")
    modules = importlib.import_module("timm.models._registry")._model_to_module
    found: dict[str, str] = {}
    for name in timm.list_models():
        found.setdefault(modules[name], name)
    return found


def _timm_model(name: str) -> nn.Module:
    return importlib.import_module("timm").create_model(name, pretrained=False)


@functools.cache
def _diffusers() -> Mapping[str, type[nn.Module]]:
    """Name of a model class -> it."""
    base = importlib.import_module("diffusers").ModelMixin
    found: dict[str, type[nn.Module]] = {}
    for folder in _FOLDERS:
        package = importlib.import_module(f"diffusers.models.{folder}")
        for info in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            if info.name.endswith("_flax"):
                continue
            module = importlib.import_module(info.name)
            here = (cls for cls in vars(module).values() if isinstance(cls, type) and issubclass(cls, base))
            found |= {cls.__name__: cls for cls in here if cls.__module__ == info.name}
    return found


def _diffusers_model(name: str) -> nn.Module:
    values = dict(AMENDED.get(name, {}))
    for key, value in values.items():
        if key == "controlnets":
            values[key] = [_diffusers_model(one) for one in value]
    return _diffusers()[name](**values)
