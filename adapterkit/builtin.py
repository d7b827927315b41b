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
                "transformers:Gemma2PreTrainedModel",
                "transformers:Gemma3TextModel",
                "transformers:Gemma3ForCausalLM",
                "transformers:Gemma3TextForSequenceClassification",
                "transformers:Phi3PreTrainedModel",
                "transformers:GPTNeoXPreTrainedModel",
                "transformers:OPTPreTrainedModel",
                "transformers:BloomPreTrainedModel",
                "transformers:FalconPreTrainedModel",
                "transformers:MptPreTrainedModel",
                "transformers:RobertaPreTrainedModel",
                "transformers:DebertaV2PreTrainedModel",
                "transformers:ModernBertPreTrainedModel",
            ),
            extra="llm",
            summary="Llama, Mistral, Qwen, Gemma, Phi-3, GPT-2, GPT-NeoX, OPT, Bloom, Falcon, MPT, BERT and its kin",
        ),
        BackendSpec(
            "seq2seq",
            "adapterkit.backends.seq2seq:Seq2SeqBackend",
            models=(
                "transformers:T5PreTrainedModel",
                "transformers:MT5PreTrainedModel",
                "transformers:UMT5PreTrainedModel",
                "transformers:BartPreTrainedModel",
                "transformers:WhisperPreTrainedModel",
            ),
            extra="llm",
            summary="T5, mT5, UMT5, BART, Whisper",
        ),
        BackendSpec(
            "state_space",
            "adapterkit.backends.state_space:StateSpaceBackend",
            models=("transformers:MambaPreTrainedModel",),
            extra="llm",
            summary="Mamba",
        ),
        BackendSpec(
            "experts",
            "adapterkit.backends.experts:ExpertsBackend",
            models=(
                "transformers:MixtralPreTrainedModel",
                "transformers:Qwen3MoePreTrainedModel",
                "transformers:DeepseekV3PreTrainedModel",
                "transformers:GptOssPreTrainedModel",
                "transformers:Llama4TextModel",
                "transformers:Llama4ForCausalLM",
            ),
            extra="llm",
            summary="mixtures of experts: Mixtral, Qwen3-MoE, DeepSeek-V3, gpt-oss, Llama 4",
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
            "timm_eva",
            "adapterkit.backends.vision_timm:TimmEvaBackend",
            models=("timm:Eva", "timm:Beit"),
            extra="vision",
            summary="EVA, EVA-02, DINOv3 and BEiT of timm",
        ),
        BackendSpec(
            "timm_swin",
            "adapterkit.backends.vision_timm:TimmSwinBackend",
            models=("timm:SwinTransformer",),
            extra="vision",
            summary="Swin of timm",
        ),
        BackendSpec(
            "timm_swin_v2",
            "adapterkit.backends.vision_timm:TimmSwinV2Backend",
            models=("timm:SwinTransformerV2",),
            extra="vision",
            summary="Swin v2 of timm",
        ),
        BackendSpec(
            "timm_convnext",
            "adapterkit.backends.vision_timm:TimmConvNextBackend",
            models=("timm:ConvNeXt",),
            extra="vision",
            summary="ConvNeXt of timm",
        ),
        BackendSpec(
            "timm_hiera",
            "adapterkit.backends.vision_timm:TimmHieraBackend",
            models=("timm:Hiera",),
            extra="vision",
            summary="Hiera of timm",
        ),
        BackendSpec(
            "timm_meta_former",
            "adapterkit.backends.vision_timm:TimmMetaFormerBackend",
            models=("timm:MetaFormer",),
            extra="vision",
            summary="CAFormer, ConvFormer and PoolFormer of timm",
        ),
        BackendSpec(
            "vision",
            "adapterkit.backends.vision_transformers:VisionBackend",
            models=(
                "transformers:Dinov2PreTrainedModel",
                "transformers:Dinov2WithRegistersPreTrainedModel",
                "transformers:DINOv3ViTPreTrainedModel",
                "transformers:BeitPreTrainedModel",
                "transformers:SwinPreTrainedModel",
                "transformers:CLIPVisionModel",
                "transformers:CLIPVisionModelWithProjection",
                "transformers:CLIPForImageClassification",
                "transformers:SiglipVisionModel",
                "transformers:SiglipForImageClassification",
            ),
            extra="vision",
            summary="DINOv2, DINOv3, BEiT, Swin, and the image encoders of CLIP and SigLIP",
        ),
        BackendSpec(
            "siglip_text",
            "adapterkit.backends.vision_transformers:SiglipTextBackend",
            models=("transformers:SiglipTextModel",),
            extra="vision",
            summary="the text encoder of SigLIP",
        ),
        BackendSpec(
            "clip",
            "adapterkit.backends.multimodal:ClipBackend",
            models=("transformers:CLIPModel", "transformers:SiglipModel"),
            extra="vision",
            summary="both towers of CLIP and SigLIP",
        ),
        BackendSpec(
            "vision_language",
            "adapterkit.backends.multimodal:VisionLanguageBackend",
            models=("transformers:LlavaPreTrainedModel",),
            extra="vision",
            summary="LLaVA, with any image encoder and language model that a backend knows",
        ),
        BackendSpec(
            "qwen_vision_language",
            "adapterkit.backends.multimodal:QwenVisionLanguageBackend",
            models=(
                "transformers:Qwen2_5_VLModel",
                "transformers:Qwen2_5_VLForConditionalGeneration",
                "transformers:Qwen3VLModel",
                "transformers:Qwen3VLForConditionalGeneration",
            ),
            extra="vision",
            summary="Qwen2.5-VL and Qwen3-VL",
        ),
        BackendSpec(
            "unet",
            "adapterkit.backends.diffusion:UNetBackend",
            models=("diffusers:UNet2DConditionModel",),
            extra="diffusion",
            summary="the UNets of Stable Diffusion 1.5, 2.1 and XL",
        ),
        BackendSpec(
            "sd3",
            "adapterkit.backends.diffusion_transformers:SD3Backend",
            models=("diffusers:SD3Transformer2DModel",),
            extra="diffusion",
            summary="the transformers of Stable Diffusion 3 and 3.5",
        ),
        BackendSpec(
            "flux",
            "adapterkit.backends.diffusion_transformers:FluxBackend",
            models=("diffusers:FluxTransformer2DModel",),
            extra="diffusion",
            summary="the transformers of Flux",
        ),
        BackendSpec(
            "pixart",
            "adapterkit.backends.diffusion_transformers:PixArtBackend",
            models=("diffusers:PixArtTransformer2DModel",),
            extra="diffusion",
            summary="the transformers of PixArt-alpha and PixArt-Sigma",
        ),
        BackendSpec(
            "sana",
            "adapterkit.backends.diffusion_transformers:SanaBackend",
            models=("diffusers:SanaTransformer2DModel",),
            extra="diffusion",
            summary="the transformers of Sana",
        ),
        BackendSpec(
            "controlnet",
            "adapterkit.backends.diffusion_companions:ControlNetBackend",
            models=("diffusers:ControlNetModel",),
            extra="diffusion",
            summary="the ControlNets of Stable Diffusion 1.5, 2.1 and XL",
        ),
        BackendSpec(
            "sd3_controlnet",
            "adapterkit.backends.diffusion_companions:SD3ControlNetBackend",
            models=("diffusers:SD3ControlNetModel",),
            extra="diffusion",
            summary="the ControlNets of Stable Diffusion 3 and 3.5",
        ),
        BackendSpec(
            "flux_controlnet",
            "adapterkit.backends.diffusion_companions:FluxControlNetBackend",
            models=("diffusers:FluxControlNetModel",),
            extra="diffusion",
            summary="the ControlNets of Flux",
        ),
        BackendSpec(
            "autoencoder",
            "adapterkit.backends.diffusion_companions:AutoencoderBackend",
            models=("diffusers:AutoencoderKL",),
            extra="diffusion",
            summary="the autoencoders of Stable Diffusion and Flux, given by themselves",
        ),
        BackendSpec(
            "generic",
            "adapterkit.backends.generic:GenericBackend",
            models=("torch:Module",),
            summary="any other model: its layers, by class and by names that leave no doubt",
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
