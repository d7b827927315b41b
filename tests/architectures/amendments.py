"""Defaults that the libraries themselves cannot build, as the least that has to be said to mend them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_ROPE = {"full_attention": {"rope_type": "default", "rope_theta": 50000.0}}
_INDEXER = {
    "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 256, "indexer_budget": 2048,
    "indexer_compress_ratio": 16,
}  # fmt: skip
_ASSISTANT = {
    "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0, "enable_moe_block": False,
    "use_double_wide_mlp": False, "num_kv_shared_layers": 30, "num_hidden_layers": 30,
}  # fmt: skip

_EMU3_TOKENS = {"<image>": 151669, "<|extra_200|>": 5, "<|visual token 000000|>": 6, "<|visual token 032767|>": 7}

_HUNYUAN = {"in_channels": 4, "patch_size": 2}

AMENDED: Mapping[str, Mapping[str, Any]] = {
    # transformers: what the config is given. Sizes that the default leaves open are those of a published checkpoint,
    # or those of a sibling.
    "BambaForCausalLM": {"attn_layer_indices": [9, 18, 27]},
    "GraniteMoeHybridForCausalLM": {"layer_types": ["linear_attention", "full_attention"] * 16},
    "CohereCompassForCausalLM": {"rope_parameters": _ROPE},
    "CohereCompassForConditionalGeneration": {"text_config": {"rope_parameters": _ROPE}},
    "DbrxForCausalLM": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 8, "clip_qkv": 8.0}},
    "Dots1ForCausalLM": {"n_routed_experts": 8, "n_shared_experts": 2},
    "HunYuanDenseV1ForCausalLM": {"head_dim": 128},
    "HunYuanMoEV1ForCausalLM": {"head_dim": 128},
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"] * 16},
    "MinistralForCausalLM": {"head_dim": 128},
    "NemotronForCausalLM": {"num_key_value_heads": 8},
    "Gemma4AssistantForCausalLM": {"text_config": _ASSISTANT},
    "Qwen4ExpForCausalLM": _INDEXER,
    "Qwen4ExpForConditionalGeneration": {"text_config": _INDEXER},
    "DeepseekOcr2ForConditionalGeneration": {"text_config": {"mlp_layer_types": ["dense"] + ["sparse"] * 31}},
    "DiffusionGemmaForBlockDiffusion": {
        "text_config": {"num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 704}
    },
    "ReformerModelWithLMHead": {"is_decoder": True},
    "EsmForMaskedLM": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "Wav2Vec2BertForCTC": {"vocab_size": 32},
    "Wav2Vec2ConformerForCTC": {"vocab_size": 32},
    "AyaVisionForConditionalGeneration": {
        "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 1152, "num_attention_heads": 16}
    },
    "ChameleonForConditionalGeneration": {"vocabulary_map": {"<image>": 8711, "IMGIMGA0Z": 4}},
    "Emu3ForConditionalGeneration": {"vocabulary_map": _EMU3_TOKENS},
    "PerceptionLMForConditionalGeneration": {
        "vision_config": {
            "model_type": "timm_wrapper",
            "architecture": "vit_pe_core_base_patch16_224",
            "model_args": {"embed_dim": 768, "global_pool": "", "use_post_transformer_norm": False},
            "do_pooling": False,
        }
    },
    "Glm4vMoeForConditionalGeneration": {"text_config": {"head_dim": 128}},
    "Step3p7ForConditionalGeneration": {"text_config": {"sliding_window": 512}},
    "HunYuanVLForConditionalGeneration": {"text_config": {"head_dim": 128}},
    "Granite4VisionForConditionalGeneration": {"deepstack_layer_map": [[0, 0]], "downsample_rate": "4/8"},
    # diffusers: sizes that have no default, as the models that exist have them.
    "ControlNetUnionModel": {"addition_time_embed_dim": 256},
    "DreamLiteTransformer2DModel": {"in_channels": 1408},
    "EasyAnimateTransformer3DModel": {"in_channels": 16, "out_channels": 16, "patch_size": 2},
    "HiDreamImageTransformer2DModel": {
        "patch_size": 2,
        "caption_channels": [4096, 4096],
        "llama_layers": [*range(32)] + [31] * 16,
    },
    "HunyuanDiT2DControlNetModel": _HUNYUAN,
    "HunyuanDiT2DModel": _HUNYUAN,
    "LatteTransformer3DModel": {
        "in_channels": 4,
        "patch_size": 2,
        "caption_channels": 4096,
        "cross_attention_dim": 1408,
        "norm_type": "ada_norm_single",
        "num_embeds_ada_norm": 1000,
    },
    "LuminaNextDiT2DModel": {"num_kv_heads": 8},
    "OmniGenTransformer2DModel": {"rope_scaling": {"short_factor": [1.0] * 48, "long_factor": [1.0] * 48}},
    "Transformer2DModel": {"in_channels": 1408, "cross_attention_dim": 768},
    "TransformerTemporalModel": {"in_channels": 1408},
    "ZImageControlNetModel": {
        "control_layers_places": [0, 5],
        "control_refiner_layers_places": [0, 1],
        "control_in_dim": 16,
    },
    "FluxMultiControlNetModel": {"controlnets": ["FluxControlNetModel"]},
    "HunyuanDiT2DMultiControlNetModel": {"controlnets": ["HunyuanDiT2DControlNetModel"]},
    "MultiControlNetModel": {"controlnets": ["ControlNetModel"]},
    "MultiControlNetUnionModel": {"controlnets": ["ControlNetUnionModel"]},
    "QwenImageMultiControlNetModel": {"controlnets": ["QwenImageControlNetModel"]},
    "SD3MultiControlNetModel": {"controlnets": ["SD3ControlNetModel"]},
}
"""Name of a class -> what to say: to its config of transformers, to a class of diffusers itself."""
