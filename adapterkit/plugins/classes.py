"""The classes of models that the built-in families map, each of them named here and nowhere else. Torch-free.

What registers a family (`builtin`) and the family's own table read them here: another class of a known layout is one
word more. Layout -> names of classes in the family's library; models derived from one of them are of that layout.
"""

from __future__ import annotations

from collections.abc import Mapping

Layouts = Mapping[str, tuple[str, ...]]

LANGUAGE: Layouts = {
    "llama": ("LlamaPreTrainedModel", "MistralPreTrainedModel", "Qwen2PreTrainedModel", "Qwen3PreTrainedModel"),
    "gemma": ("Gemma2PreTrainedModel", "Gemma3TextModel", "Gemma3ForCausalLM", "Gemma3TextForSequenceClassification"),
    "phi3": ("Phi3PreTrainedModel",),
    "gpt2": ("GPT2PreTrainedModel",),
    "neox": ("GPTNeoXPreTrainedModel",),
    "opt": ("OPTPreTrainedModel",),
    "bloom": ("BloomPreTrainedModel",),
    "falcon": ("FalconPreTrainedModel",),
    "mpt": ("MptPreTrainedModel",),
    "bert": (
        "BertPreTrainedModel",
        "RobertaPreTrainedModel",
        "XLMRobertaPreTrainedModel",
        "ElectraPreTrainedModel",
    ),
    "deberta": ("DebertaV2PreTrainedModel",),
    "modernbert": ("ModernBertPreTrainedModel",),
}
SEQ2SEQ: Layouts = {
    "t5": ("T5PreTrainedModel", "MT5PreTrainedModel", "UMT5PreTrainedModel"),
    "bart": ("BartPreTrainedModel",),
    "whisper": ("WhisperPreTrainedModel",),
}
STATE_SPACE: Layouts = {"mamba": ("MambaPreTrainedModel",)}
EXPERTS: Layouts = {
    "mixtral": ("MixtralPreTrainedModel",),
    "qwen3": ("Qwen3MoePreTrainedModel",),
    "deepseek": ("DeepseekV3PreTrainedModel",),
    "gpt_oss": ("GptOssPreTrainedModel",),
    "llama4": ("Llama4TextModel", "Llama4ForCausalLM"),
}
VISION: Layouts = {
    "dinov2": ("Dinov2PreTrainedModel", "Dinov2WithRegistersPreTrainedModel"),
    "dinov3": ("DINOv3ViTPreTrainedModel",),
    "beit": ("BeitPreTrainedModel",),
    "swin": ("SwinPreTrainedModel",),
    "clip": ("CLIPVisionModel", "CLIPVisionModelWithProjection", "CLIPForImageClassification"),
    "siglip": ("SiglipVisionModel", "SiglipForImageClassification"),
}
SIGLIP_TEXT: Layouts = {"siglip_text": ("SiglipTextModel",)}


def named(layouts: Layouts) -> str:
    """Every class of a backend, separated by spaces."""
    return " ".join(name for names in layouts.values() for name in names)
