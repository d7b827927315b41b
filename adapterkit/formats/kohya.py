"""Files of kohya's scripts and of the UIs: `lora_unet_<module, dots as _>.lora_down.weight` and the like."""

from __future__ import annotations

from collections.abc import Callable

from adapterkit.errors import CheckpointError
from adapterkit.formats.foreign_names import flattened
from adapterkit.formats.module_files import ModuleFileFormat
from adapterkit.formats.module_writing import ModuleNames
from adapterkit.formats.pipeline_parts import texts_of
from adapterkit.formats.prefixes import DENOISER, TEXT, TEXT_1, TEXT_2, TEXT_3
from adapterkit.points import Points
from adapterkit.view import ComponentView

_PREFIXES = {DENOISER: "lora_unet_", TEXT_1: "lora_te1_", TEXT_2: "lora_te2_", TEXT_3: "lora_te3_"}
_ONLY_TEXT = "lora_te_"


class KohyaFormat(ModuleFileFormat):
    """One safetensors file; each module's tensors lie under its path, with `_` in the place of dots."""

    style = "kohya"

    def names(self, points: Points) -> ModuleNames:
        alone = points.model is not None and len(texts_of(points.model.components)) == 1

        def named(component: ComponentView, part: str) -> Callable[[str], str]:
            prefix = _ONLY_TEXT if alone and part in (TEXT, TEXT_1) else _PREFIXES.get(part)
            if prefix is None:
                told = f"has no name for the text encoder {component.name!r} beside others; comfy and native have"
                raise CheckpointError(f"this format {told}", None, component.name)
            return lambda name: f"{prefix}{flattened(name)}"

        return named
