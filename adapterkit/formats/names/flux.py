"""What the original checkpoints of Flux and of Chroma call the modules of their transformers."""

from __future__ import annotations

from adapterkit.contract.naming import KnownBase
from adapterkit.formats.names.tables import TableNaming, under

_DOUBLE = (
    ("img_mod.lin", "norm1.linear"),
    ("img_attn.qkv", "attn.to_q attn.to_k attn.to_v"),
    ("img_attn.proj", "attn.to_out.0"),
    ("img_attn.norm.query_norm", "attn.norm_q"),
    ("img_attn.norm.key_norm", "attn.norm_k"),
    ("img_mlp.0", "ff.net.0.proj"),
    ("img_mlp.2", "ff.net.2"),
    ("txt_mod.lin", "norm1_context.linear"),
    ("txt_attn.qkv", "attn.add_q_proj attn.add_k_proj attn.add_v_proj"),
    ("txt_attn.proj", "attn.to_add_out"),
    ("txt_attn.norm.query_norm", "attn.norm_added_q"),
    ("txt_attn.norm.key_norm", "attn.norm_added_k"),
    ("txt_mlp.0", "ff_context.net.0.proj"),
    ("txt_mlp.2", "ff_context.net.2"),
)
_SINGLE = (
    ("modulation.lin", "norm.linear"),
    ("linear1", "attn.to_q attn.to_k attn.to_v proj_mlp"),
    ("linear1_qkv", "attn.to_q attn.to_k attn.to_v"),
    ("linear2", "proj_out"),
    ("norm.query_norm", "attn.norm_q"),
    ("norm.key_norm", "attn.norm_k"),
)
_DOUBLE_OF_XLABS = (
    ("processor.qkv_lora1", "attn.to_q attn.to_k attn.to_v"),
    ("processor.qkv_lora2", "attn.add_q_proj attn.add_k_proj attn.add_v_proj"),
    ("processor.proj_lora1", "attn.to_out.0"),
    ("processor.proj_lora2", "attn.to_add_out"),
)
_SINGLE_OF_XLABS = (("processor.qkv_lora", "attn.to_q attn.to_k attn.to_v"), ("processor.proj_lora", "proj_out"))
TABLE = (
    *under("double_blocks.#.", "transformer_blocks.#.", _DOUBLE),
    *under("single_blocks.#.", "single_transformer_blocks.#.", _SINGLE),
    ("img_in", "x_embedder"),
    ("txt_in", "context_embedder"),
    ("time_in.in_layer", "time_text_embed.timestep_embedder.linear_1"),
    ("time_in.out_layer", "time_text_embed.timestep_embedder.linear_2"),
    ("vector_in.in_layer", "time_text_embed.text_embedder.linear_1"),
    ("vector_in.out_layer", "time_text_embed.text_embedder.linear_2"),
    ("guidance_in.in_layer", "time_text_embed.guidance_embedder.linear_1"),
    ("guidance_in.out_layer", "time_text_embed.guidance_embedder.linear_2"),
    ("final_layer.linear", "proj_out"),
    ("final_layer.adaLN_modulation.1", "~norm_out.linear"),
    *under("double_blocks.#.", "transformer_blocks.#.", _DOUBLE_OF_XLABS),
    *under("single_blocks.#.", "single_transformer_blocks.#.", _SINGLE_OF_XLABS),
)


class FluxNaming(TableNaming):
    """Queries, keys, values, and in single blocks the first layer of the MLP, are one module."""

    table = TABLE
    known = KnownBase("flux1", "flux-1-dev", "https://github.com/black-forest-labs/flux")


class ChromaNaming(TableNaming):
    """As Flux, with a network in the place of modulations."""

    table = (
        *TABLE,
        ("distilled_guidance_layer.layers.#.in_layer", "distilled_guidance_layer.layers.#.linear_1"),
        ("distilled_guidance_layer.layers.#.out_layer", "distilled_guidance_layer.layers.#.linear_2"),
    )
    known = KnownBase("chroma", "chroma", "https://huggingface.co/lodestones/Chroma")
