"""The hooks of a plug-in.

A plug-in is a light module, named by an entry point of the group `adapterkit`:

    from adapterkit import hookimpl
    from adapterkit.specs import AdapterSpec

    @hookimpl
    def adapterkit_register_adapters():
        return [AdapterSpec("gate", "my_package.gate:Gate", kinds={"output"}, summary="one gate per feature")]

Implementations may leave out arguments that they do not need. They run when adapterkit starts, so they import no torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import pluggy

from adapterkit.specs import (
    AdapterSpec,
    BackendSpec,
    CallbackSpec,
    CodecSpec,
    CommandSpec,
    FormatSpec,
    LayerSpec,
    NamingSpec,
    OptimizerSpec,
    RecipeSpec,
    ScheduleSpec,
    TaskSpec,
)

if TYPE_CHECKING:
    from torch import nn

GROUP = "adapterkit"

hookspec = pluggy.HookspecMarker(GROUP)
hookimpl = pluggy.HookimplMarker(GROUP)


@hookspec
def adapterkit_register_adapters() -> Iterable[AdapterSpec]:  # pyright: ignore[reportReturnType]
    """Adapter types, such as `AdapterSpec("lora", "adapterkit.adapters.lora:LoRA", kinds={"weight"}, summary="…")`."""


@hookspec
def adapterkit_register_backends() -> Iterable[BackendSpec]:  # pyright: ignore[reportReturnType]
    """Model families, such as `BackendSpec("vit", "my_package:ViT", models=("timm:VisionTransformer",), extra="…")`."""


@hookspec
def adapterkit_register_layers() -> Iterable[LayerSpec]:  # pyright: ignore[reportReturnType]
    """How layers keep weights, such as `LayerSpec("int8", "my_package:Int8", classes=("my_library:Int8Linear",))`."""


@hookspec
def adapterkit_register_formats() -> Iterable[FormatSpec]:  # pyright: ignore[reportReturnType]
    """File layouts, such as `FormatSpec("native", "adapterkit.formats.native:NativeFormat", summary="…")`."""


@hookspec
def adapterkit_register_codecs() -> Iterable[CodecSpec]:  # pyright: ignore[reportReturnType]
    """How types are written, such as `CodecSpec("lycoris_lora", "my_package:LoRACodec", dialect="lycoris")`."""


@hookspec
def adapterkit_register_namings() -> Iterable[NamingSpec]:  # pyright: ignore[reportReturnType]
    """Other tools' names, such as `NamingSpec("flux", "my_package:Flux", models=("diffusers:Flux…",))`."""


@hookspec
def adapterkit_register_tasks() -> Iterable[TaskSpec]:  # pyright: ignore[reportReturnType]
    """Training tasks, such as `TaskSpec("causal-lm", "my_package:CausalLM", summary="next-token prediction")`."""


@hookspec
def adapterkit_register_recipes() -> Iterable[RecipeSpec]:  # pyright: ignore[reportReturnType]
    """How pipelines train, such as `RecipeSpec("flux", "my_package:Flux", pipelines=("diffusers:FluxPipeline",))`."""


@hookspec
def adapterkit_register_optimizers() -> Iterable[OptimizerSpec]:  # pyright: ignore[reportReturnType]
    """Rules that train, such as `OptimizerSpec("lion", "my_package:LionConfig", extra="lion", summary="…")`."""


@hookspec
def adapterkit_register_schedules() -> Iterable[ScheduleSpec]:  # pyright: ignore[reportReturnType]
    """Ways of the learning rate, such as `ScheduleSpec("cosine", "my_package:Cosine", summary="…")`."""


@hookspec
def adapterkit_register_callbacks() -> Iterable[CallbackSpec]:  # pyright: ignore[reportReturnType]
    """Who is told of steps, figures and samples, such as `CallbackSpec("notify", "my_package:Notify", summary="…")`."""


@hookspec
def adapterkit_register_commands() -> Iterable[CommandSpec]:  # pyright: ignore[reportReturnType]
    """Subcommands, such as `CommandSpec("serve", "my_package.cli:command", help="answer requests over HTTP")`."""


@hookspec(firstresult=True)
def adapterkit_resolve_backend(model: nn.Module) -> str | None:
    """The name of the backend for `model`, overriding the match by class; None for no opinion. First answer wins."""
