"""Files by ComfyUI's names: `diffusion_model.<module of the original checkpoint>.lora_down.weight`."""

from __future__ import annotations

from collections.abc import Callable

from adapterkit.formats.module_files import ModuleFileFormat
from adapterkit.formats.module_writing import ModuleNames
from adapterkit.formats.prefixes import DENOISER, TEXT_1, TEXT_2, TEXT_3
from adapterkit.points import Points
from adapterkit.view import ComponentView

_PREFIXES = {
    DENOISER: "diffusion_model.",
    TEXT_1: "text_encoders.clip_l.transformer.",
    TEXT_2: "text_encoders.clip_g.transformer.",
    TEXT_3: "text_encoders.t5xxl.transformer.",
}


class ComfyFormat(ModuleFileFormat):
    """One safetensors file; each module's tensors lie under its dotted path in ComfyUI."""

    style = "comfy"
    scripts = False
    separator = "."

    def names(self, points: Points) -> ModuleNames:
        def named(component: ComponentView, part: str) -> Callable[[str], str]:
            prefix = (
                _PREFIXES.get(part)
                or f"text_encoders.{component.config.get('model_type', component.name)}.transformer."
            )
            return lambda name: f"{prefix}{name}"

        return named
