"""Files of kohya's scripts and of the UIs: `lora_unet_<module, dots as _>.lora_down.weight` and the like."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from adapterkit.checkpoint import Checkpoint, WriteOptions, WriteReport, single
from adapterkit.codec import Context
from adapterkit.formats import container
from adapterkit.formats.dialect import Dialect
from adapterkit.formats.foreign_names import flattened
from adapterkit.formats.module_files import DIALECT, ModuleFileFormat
from adapterkit.formats.module_writing import written
from adapterkit.formats.prefixes import DENOISER, TEXT_1, TEXT_2, TEXT_3
from adapterkit.points import Points
from adapterkit.view import ComponentView

_PREFIXES = {DENOISER: "lora_unet_", TEXT_1: "lora_te1_", TEXT_2: "lora_te2_", TEXT_3: "lora_te3_"}


class KohyaFormat(ModuleFileFormat):
    """One safetensors file; each module's tensors lie under its path, with `_` in the place of dots."""

    style = "kohya"

    def write(
        self, checkpoints: Mapping[str, Checkpoint], target: Path, points: Points, options: WriteOptions
    ) -> WriteReport | None:
        checkpoint = single(checkpoints, target)
        dialect, context = Dialect(DIALECT), Context(target, options=options)
        modules = written(checkpoint, points, dialect, context, _named, scripts=True)
        tensors = {
            f"{name}.{own}": options.cast(tensor) for name, module in modules.items() for own, tensor in module.items()
        }
        container.write(target, tensors, dict(checkpoint.metadata))
        return WriteReport(list(context.notes))


def _named(component: ComponentView, part: str) -> Callable[[str], str]:
    prefix = _PREFIXES[part]
    return lambda name: f"{prefix}{flattened(name)}"
