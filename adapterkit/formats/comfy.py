"""Files by ComfyUI's names: `diffusion_model.<module of the original checkpoint>.lora_down.weight`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from adapterkit.contract.naming import KnownBase
from adapterkit.contract.view import ComponentView
from adapterkit.errors import CheckpointError
from adapterkit.formats.cards import CardOptions
from adapterkit.formats.module_files import ModuleFileFormat
from adapterkit.formats.module_writing import ModuleNames, Tensors
from adapterkit.formats.prefixes import DENOISER, TEXT_1, TEXT_2, TEXT_3
from adapterkit.points import Points

_PREFIXES = {
    DENOISER: "diffusion_model.",
    TEXT_1: "text_encoders.clip_l.transformer.",
    TEXT_2: "text_encoders.clip_g.transformer.",
    TEXT_3: "text_encoders.t5xxl.transformer.",
}


_DOWN, _UP, _ALPHA = "lora_down.weight", "lora_up.weight", "alpha"


class ComfyFormat(ModuleFileFormat):
    """One safetensors file; each module's tensors lie under its dotted path in ComfyUI."""

    style = "comfy"
    separator = "."
    naming_style = "comfy"

    def spelled(self, modules: Tensors, base: KnownBase | None, options: CardOptions) -> Tensors:
        found = super().spelled(modules, base, options)
        if base is None or not base.folded:
            return found
        return {name: _folded(own) if name.startswith(_PREFIXES[DENOISER]) else own for name, own in found.items()}

    def names(self, points: Points) -> ModuleNames:
        def named(component: ComponentView, part: str) -> Callable[[str], str]:
            if part not in _PREFIXES:
                told = f"what ComfyUI calls the text encoder {component.name!r} ({component.classes[0]}) is not known"
                raise CheckpointError(f"{told}; native has any", None, component.name)
            return lambda name: f"{_PREFIXES[part]}{name}"

        return named


def _folded(own: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """LoRA without alpha, under PEFT's names: as what trains newer models writes it."""
    if own.keys() != {_DOWN, _UP, _ALPHA}:
        return own
    scale = float(own[_ALPHA]) / len(own[_DOWN])
    up = own[_UP] if scale == 1.0 else (own[_UP].double() * scale).to(own[_UP].dtype)
    return {"lora_A.weight": own[_DOWN], "lora_B.weight": up}
