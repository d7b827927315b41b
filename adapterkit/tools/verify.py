"""Whether other libraries make the same of an adapter's file: it is loaded with them, and every layer is compared."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import tempfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adapterkit.checkpoint import Checkpoint
from adapterkit.errors import AdapterKitError, AttachError, MissingDependencyError, ModelNotFoundError
from adapterkit.formats.source import Source
from adapterkit.handle.adapters import Adapters
from adapterkit.handle.view import seen
from adapterkit.mapping.model import MappedModel, map_model
from adapterkit.points import WeightPoint
from adapterkit.tools.files import Loaded, read, write
from adapterkit.training.loading import NO_CODE, is_diffusers_part, reading

TOLERANCE = 1e-5
_BATCH, _MARGIN = 3, 2
Outputs = Mapping[str, Tensor]
"""Component and path of a layer -> its output for an input of its own; "the model" -> that of the whole."""


@dataclass(frozen=True)
class Comparison:
    """What another library makes of an adapter.

    Attributes:
        library: Which, with its version.
        format: Of the file that it was given: the one that is verified, or a copy in a format that it reads.
        layers: How many were compared; the model as a whole counts as one, where it is known how to call it.
        changed: Of how many of them the adapter changes the output.
        error: The largest difference of outputs, relative to the largest output of the layer.
        where: The layer where that is.
        problem: Why there is nothing to compare.
    """

    library: str
    format: str
    layers: int = 0
    changed: int = 0
    error: float = 0.0
    where: str = ""
    problem: str = ""

    @property
    def agrees(self) -> bool:
        """Whether all outputs are equal, but for rounding."""
        return not self.problem and self.error <= TOLERANCE


@dataclass(frozen=True)
class _Library:
    """Another library that reads adapters.

    Attributes:
        name: Of its package.
        reads: The formats that it reads; the first is written where a file is of none of them.
        load: Loads a file or folder into a model or pipeline, and gives what is to be called in its place.
    """

    name: str
    reads: tuple[str, ...]
    load: Callable[[Any, Path], Any]


def _into_peft(model: nn.Module, path: Path) -> nn.Module:
    peft: Any = importlib.import_module("peft")
    return peft.PeftModel.from_pretrained(model, str(path)).eval()


def _into_diffusers(pipe: Any, path: Path) -> Any:
    pipe.load_lora_weights(str(path.parent), weight_name=path.name)
    return pipe


_PEFT = _Library("peft", ("peft",), _into_peft)
_DIFFUSERS = _Library("diffusers", ("diffusers", "kohya"), _into_diffusers)


def verify(file: Path, base: str, *, allow_pickle: bool = False) -> list[Comparison]:
    """Loads a file with the other libraries that are installed, and compares what each layer of the base computes.

    Args:
        file: The adapter's file or folder. A library that does not read its format gets a copy in one that it reads.
        base: The model's folder, or a hub id.
        allow_pickle: Whether a pickle of tensors may be opened.

    Raises:
        MissingDependencyError: No library is installed that reads adapters for such a model.
        ModelNotFoundError: The model cannot be loaded.
        CheckpointError: The file cannot be read.
    """
    model = load_model(base)
    libraries = [_DIFFUSERS] if hasattr(model, "load_lora_weights") else [_PEFT]
    if not all(importlib.util.find_spec(one.name) for one in libraries):
        names = " and ".join(one.name for one in libraries)
        raise MissingDependencyError(
            f"{names} would read adapters for such a model, and is not installed: pip install {names}"
        )
    mapped = map_model(model)
    loaded = read(Source.of(file, allow_pickle=allow_pickle), seen(mapped))
    probe = _Probe(mapped, model)
    before, wanted = probe.outputs(model), _ours(model, probe, loaded.checkpoint)
    return [_compared(one, model, probe, loaded, file, (before, wanted)) for one in libraries]


def _ours(model: Any, probe: _Probe, checkpoint: Checkpoint) -> Outputs:
    adapters = Adapters(model)
    try:
        adapters.install("verified", checkpoint)
        adapters.activate("verified")
        return probe.outputs(model)
    finally:
        adapters.detach()


def _compared(
    library: _Library, model: Any, probe: _Probe, loaded: Loaded, file: Path, ours: tuple[Outputs, Outputs]
) -> Comparison:
    name = f"{library.name} {importlib.metadata.version(library.name)}"
    own, (before, wanted) = loaded.report.format, ours
    given = own if own in library.reads else library.reads[0]
    with tempfile.TemporaryDirectory() as folder:
        try:
            path = file if given == own else _copy(loaded, Path(folder), given)
            found = probe.outputs(library.load(model, path))
        except AdapterKitError as error:
            return Comparison(name, given, problem=f"it cannot be written for it: {error}")
        except Exception as error:  # noqa: BLE001 - what another library raises is what was to be found
            return Comparison(name, given, problem=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    error, where = max(((_apart(found[key], wanted[key]), key) for key in wanted), default=(0.0, ""))
    changed = sum(_apart(before[key], wanted[key]) > 0 for key in wanted)
    return Comparison(name, given, len(wanted), changed, error, where)


def _copy(loaded: Loaded, folder: Path, format: str) -> Path:
    path = folder / ("adapter" if format == "peft" else "adapter.safetensors")
    write(loaded.checkpoint, path, format=format, points=loaded.points)
    return path


def _apart(one: Tensor, other: Tensor) -> float:
    if one.ndim == other.ndim == 3 and one.shape[1] != other.shape[1]:  # one of the two counts the prompt's positions
        shorter = min(one.shape[1], other.shape[1])
        one, other = one[:, -shorter:], other[:, -shorter:]
    if one.shape != other.shape:
        return float("inf")
    return float((one - other).abs().max() / other.abs().max().clamp_min(1e-30))


class _Probe:
    """Inputs for the layers of a model, and for the model as a whole: the same each time.

    Args:
        mapped, model: As it is without adapters; others replace its layers.
    """

    def __init__(self, mapped: MappedModel, model: Any) -> None:
        self._layers = {
            point.full_path: (mapped.components[point.model].root, point)
            for point in mapped.points()
            if isinstance(point, WeightPoint) and not point.is_read and point.layout.index is None
        }
        self._inputs = {
            key: _input(point, root.get_submodule(point.path)) for key, (root, point) in self._layers.items()
        }
        self._whole = _example(model)

    @torch.no_grad()
    def outputs(self, called: Any) -> Outputs:
        """What each layer gives that can be called alone, and the whole that is to be called."""
        found: dict[str, Tensor] = {}
        for key, (root, point) in self._layers.items():
            with contextlib.suppress(AttachError):  # an adapter around it needs the block
                found[key] = root.get_submodule(point.path)(self._inputs[key]).detach().clone()
        return found if self._whole is None else {**found, "the model": called(**self._whole)[0].detach().clone()}


def _input(point: WeightPoint, module: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(point.full_path.encode()))
    layout, width = point.layout, point.in_features
    if point.in_span is not None:
        width = getattr(module, "in_features", width)
    if layout.form == "embedding":
        return torch.randint(width, (_BATCH, _MARGIN), generator=generator)
    sides = [d * (k - 1) + 1 + _MARGIN for k, d in zip(layout.kernel, layout.dilation, strict=True)]
    return torch.randn(_BATCH, width, *sides, generator=generator)


def _example(model: Any) -> dict[str, Tensor] | None:
    """What a model of transformers can be called with; None where that is not known."""
    config: Any = getattr(model, "config", None)
    name = getattr(model, "main_input_name", "")
    generator = torch.Generator().manual_seed(0)
    if isinstance(model, nn.Module) and name == "input_ids" and isinstance(getattr(config, "vocab_size", None), int):
        ids = torch.randint(config.vocab_size, (_BATCH, 6), generator=generator)
        return {
            "input_ids": ids,
            **({"decoder_input_ids": ids} if getattr(config, "is_encoder_decoder", False) else {}),
        }
    size = getattr(config, "image_size", None)
    if isinstance(model, nn.Module) and name == "pixel_values" and isinstance(size, int):
        return {name: torch.randn(_BATCH, getattr(config, "num_channels", 3), size, size, generator=generator)}
    return None


def load_model(name: str) -> Any:
    """A model or pipeline in float32, with all that its files hold.

    Raises:
        ModelNotFoundError: There is none of diffusers or transformers at that place.
    """
    if (Path(name) / "model_index.json").is_file():
        with reading(name, "diffusion", "diffusers", "transformers"):
            diffusers: Any = importlib.import_module("diffusers")
            return diffusers.DiffusionPipeline.from_pretrained(name, dtype=torch.float32, **NO_CODE)
    if is_diffusers_part(name):
        raise ModelNotFoundError(f"{name} is one part of a pipeline of diffusers; name the whole pipeline's folder")
    with reading(name, "llm", "transformers"):
        transformers: Any = importlib.import_module("transformers")
        config = transformers.AutoConfig.from_pretrained(name, **NO_CODE)
        known = [getattr(transformers, found, None) for found in config.architectures or []]
        if not known or known[0] is None:
            raise ModelNotFoundError(f"{name} does not say of which class of transformers it is (architectures)")
        return known[0].from_pretrained(name, dtype=torch.float32, **NO_CODE).eval()
