"""Configs of small copies of diffusers' models: what each argument of theirs becomes.

`model.config` holds the arguments of `__init__`, whose names tell what they are: depths, heads, widths. What a class
wants beside these rules is in `diffusers_recipes.py`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from adapterkit.testing.specimens.diffusers_recipes import recipe_of

WIDTH, HEADS, HEAD_DIM = 32, 2, 16
"""Of every residual stream and every condition, so that widths that have to agree do."""

_DEPTH = """num_layers num_single_layers n_layers num_hidden_layers depth dit_depth nlayers transformer_num_layers
mmdit_layers num_mmdit_layers num_single_dit_layers num_visual_blocks layers_per_block num_res_blocks"""
_SHALLOW = """n_refiner_layers num_refiner_layers num_text_blocks num_layerwise_text_blocks num_refiner_text_blocks
perceiver_num_layers num_text_layers LFE_depth approximator_layers transformer_layers_per_block num_decoder_layers
temporal_transformer_layers_per_block motion_layers_per_block motion_transformer_layers_per_block"""
_HEADS = """num_attention_heads n_heads num_heads heads nheads dit_heads num_cross_attention_heads block_num_heads
audio_num_attention_heads text_num_attention_heads text_num_key_value_heads motion_num_attention_heads
cross_attn_num_heads LFE_num_heads face_encoder_num_heads addition_embed_type_num_heads num_trans_head
ctrl_num_attention_heads"""
_KEY_HEADS = "num_key_value_heads num_kv_heads n_kv_heads num_key_value_attention_heads"
_HEAD_DIM = """attention_head_dim head_dim cross_attention_head_dim audio_attention_head_dim cross_attn_dim_head
LFE_dim_head d_kv linear_head_dim"""
_WIDTH = """hidden_size dim model_dim dit_dim token_dim embed_dim d_model joint_attention_dim text_dim text_embed_dim
text_in_dim in_text_dim in_text_dim2 caption_channels cross_attention_dim context_in_dim cap_feat_dim encoder_hid_dim
caption_projection_dim pooled_projection_dim cross_attention_dim_t5 text_embed_2_dim text_embed_dim_t5 text_emb_dim
encoder_hidden_size image_dim image_embed_dim llm_features_dim text_hidden_dim dit_text_dim cond_token_dim
global_cond_dim condition_dim conditioning_dim embedding_dim cond_embed_dim audio_cross_attention_dim text_encoder_dim
clip_text_pooled_in_channels clip_embed_dim crossattn_proj_in_channels encoder_hidden_states_channels
img_context_dim_in img_context_dim_out time_embed_dim time_dim time_embed_hidden_dim global_states_input_dim
cross_attention_input_dim LFE_id_dim LFE_vit_dim LFE_output_dim added_kv_proj_dim image_proj_dim dim_cond
pair_repr_dim model_channels projection_dim embedding_proj_dim siglip_feat_dim num_trans_channel num_proj_channel
adaln_dim adaln_lora_dim approximator_hidden_dim t_emb_dim audio_acoustic_hidden_dim motion_style_dim
motion_encoder_dim face_encoder_hidden_dim"""
_INNER = """intermediate_size ffn_dim ff_dim ffn_hidden_size ff_inner_dim d_ff text_intermediate_size
moe_intermediate_dim tri_mult_c"""
_OTHER = {
    "vocab_size": 64,
    "codebook_size": 60,
    "audio_vocab_size": 64,
    "sample_size": 8,
    "sample_width": 8,
    "sample_height": 8,
    "pos_embed_max_size": 16,
    "num_experts": 4,
    "norm_num_groups": 4,
    "max_norm_num_groups": 4,
    "groups": 4,
    "num_embeds_ada_norm": 1000,
    "multiple_of": 16,
    "prior_vq_quantizer_codebook_size": 50,
}
"""Sizes that are neither of these, at most."""

_AXES = {1: (16,), 2: (8, 8), 3: (4, 4, 8), 4: (4, 4, 4, 4)}
_AXES_NAMES = "axes_dims_rope rope_axes_dim axes_dims axes_dim_rope rope_dim_list axes_dim rope_dim"


def _at_most(limit: int) -> Callable[[Any], Any]:
    def shrink(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(shrink(item) for item in value)
        return min(value, limit) if isinstance(value, int) and not isinstance(value, bool) else value

    return shrink


def _axes(value: Any) -> Any:
    return type(value)(_AXES[len(value)]) if isinstance(value, (list, tuple)) and len(value) in _AXES else value


_RULES: Mapping[str, Callable[[Any], Any]] = {
    **{name: _at_most(2) for name in f"{_DEPTH} {_HEADS} {_KEY_HEADS}".split()},
    **{name: _at_most(1) for name in _SHALLOW.split()},
    **{name: _at_most(HEAD_DIM) for name in _HEAD_DIM.split()},
    **{name: _at_most(WIDTH) for name in _WIDTH.split()},
    **{name: _at_most(2 * WIDTH) for name in _INNER.split()},
    **{name: _at_most(size) for name, size in _OTHER.items()},
    **dict.fromkeys(_AXES_NAMES.split(), _axes),
    "dropout": lambda value: 0.0,
    "dropout_rate": lambda value: 0.0,
    "hidden_dropout": lambda value: 0.0,
    "attention_dropout": lambda value: 0.0,
}


def arguments_of(model: nn.Module) -> dict[str, Any]:
    """What the model's class was called with."""
    names = inspect.signature(type(model).__init__).parameters
    config: Mapping[str, Any] = model.config  # type: ignore[assignment]
    return {name: config[name] for name in names if name in config}


def shrunk_arguments(model: nn.Module) -> dict[str, Any]:
    """What to call the model's class with, for a copy of a few thousand parameters and the same structure."""
    given = arguments_of(model)
    small = {name: _RULES[name](value) if name in _RULES else value for name, value in given.items()}
    for name in _KEY_HEADS.split():
        if isinstance(given.get(name), int):
            small[name] = _fewer_key_heads(given, name)
    return {**small, **recipe_of(type(model)).config}


def _fewer_key_heads(given: Mapping[str, Any], name: str) -> int:
    """One head of keys where there were fewer than of queries."""
    queries = next((given[other] for other in ("num_attention_heads", "n_heads") if given.get(other)), given[name])
    return HEADS if given[name] == queries else 1
