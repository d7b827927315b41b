"""One small valid file of each format, taken apart so that it can be spoilt: tensors, metadata and config."""

from __future__ import annotations

import copy
import functools
import json
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.testing import toys
from tests.formats import foreign, forge

CONFIG = "adapter_config.json"


@dataclass
class Sample:
    """A file, or a folder of a config and a file.

    Attributes:
        tensors, metadata: The file's.
        config: The folder's config; None where there is no folder.
        weights: The file's name in the folder.
        ends: How keys of the two factors and of an alpha end.
        rank, alpha: Where the config has them: names from the outside inwards.
        said: The metadata that is a config.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] | None = None
    weights: str = "it.safetensors"
    ends: tuple[str, str, str] = ("lora_down.weight", "lora_up.weight", "alpha")
    rank: tuple[str, ...] = ()
    alpha: tuple[str, ...] = ()
    said: str = ""

    @property
    def down(self) -> list[str]:
        """Keys of the factors that multiply an input."""
        return [key for key in self.tensors if key.endswith(self.ends[0])]

    @property
    def up(self) -> list[str]:
        """Keys of the other factors."""
        return [key for key in self.tensors if key.endswith(self.ends[1])]

    @property
    def alphas(self) -> list[str]:
        """Keys of alphas."""
        return [key for key in self.tensors if key.endswith(self.ends[2])]

    def copy(self) -> Sample:
        """One to be changed."""
        return copy.deepcopy(self)

    def set(self, names: tuple[str, ...], value: object) -> None:
        """Sets a value in the config, or in that of the metadata."""
        said: Any = json.loads(self.metadata[self.said]) if self.said else self.config
        inner = said
        for name in names[:-1]:
            inner = inner[name]
        inner[names[-1]] = value
        if self.said:
            self.metadata[self.said] = json.dumps(said)

    def file(self, path: Path) -> Path:
        """Where the tensors are."""
        return path if self.config is None else path / self.weights

    def write(self, path: Path) -> Path:
        """Writes it, config and all."""
        if self.config is not None:
            path.mkdir(exist_ok=True)
            (path / CONFIG).write_text(json.dumps(self.config))
        self.file(path).write_bytes(self.bytes())
        return path

    def bytes(self) -> bytes:
        """The file's."""
        tensors = {key: tensor.contiguous() for key, tensor in self.tensors.items()}
        return safetensors.torch.save(tensors, self.metadata or None)


class Native(Sample):
    """A native file, whose index is made to fit, as a forger would."""

    def bytes(self) -> bytes:
        header = json.loads(self.metadata["adapterkit"])
        tensors = {key: tensor.contiguous() for key, tensor in self.tensors.items()}
        if all("/" in key for key in tensors):
            header["tensors"] = forge.index(tensors)
        return safetensors.torch.save(tensors, {"adapterkit": json.dumps(header)})


@dataclass
class Reader:
    """A format, a model, and a valid file for the model.

    Attributes:
        model: A module, or a pipeline of several.
        sample: The file.
        smaller: Makes a model that lacks a part of it: one of its models, or some of its layers.
    """

    name: str
    model: Any
    sample: Sample
    smaller: Callable[[], Any]

    @functools.cached_property
    def root(self) -> nn.Module:
        """All modules of the model."""
        parts = getattr(self.model, "components", None)
        return self.model if parts is None else nn.ModuleDict(parts)


def _taken_apart(path: Path, cls: type[Sample] = Sample, config: Path | None = None, **others: Any) -> Sample:
    with safe_open(str(path), "pt") as opened:
        tensors, metadata = {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata()  # noqa: SIM118
    said = None if config is None else json.loads(config.read_text())
    weights = path.name if config is not None else "it.safetensors"
    return cls(tensors, metadata or {}, said, weights, **others)


def _filled(adapters: ak.Adapters, name: str) -> None:
    noise = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapters.parameters(name):
            parameter.normal_(std=0.1, generator=noise)


def _saved(model: Any, folder: Path, format: str, targets: str) -> Path:
    adapters = ak.Adapters(model)
    adapters.add("good", ak.LoRA(rank=2, alpha=3.0, targets=targets))
    _filled(adapters, "good")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # what readers must know
        path = adapters.save("good", folder / "saved", format=format)
    adapters.detach()
    return path


def _native(folder: Path) -> Reader:
    toys.register()
    model = toys.ToyModel()
    path = _saved(model, folder, "native", "attn.q mlp.up")
    sample = _taken_apart(path, Native, ends=("/A", "/B", "/none"))
    return Reader("native", model, sample, lambda: toys.ToyModel(layers=1))


def _pipeline() -> Any:
    from tests.formats import pipelines

    torch.manual_seed(0)
    return SimpleNamespace(components={"unet": pipelines.unet(), "text_encoder": pipelines.clip(8)})


def _unet() -> Any:
    from tests.formats import pipelines

    return pipelines.unet()


def _unet_of_one_block() -> Any:
    unet: Any = _unet()
    unet.up_blocks = unet.up_blocks[:1]
    return unet


def _of_ui(format: str) -> Callable[[Path], Reader]:
    def made(folder: Path) -> Reader:
        model = _pipeline()
        path = _saved(model, folder, format, "attn.{q,v}")
        sample = _taken_apart(path)
        if format == "lycoris":
            sample.tensors = {
                key.replace("lora_unet_", "lycoris_"): t for key, t in sample.tensors.items() if "unet" in key
            }
        return Reader(format, model, sample, _unet_of_one_block if format == "lycoris" else _unet)

    return made


def _diffusers(folder: Path) -> Reader:
    model = _pipeline()
    sample = _taken_apart(_saved(model, folder, "diffusers", "attn.{q,v}"))
    sample.ends = ("lora_A.weight", "lora_B.weight", "none")
    sample.rank, sample.alpha, sample.said = ("unet.r",), ("unet.lora_alpha",), "lora_adapter_metadata"
    return Reader("diffusers", model, sample, _unet)


def _peft(folder: Path) -> Reader:
    toys.register()
    model = toys.ToyModel()
    path = _saved(model, folder, "peft", "attn.o mlp.up")
    sample = _taken_apart(
        path / "adapter_model.safetensors",
        config=path / CONFIG,
        ends=("lora_A.weight", "lora_B.weight", "none"),
        rank=("r",),
        alpha=("lora_alpha",),
    )
    return Reader("peft", model, sample, lambda: toys.ToyModel(layers=1))


def _adapterhub(folder: Path) -> Reader:
    here = foreign.HERE / "adapterhub"
    shutil.copytree(here / "adapterhub_gpt2_lora" / "files", folder / "hub")
    sample = _taken_apart(
        folder / "hub" / "adapter.safetensors",
        config=folder / "hub" / CONFIG,
        ends=("lora_A", "lora_B", "none"),
        rank=("config", "r"),
        alpha=("config", "alpha"),
    )
    return Reader("adapterhub", foreign.built(here, "gpt2"), sample, lambda: _first_layer(foreign.built(here, "gpt2")))


def _first_layer(gpt2: Any) -> Any:
    gpt2.transformer.h = gpt2.transformer.h[:1]
    gpt2.config.n_layer = 1
    return gpt2


READERS: Mapping[str, Callable[[Path], Reader]] = {
    "native": _native,
    "kohya": _of_ui("kohya"),
    "comfy": _of_ui("comfy"),
    "lycoris": _of_ui("lycoris"),
    "diffusers": _diffusers,
    "peft": _peft,
    "adapterhub": _adapterhub,
}
"""What makes each reader, in a folder of its own."""
