"""Files of kohya's scripts and of the UIs: `lora_unet_<module, dots as _>.lora_down.weight` and the like."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

from torch import Tensor

from adapterkit.contract.naming import KnownBase
from adapterkit.contract.view import ComponentView
from adapterkit.errors import CheckpointError
from adapterkit.formats.cards import CardOptions
from adapterkit.formats.foreign_names import flattened
from adapterkit.formats.module_files import ModuleFileFormat
from adapterkit.formats.module_writing import ModuleNames, Tensors
from adapterkit.formats.pipeline_parts import texts_of
from adapterkit.formats.prefixes import DENOISER, TEXT, TEXT_1, TEXT_2, TEXT_3
from adapterkit.points import Points

_PREFIXES = {DENOISER: "lora_unet_", TEXT_1: "lora_te1_", TEXT_2: "lora_te2_", TEXT_3: "lora_te3_"}
_OFT, _OFT_NDIM = frozenset({"oft_blocks", "alpha"}), 3
_ONLY_TEXT = "lora_te_"


class KohyaFormat(ModuleFileFormat):
    """One safetensors file; each module's tensors lie under its path, with `_` in the place of dots.

    Attributes:
        rotations: What stands in front of a denoiser's modules of OFT.
    """

    style = "kohya"
    rotations: ClassVar[str] = "oft_unet_"

    def spelled(self, modules: Tensors, base: KnownBase | None, options: CardOptions) -> Tensors:
        """With one alpha; the scripts' own OFT has a prefix of its own."""
        found = super().spelled(modules, base, options)
        usual = _PREFIXES[DENOISER]
        return {
            f"{self.rotations}{name.removeprefix(usual)}" if name.startswith(usual) and _rotates(own) else name: own
            for name, own in found.items()
        }

    def names(self, points: Points) -> ModuleNames:
        alone = points.model is not None and len(texts_of(points.model.components)) == 1

        def named(component: ComponentView, part: str) -> Callable[[str], str]:
            prefix = _ONLY_TEXT if alone and part in (TEXT, TEXT_1) else _PREFIXES.get(part)
            if prefix is None:
                told = f"has no name for the text encoder {component.name!r} beside others; native has any"
                raise CheckpointError(f"this format {told}", None, component.name)
            return lambda name: f"{prefix}{flattened(name)}"

        return named


def _rotates(own: Mapping[str, Tensor]) -> bool:
    """Whether this is what the scripts' OFT writes for a module."""
    return own.keys() == _OFT and own["oft_blocks"].ndim == _OFT_NDIM
