"""A model's shape from its configuration alone: on the meta device, no weight is read or allocated."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adapterkit.errors import UnsupportedModelError, shown
from adapterkit.training.loading import NO_CODE, TIMM, folder_config, is_diffusers_part, is_timm_folder, reading


@dataclass(frozen=True)
class Skeleton:
    """A pipeline's modules on the meta device, under the names that the pipeline gives them."""

    components: Mapping[str, nn.Module]


def skeleton(name: str) -> nn.Module | Skeleton:
    """The model of a folder, a hub id or `timm:NAME`, without its weights.

    Raises:
        ModelNotFoundError: There is no model of a known layout at that place.
        MissingDependencyError: Its library is not installed.
        UnsupportedModelError: It is a part of a pipeline, and none that can be adapted.
    """
    if name.startswith(TIMM) or is_timm_folder(name):
        return _timm(name)
    if (Path(name) / "model_index.json").is_file():
        return _pipeline(name)
    if is_diffusers_part(name):
        return _part(name)
    if Path(name).is_dir():
        return _single(name)
    return _pipeline(name) if _is_hub_pipeline(name) else _single(name)


def _timm(name: str) -> nn.Module:
    with reading(name, "vision"), torch.device("meta"):
        import timm

        if name.startswith(TIMM):
            return timm.create_model(name.removeprefix(TIMM), pretrained=False)
        config = folder_config(name)
        arguments = {"num_classes": config.get("num_classes", 1000), **(config.get("model_args") or {})}
        return timm.create_model(config["architecture"], pretrained=False, **arguments)


def _is_hub_pipeline(name: str) -> bool:
    """Whether a hub id is a pipeline's; the one file that tells is downloaded."""
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError
    except ImportError:
        return False
    with reading(name, "train"):
        try:
            hf_hub_download(name, "model_index.json")
        except EntryNotFoundError:
            return False
    return True


def _pipeline(name: str) -> Skeleton:
    with reading(name, "diffusion", "diffusers", "transformers"):
        diffusers: Any = importlib.import_module("diffusers")
        index = diffusers.DiffusionPipeline.load_config(name)
        listed = {key: value for key, value in index.items() if isinstance(value, list) and len(value) == 2}
        parts = {key: _component(name, key, *value) for key, value in listed.items()}
    return Skeleton({key: part for key, part in parts.items() if part is not None})


def _component(name: str, part: str, library: str | None, class_name: str | None) -> nn.Module | None:
    """A module of a pipeline; None for a scheduler, a tokenizer, or what a pipeline's own code defines."""
    if library not in ("diffusers", "transformers") or class_name is None:
        return None
    cls: Any = getattr(importlib.import_module(library), class_name, None)
    if not _is_module_class(cls):
        return None
    with torch.device("meta"):
        if library == "diffusers":
            return cls.from_config(cls.load_config(name, subfolder=part))
        return cls(cls.config_class.from_pretrained(name, subfolder=part, **NO_CODE))


def _part(name: str) -> nn.Module:
    class_name = folder_config(name)["_class_name"]
    with reading(name, "diffusion", "diffusers"):
        cls: Any = getattr(importlib.import_module("diffusers"), class_name, None)
        if not _is_module_class(cls):
            raise UnsupportedModelError(f"{name} holds a {shown(class_name)}, which is no model of diffusers")
        with torch.device("meta"):
            return cls.from_config(cls.load_config(name))


def _is_module_class(cls: object) -> bool:
    return isinstance(cls, type) and issubclass(cls, nn.Module)


def _single(name: str) -> nn.Module:
    with reading(name, "llm", "transformers"):
        import transformers

        config = transformers.AutoConfig.from_pretrained(name, **NO_CODE)
        known = [getattr(transformers, found, None) for found in config.architectures or []]
        with torch.device("meta"):
            if known and known[0] is not None:
                return known[0](config)
            return transformers.AutoModel.from_config(config, **NO_CODE)
