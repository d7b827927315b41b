"""What adapterkit itself provides, registered through the hooks that every plug-in uses."""

from __future__ import annotations

from adapterkit.hookspecs import hookimpl
from adapterkit.specs import AdapterSpec, BackendSpec, CommandSpec, FormatSpec, TaskSpec


@hookimpl
def adapterkit_register_adapters() -> list[AdapterSpec]:
    """LoRA, prefixes and bottlenecks."""
    return [
        AdapterSpec(
            "lora",
            "adapterkit.adapters.lora:LoRA",
            kinds=frozenset({"weight"}),
            summary="a low-rank update of a weight; merges without a trace",
        ),
        AdapterSpec(
            "prefix",
            "adapterkit.adapters.prefix:Prefix",
            kinds=frozenset({"attention"}),
            summary="learnt keys and values in front of every attention",
        ),
        AdapterSpec(
            "bottleneck",
            "adapterkit.adapters.bottleneck:Bottleneck",
            kinds=frozenset({"output"}),
            summary="a small two-layer network after, or beside, a sublayer",
        ),
    ]


@hookimpl
def adapterkit_register_backends() -> list[BackendSpec]:
    """Language models, CLIP text encoders, vision transformers, UNets."""
    return [
        BackendSpec(
            "language",
            "adapterkit.backends.language:LanguageBackend",
            models=(
                "transformers:LlamaPreTrainedModel",
                "transformers:MistralPreTrainedModel",
                "transformers:Qwen2PreTrainedModel",
                "transformers:Qwen3PreTrainedModel",
                "transformers:GPT2PreTrainedModel",
                "transformers:BertPreTrainedModel",
            ),
            extra="llm",
            summary="Llama, Mistral, Qwen 2 and 3, GPT-2, BERT",
        ),
        BackendSpec(
            "clip_text",
            "adapterkit.backends.clip:ClipTextBackend",
            models=("transformers:CLIPTextModel", "transformers:CLIPTextModelWithProjection"),
            extra="diffusion",
            summary="the text encoders of Stable Diffusion",
        ),
        BackendSpec(
            "vit",
            "adapterkit.backends.vision:ViTBackend",
            models=("transformers:ViTPreTrainedModel",),
            extra="vision",
            summary="vision transformers of transformers",
        ),
        BackendSpec(
            "timm_vit",
            "adapterkit.backends.vision:TimmViTBackend",
            models=("timm:VisionTransformer",),
            extra="vision",
            summary="vision transformers of timm",
        ),
        BackendSpec(
            "unet",
            "adapterkit.backends.diffusion:UNetBackend",
            models=("diffusers:UNet2DConditionModel",),
            extra="diffusion",
            summary="the UNets of Stable Diffusion 1.5, 2.1 and XL",
        ),
    ]


@hookimpl
def adapterkit_register_formats() -> list[FormatSpec]:
    """The native file."""
    return [
        FormatSpec(
            "native",
            "adapterkit.formats.native:NativeFormat",
            summary="one safetensors file that describes itself",
        ),
    ]


@hookimpl
def adapterkit_register_tasks() -> list[TaskSpec]:
    """Images from captions, image classes, text."""
    return [
        TaskSpec(
            "diffusion",
            "adapterkit.training.diffusion:DiffusionTask",
            summary="a style or a subject from a folder of captioned images",
        ),
        TaskSpec(
            "image-classification",
            "adapterkit.training.images:ImageClassificationTask",
            summary="classes from a folder of images, one subfolder per class",
        ),
        TaskSpec(
            "causal-lm",
            "adapterkit.training.text:CausalLMTask",
            summary="next-token prediction on text or JSONL",
        ),
    ]


@hookimpl
def adapterkit_register_commands() -> list[CommandSpec]:
    """The subcommands, in the order of `adapterkit --help`."""
    return [
        CommandSpec("points", "adapterkit.cli.points:command", help="Show where adapters can act in a model."),
        CommandSpec("adapters", "adapterkit.cli.adapters:command", help="List the adapter types."),
        CommandSpec("backends", "adapterkit.cli.backends:command", help="List the model families."),
        CommandSpec("plugins", "adapterkit.cli.plugins:command", help="List the plug-ins and what became of each."),
        CommandSpec("train", "adapterkit.cli.train:command", help="Train an adapter as a run file says."),
        CommandSpec("sample", "adapterkit.cli.sample:command", help="Generate with a trained adapter."),
        CommandSpec("inspect", "adapterkit.cli.inspect:command", help="Describe an adapter file."),
    ]
