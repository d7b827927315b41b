"""What adapterkit itself provides, registered through the hooks that every plug-in uses."""

from __future__ import annotations

from adapterkit.hookspecs import hookimpl
from adapterkit.plugins import builtin_commands, builtin_training, classes
from adapterkit.specs import (
    AdapterSpec,
    BackendSpec,
    CodecSpec,
    CommandSpec,
    FormatSpec,
    NamingSpec,
    OptimizerSpec,
    RecipeSpec,
    ScheduleSpec,
    TaskSpec,
)

# Library, the extra that brings it, and its families: name, target below adapterkit.backends, classes, summary.
_BACKENDS: tuple[tuple[str, str, tuple[tuple[str, str, str, str], ...]], ...] = (
    (
        "transformers",
        "llm",
        (
            (
                "language",
                "language:LanguageBackend",
                classes.named(classes.LANGUAGE),
                "Llama, Mistral, Qwen, Gemma, Phi-3, GPT-2, GPT-NeoX, OPT, Bloom, Falcon, MPT, BERT and its kin",
            ),
            (
                "seq2seq",
                "seq2seq:Seq2SeqBackend",
                classes.named(classes.SEQ2SEQ),
                "T5, mT5, UMT5, BART, Whisper",
            ),
            ("state_space", "state_space:StateSpaceBackend", classes.named(classes.STATE_SPACE), "Mamba"),
            (
                "experts",
                "experts:ExpertsBackend",
                classes.named(classes.EXPERTS),
                "mixtures of experts: Mixtral, Qwen3-MoE, DeepSeek-V3, gpt-oss, Llama 4",
            ),
        ),
    ),
    (
        "transformers",
        "diffusion",
        (
            (
                "clip_text",
                "clip:ClipTextBackend",
                "CLIPTextModel CLIPTextModelWithProjection",
                "the text encoders of Stable Diffusion",
            ),
        ),
    ),
    (
        "transformers",
        "vision",
        (("vit", "vision:ViTBackend", "ViTPreTrainedModel", "vision transformers of transformers"),),
    ),
    (
        "timm",
        "vision",
        (
            ("timm_vit", "vision:TimmViTBackend", "VisionTransformer", "vision transformers of timm"),
            ("timm_eva", "vision_timm:TimmEvaBackend", "Eva Beit", "EVA, EVA-02, DINOv3 and BEiT of timm"),
            ("timm_swin", "vision_timm:TimmSwinBackend", "SwinTransformer", "Swin of timm"),
            ("timm_swin_v2", "vision_timm:TimmSwinV2Backend", "SwinTransformerV2", "Swin v2 of timm"),
            ("timm_convnext", "vision_timm:TimmConvNextBackend", "ConvNeXt", "ConvNeXt of timm"),
            ("timm_hiera", "vision_timm:TimmHieraBackend", "Hiera", "Hiera of timm"),
            (
                "timm_meta_former",
                "vision_timm:TimmMetaFormerBackend",
                "MetaFormer",
                "CAFormer, ConvFormer and PoolFormer of timm",
            ),
        ),
    ),
    (
        "transformers",
        "vision",
        (
            (
                "vision",
                "vision_transformers:VisionBackend",
                classes.named(classes.VISION),
                "DINOv2, DINOv3, BEiT, Swin, and the image encoders of CLIP and SigLIP",
            ),
            (
                "siglip_text",
                "vision_transformers:SiglipTextBackend",
                classes.named(classes.SIGLIP_TEXT),
                "the text encoder of SigLIP",
            ),
            ("clip", "multimodal:ClipBackend", "CLIPModel SiglipModel", "both towers of CLIP and SigLIP"),
            (
                "vision_language",
                "multimodal:VisionLanguageBackend",
                "LlavaPreTrainedModel",
                "LLaVA, with any image encoder and language model that a backend knows",
            ),
            (
                "qwen_vision_language",
                "multimodal:QwenVisionLanguageBackend",
                "Qwen2_5_VLModel Qwen2_5_VLForConditionalGeneration Qwen3VLModel Qwen3VLForConditionalGeneration",
                "Qwen2.5-VL and Qwen3-VL",
            ),
            (
                "qwen_vision",
                "multimodal:QwenVisionBackend",
                "Qwen2_5_VisionTransformerPretrainedModel Qwen3VLVisionModel",
                "the image encoders of Qwen2.5-VL and Qwen3-VL",
            ),
        ),
    ),
    (
        "diffusers",
        "diffusion",
        (
            ("unet", "diffusion:UNetBackend", "UNet2DConditionModel", "the UNets of Stable Diffusion 1.5, 2.1 and XL"),
            (
                "sd3",
                "diffusion_transformers:SD3Backend",
                "SD3Transformer2DModel",
                "the transformers of Stable Diffusion 3 and 3.5",
            ),
            ("flux", "diffusion_transformers:FluxBackend", "FluxTransformer2DModel", "the transformers of Flux"),
            (
                "pixart",
                "diffusion_transformers:PixArtBackend",
                "PixArtTransformer2DModel",
                "the transformers of PixArt-alpha and PixArt-Sigma",
            ),
            ("sana", "diffusion_transformers:SanaBackend", "SanaTransformer2DModel", "the transformers of Sana"),
            (
                "controlnet",
                "diffusion_companions:ControlNetBackend",
                "ControlNetModel",
                "the ControlNets of Stable Diffusion 1.5, 2.1 and XL",
            ),
            (
                "sd3_controlnet",
                "diffusion_companions:SD3ControlNetBackend",
                "SD3ControlNetModel",
                "the ControlNets of Stable Diffusion 3 and 3.5",
            ),
            (
                "flux_controlnet",
                "diffusion_companions:FluxControlNetBackend",
                "FluxControlNetModel",
                "the ControlNets of Flux",
            ),
            (
                "autoencoder",
                "diffusion_companions:AutoencoderBackend",
                "AutoencoderKL",
                "the autoencoders of Stable Diffusion and Flux, given by themselves",
            ),
        ),
    ),
    (
        "torch",
        "",
        (
            (
                "generic",
                "generic:GenericBackend",
                "Module",
                "any other model: its layers, by class and by names that leave no doubt",
            ),
        ),
    ),
)


# Name, target below adapterkit.adapters, kinds, summary.
_ADAPTERS = (
    ("lora", "lora:LoRA", "weight", "a low-rank update of a weight; merges without a trace"),
    ("dora", "dora:DoRA", "weight", "a low-rank update of a weight's direction, and a magnitude for each row"),
    ("adalora", "adalora:AdaLoRA", "weight", "low-rank updates whose ranks go where they matter most"),
    ("prefix", "prefix:Prefix", "attention", "learnt keys and values in front of every attention"),
    ("prompt", "prompt:Prompt", "tokens", "learnt positions in the sequence, which nothing outside sees"),
    ("bottleneck", "bottleneck:Bottleneck", "output", "a small two-layer network after, or beside, a sublayer"),
    ("compacter", "compacter:Compacter", "output", "bottlenecks of Kronecker products that layers share"),
    ("invertible", "invertible:Invertible", "tokens weight", "an invertible transform of the embedded sequence"),
    ("reft", "reft:ReFT", "output", "edits of hidden states in a small subspace: LoReFT, NoReFT, DiReFT"),
    ("trainable", "trainable:Trainable", "norm weight", "the model's own weights, biases, norms, rows or a new head"),
    ("union", "union:Union", "attention norm output tokens weight", "several types under one name"),
    ("tied", "tied:Tied", "weight", "one adapter for a weight that several layers have: embedding and head"),
    ("fuse", "fuse:Fuse", "output", "a learnt attention over what other adapters do"),
)


@hookimpl
def adapterkit_register_adapters() -> list[AdapterSpec]:
    """Every type of `_ADAPTERS`."""
    return [
        AdapterSpec(name, f"adapterkit.adapters.{target}", kinds=frozenset(kinds.split()), summary=summary)
        for name, target, kinds, summary in _ADAPTERS
    ]


@hookimpl
def adapterkit_register_backends() -> list[BackendSpec]:
    """Every family of `_BACKENDS`."""
    return [
        BackendSpec(
            name,
            f"adapterkit.backends.{target}",
            models=tuple(f"{library}:{cls}" for cls in names.split()),
            extra=extra,
            summary=summary,
        )
        for library, extra, families in _BACKENDS
        for name, target, names, summary in families
    ]


@hookimpl
def adapterkit_register_formats() -> list[FormatSpec]:
    """The native file, and those of other tools."""
    return [
        FormatSpec(
            "native",
            "adapterkit.formats.native:NativeFormat",
            summary="one safetensors file that describes itself",
        ),
        FormatSpec("kohya", "adapterkit.formats.kohya:KohyaFormat", summary="files of kohya's scripts and the UIs"),
        FormatSpec("comfy", "adapterkit.formats.comfy:ComfyFormat", summary="files by ComfyUI's own names of modules"),
        FormatSpec("lycoris", "adapterkit.formats.lycoris:LycorisFormat", summary="files of LyCORIS"),
        FormatSpec("peft", "adapterkit.formats.peft:PeftFormat", summary="folders of PEFT, and their tensors"),
        FormatSpec(
            "diffusers", "adapterkit.formats.diffusers:DiffusersFormat", summary="files of diffusers, of all ages"
        ),
        FormatSpec(
            "adapterhub",
            "adapterkit.formats.adapterhub:AdapterHubFormat",
            summary="folders of AdapterHub: adapters, fusions, heads and setups",
        ),
    ]


# Name, target below adapterkit.formats.codecs, dialect, summary.
_CODECS = (
    ("lycoris_lora", "lycoris_lora:LoRACodec", "lycoris", "lora_down, lora_up and an alpha a module"),
    ("peft_adalora", "peft_adalora:AdaLoRACodec", "peft", "lora_A, lora_B and the singular values lora_E"),
    ("peft_trainable", "peft_trainable:TrainableCodec", "peft", "modules to save, biases, norms, rows of embeddings"),
    ("peft_prompt", "peft_prompt:PromptCodec", "peft", "positions in front of the sequence"),
    ("peft_prefix", "peft_prefix:PrefixCodec", "peft", "keys and values of all layers in one tensor"),
    ("peft_lora", "peft_lora:LoRACodec", "peft", "lora_A and lora_B, rank and alpha in the config"),
    ("peft_tied", "peft_tied:TiedCodec", "peft", "the same of a tied weight, with ensure_weight_tying"),
    ("lycoris_dora", "lycoris_dora:DoRACodec", "lycoris", "the same and dora_scale"),
)


@hookimpl
def adapterkit_register_codecs() -> list[CodecSpec]:
    """Every codec of `_CODECS`."""
    return [
        CodecSpec(name, f"adapterkit.formats.codecs.{target}", dialect=dialect, summary=summary)
        for name, target, dialect, summary in _CODECS
    ]


# Name, target below adapterkit.formats.names, library, its classes, summary.
_NAMINGS = (
    ("unet", "unet:UNetNaming", "diffusers", "UNet2DConditionModel", "the checkpoints of Stable Diffusion"),
    ("flux", "flux:FluxNaming", "diffusers", "FluxTransformer2DModel", "the checkpoints of Flux"),
    ("chroma", "flux:ChromaNaming", "diffusers", "ChromaTransformer2DModel", "the checkpoints of Chroma"),
    ("flux2", "flux2:Flux2Naming", "diffusers", "Flux2Transformer2DModel", "the checkpoints of Flux.2"),
    ("sd3", "sd3:SD3Naming", "diffusers", "SD3Transformer2DModel", "the checkpoints of Stable Diffusion 3 and 3.5"),
    ("lumina2", "lumina:Lumina2Naming", "diffusers", "Lumina2Transformer2DModel", "the checkpoints of Lumina 2"),
    ("z_image", "z_image:ZImageNaming", "diffusers", "ZImageTransformer2DModel", "the checkpoints of Z-Image"),
    ("wan", "wan:WanNaming", "diffusers", "WanTransformer3DModel WanVACETransformer3DModel", "the checkpoints of Wan"),
    (
        "hunyuan_video",
        "hunyuan_video:HunyuanVideoNaming",
        "diffusers",
        "HunyuanVideoTransformer3DModel HunyuanVideoFramepackTransformer3DModel",
        "the checkpoints of HunyuanVideo",
    ),
    ("qwen_image", "qwen_image:QwenImageNaming", "diffusers", "QwenImageTransformer2DModel", "as diffusers"),
    ("ltx", "ltx:LTXNaming", "diffusers", "LTXVideoTransformer3DModel", "the checkpoints of LTX-Video"),
    ("ltx2", "ltx:LTX2Naming", "diffusers", "LTX2VideoTransformer3DModel", "the checkpoints of LTX-2"),
    ("cosmos", "cosmos:CosmosNaming", "diffusers", "CosmosTransformer3DModel", "those of Cosmos-Predict 2 and Anima"),
    ("pixart", "pixart:PixArtNaming", "diffusers", "PixArtTransformer2DModel", "the checkpoints of PixArt"),
    ("sana", "sana:SanaNaming", "diffusers", "SanaTransformer2DModel", "the checkpoints of Sana"),
    ("aura_flow", "aura_flow:AuraFlowNaming", "diffusers", "AuraFlowTransformer2DModel", "the checkpoints of AuraFlow"),
    ("mochi", "mochi:MochiNaming", "diffusers", "MochiTransformer3DModel", "the checkpoints of Mochi"),
    (
        "clip_text",
        "clip:ClipTextNaming",
        "transformers",
        "CLIPTextModel CLIPTextModelWithProjection",
        "CLIP's text encoders, as transformers 4 had them",
    ),
)


@hookimpl
def adapterkit_register_namings() -> list[NamingSpec]:
    """Every naming of `_NAMINGS`."""
    return [
        NamingSpec(
            name,
            f"adapterkit.formats.names.{target}",
            models=tuple(f"{library}:{cls}" for cls in names.split()),
            summary=summary,
        )
        for name, target, library, names, summary in _NAMINGS
    ]


@hookimpl
def adapterkit_register_tasks() -> list[TaskSpec]:
    """Images from captions, image classes, text."""
    return builtin_training.tasks()


@hookimpl
def adapterkit_register_recipes() -> list[RecipeSpec]:
    """Pipelines of diffusers, by family."""
    return builtin_training.recipes()


@hookimpl
def adapterkit_register_optimizers() -> list[OptimizerSpec]:
    """Torch's own, and those of packages that are kept well."""
    return builtin_training.optimizers()


@hookimpl
def adapterkit_register_schedules() -> list[ScheduleSpec]:
    """What follows the warm-up."""
    return builtin_training.schedules()


@hookimpl
def adapterkit_register_commands() -> list[CommandSpec]:
    """The subcommands, in the order of `adapterkit --help`."""
    return builtin_commands.commands()
