"""Original checkpoints, those that UIs load: one file with a denoiser and perhaps its text encoders, by other names."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adapterkit.errors import ModelNotFoundError
from adapterkit.formats.foreign_names import ForeignNames
from adapterkit.handle.view import View
from adapterkit.mapping.model import MappedModel, map_model
from adapterkit.tools import original_shapes
from adapterkit.tools.original_shapes import Shapes
from adapterkit.tools.stored import Slot, StoredModel
from adapterkit.tools.tensor_files import TensorFiles
from adapterkit.training.loading import reading
from adapterkit.training.skeleton import Skeleton

Finder = Callable[[MappedModel, str, TensorFiles, str], "dict[str, Slot]"]


@dataclass(frozen=True)
class _Part:
    """A model that a checkpoint may hold.

    Attributes:
        component: What a pipeline calls it.
        prefixes: What may stand in front of its tensors' names.
        sign: A tensor that it has, whatever its size.
        library, model, config: Its classes; `config` where the model takes one.
        shapes: From its tensors' shapes to its configuration.
        places: Where its parameters are.
    """

    component: str
    prefixes: tuple[str, ...]
    sign: str
    library: str
    model: str
    config: str
    shapes: Callable[[Shapes], dict[str, Any]]
    places: Finder

    def prefix(self, files: TensorFiles) -> str | None:
        """What stands in front of its tensors; None where the checkpoint does not hold it."""
        return next((prefix for prefix in self.prefixes if f"{prefix}{self.sign}" in files), None)

    def build(self, files: TensorFiles, prefix: str) -> nn.Module:
        """The model, on the meta device."""
        own = {name[len(prefix) :]: files.entry(name).shape for name in files.names if name.startswith(prefix)}
        library: Any = importlib.import_module(self.library)
        values = self.shapes(own)
        with torch.device("meta"):
            cls = getattr(library, self.model)
            return cls(getattr(library, self.config)(**values)) if self.config else cls(**values)


def _by_naming(mapped: MappedModel, component: str, files: TensorFiles, prefix: str) -> dict[str, Slot]:
    """Places by the names that original checkpoints have for modules: see `adapterkit.contract.naming`."""
    root = mapped.components[component].root
    found: dict[str, Slot] = {}
    for foreign, pieces in ForeignNames(View(mapped).components[component]).written("comfy"):
        at = 0
        for piece in pieces:
            module, size = root.get_submodule(piece.path), 0
            for name, parameter in module._parameters.items():
                key = f"{prefix}{foreign}.{name}"
                if parameter is None or key not in files:
                    continue
                start = at if piece.rows is None else piece.rows[0]
                size = parameter.shape[0]
                found[f"{piece.path}.{name}"] = Slot(key, _rows(start, size, piece.halves_swapped, len(pieces) == 1))
            at += size
    return found


def _rows(start: int, size: int, swapped: bool, alone: bool) -> slice | list[int] | None:
    if swapped:
        return [start + (row + size // 2) % size for row in range(size)]
    return None if alone else slice(start, start + size)


_OPEN_CLIP = (
    ("ln_1", "layer_norm1"),
    ("ln_2", "layer_norm2"),
    ("mlp.c_fc", "mlp.fc1"),
    ("mlp.c_proj", "mlp.fc2"),
    ("attn.out_proj", "self_attn.out_proj"),
)


def _by_open_clip(mapped: MappedModel, component: str, files: TensorFiles, prefix: str) -> dict[str, Slot]:
    root = mapped.components[component].root
    names = dict(root.named_parameters())
    stem = "text_model." if any(name.startswith("text_model.") for name in names) else ""
    found = {
        f"{stem}embeddings.token_embedding.weight": Slot(f"{prefix}token_embedding.weight"),
        f"{stem}embeddings.position_embedding.weight": Slot(f"{prefix}positional_embedding"),
        **{f"{stem}final_layer_norm.{name}": Slot(f"{prefix}ln_final.{name}") for name in ("weight", "bias")},
        "text_projection.weight": Slot(f"{prefix}text_projection", transposed=True),
    }
    for layer in range(root.config.num_hidden_layers):  # type: ignore[union-attr]
        block, own = f"{prefix}transformer.resblocks.{layer}", f"{stem}encoder.layers.{layer}"
        for name in ("weight", "bias"):
            found |= {f"{own}.{ours}.{name}": Slot(f"{block}.{theirs}.{name}") for theirs, ours in _OPEN_CLIP}
            for number, part in enumerate("qkv"):
                parameter = f"{own}.self_attn.{part}_proj.{name}"
                size = names[parameter].shape[0]
                rows = slice(number * size, (number + 1) * size)
                found[parameter] = Slot(f"{block}.attn.in_proj_{name}", rows)
    return {name: slot for name, slot in found.items() if name in names and slot.key in files}


_UNET, _FLUX, _TOKENS = "input_blocks.0.0.weight", "double_blocks.0.img_attn.qkv.weight", "token_embedding.weight"
_CLIP = ("transformers", "CLIPTextModel", "CLIPTextConfig")
_PROJECTING = ("transformers", "CLIPTextModelWithProjection", "CLIPTextConfig")
_PARTS = (
    _Part(
        "unet",
        ("model.diffusion_model.", ""),
        _UNET,
        "diffusers",
        "UNet2DConditionModel",
        "",
        original_shapes.unet,
        _by_naming,
    ),
    _Part(
        "transformer",
        ("model.diffusion_model.", ""),
        _FLUX,
        "diffusers",
        "FluxTransformer2DModel",
        "",
        original_shapes.flux,
        _by_naming,
    ),
    _Part(
        "text_encoder",
        ("cond_stage_model.transformer.", "conditioner.embedders.0.transformer.", "text_encoders.clip_l.transformer."),
        f"text_model.embeddings.{_TOKENS}",
        *_CLIP,
        original_shapes.clip,
        _by_naming,
    ),
    _Part("text_encoder", ("cond_stage_model.model.",), _TOKENS, *_CLIP, original_shapes.open_clip, _by_open_clip),
    _Part(
        "text_encoder_2",
        ("conditioner.embedders.1.model.",),
        _TOKENS,
        *_PROJECTING,
        original_shapes.open_clip,
        _by_open_clip,
    ),
)


def open_original(path: Path) -> tuple[MappedModel, dict[str, StoredModel]]:
    """The models in an original checkpoint: Stable Diffusion 1.x, 2.x and XL, and Flux.

    Raises:
        ModelNotFoundError: It holds none of these.
        CheckpointError: It is no safetensors file.
    """
    files = TensorFiles([path])
    found = [(part, prefix) for part in _PARTS if (prefix := part.prefix(files)) is not None]
    if not found:
        raise ModelNotFoundError(
            f"{path} is no checkpoint of Stable Diffusion 1.x, 2.x, XL or Flux; give the model's folder instead"
        )
    with reading(str(path), "diffusion"):
        models = {part.component: part.build(files, prefix) for part, prefix in found}
    mapped = map_model(Skeleton(models))
    stored: dict[str, StoredModel] = {}
    for part, prefix in found:
        places = part.places(mapped, part.component, files, prefix)
        stored[part.component] = StoredModel(models[part.component], files, places.get, str(path))
    return mapped, stored
