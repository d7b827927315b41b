"""What attributes of transformers' configs mean, by name: widths, depths, experts, vocabularies."""

from collections.abc import Mapping
from typing import Final

WIDTHS: Final = frozenset(  # have to agree with others: divided exactly
    ["hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embed_dim", "hidden_dim", "embedding_size", "word_embed_proj_dim", "embedding_dim", "hidden_sizes", "attention_hidden_size", "hidden_size_global", "hidden_size_per_layer_input", "out_hidden_size", "projection_dim", "projector_hidden_size", "encoder_hidden_size", "decoder_hidden_size", "text_hidden_size", "image_text_hidden_size", "output_dim", "vision_output_dim", "cross_attention_hidden_size", "encoder_width", "kv_lora_rank", "q_lora_rank", "o_lora_rank", "linear_key_head_dim", "linear_value_head_dim", "linear_head_dim", "mamba_d_head", "mamba_head_dim", "rotary_dim", "ple_embed_dim", "pooler_hidden_size", "lru_width", "vision_hidden_size", "adapter_in_dim", "adapter_out_dim", "adapter_input_size", "attention_head_size", "mm_hidden_size", "vocab_embed_dim", "d_embed", "cross_attention_dim", "backbone_hidden_size", "true_hidden_size", "intra_bottleneck_size", "prediction_head_size"]
)
HEAD_WIDTHS: Final = frozenset(  # one head's, of which rotary embeddings take pairs
    ["head_dim", "d_kv", "kv_channels", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "qk_head_dim", "index_head_dim", "swa_head_dim", "global_head_dim", "d_head", "dim_head", "attention_head_dim", "resampler_head_dim", "swa_v_head_dim"]
)
INNER_WIDTHS: Final = frozenset(  # of one feed-forward, or one low rank: need not divide
    ["intermediate_size", "moe_intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "d_inner", "ffn_dim", "dim_ff", "dff", "ffn_hidden_size", "shared_expert_intermediate_size", "shared_experts_intermediate_size", "moe_shared_expert_intermediate_size", "shared_intermediate_size", "dense_intermediate_size", "intermediate_size_mlp", "alignment_intermediate_size", "n_inner", "mlp_dim", "laurel_rank", "adapter_rank", "adapter_hidden_dim", "expert_ffn_hidden_size", "moe_ffn_hidden_size", "block_ff_dim", "block_auto_adjust_ff_dim", "router_hidden_size", "zaya_mlp_expansion", "speech_encoder_intermediate_size", "t2u_encoder_ffn_dim", "t2u_decoder_ffn_dim"]
)
MODEL_WIDTHS: Final = ("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embed_dim", "hidden_sizes")
HEAD_COUNTS: Final = frozenset(
    ["num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads", "attention_heads"]
)
DEPTHS: Final = frozenset(
    ["num_hidden_layers", "n_layer", "num_layers", "n_layers", "depth", "layers", "encoder_layers", "decoder_layers", "num_decoder_layers", "num_encoder_layers", "resampler_depth", "num_hidden_groups", "num_blocks"]
)
INDEX_LISTS: Final = frozenset(  # hold numbers of layers
    ["mlp_only_layers", "full_attn_idxs", "moe_layers", "cross_attention_layers", "hybrid_layer_ids", "kv_source_layers", "deepstack_visual_indexes", "fullatt_block_indexes", "global_attn_indexes", "ple_layer_ids", "rope_scaling_layers", "intermediate_layers_indices"]
)
VOCABULARIES: Final = frozenset(
    ["vocab_size", "vocab_size_per_layer_input", "encoder_hash_byte_group_vocab", "unpadded_vocab_size", "entity_vocab_size", "t2u_vocab_size", "unit_hifi_gan_vocab_size", "src_vocab_size", "tgt_vocab_size"]
)
SHARED_BLOCKS: Final = frozenset({"zamba", "zamba2"})  # one block at several layers: seen where it acts twice
AT_MOST: Final[Mapping[str, int]] = {
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_local_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_top_k": 2,
    "moe_k": 2,
    "top_k_experts": 2,
    "n_group": 2,
    "num_expert_group": 2,
    "topk_group": 1,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "max_seq_len": 64,
    "max_source_positions": 64,
    "max_target_positions": 64,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "decoder_sparse_step": 2,
    "encoder_sparse_step": 2,
    "num_nextn_predict_layers": 0,
    "depths": 2,
    "block_sizes": 2,
    "attention_window": 4,
    "zero_expert_num": 2,
}
