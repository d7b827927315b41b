"""What the original checkpoints of Stable Diffusion 3 and 3.5 call the modules of their transformers."""

from __future__ import annotations

from adapterkit.contract.naming import KnownBase
from adapterkit.formats.names.tables import TableNaming, under

_BLOCK = (
    ("context_block.adaLN_modulation.1", "norm1_context.linear ?ff_context"),
    ("context_block.adaLN_modulation.1", "~norm1_context.linear"),
    ("context_block.attn.qkv", "attn.add_q_proj attn.add_k_proj attn.add_v_proj"),
    ("context_block.attn.proj", "attn.to_add_out"),
    ("context_block.attn.ln_q", "attn.norm_added_q"),
    ("context_block.attn.ln_k", "attn.norm_added_k"),
    ("context_block.mlp.fc1", "ff_context.net.0.proj"),
    ("context_block.mlp.fc2", "ff_context.net.2"),
    ("x_block.adaLN_modulation.1", "norm1.linear"),
    ("x_block.attn.qkv", "attn.to_q attn.to_k attn.to_v"),
    ("x_block.attn.proj", "attn.to_out.0"),
    ("x_block.attn.ln_q", "attn.norm_q"),
    ("x_block.attn.ln_k", "attn.norm_k"),
    ("x_block.attn2.qkv", "attn2.to_q attn2.to_k attn2.to_v"),
    ("x_block.attn2.proj", "attn2.to_out.0"),
    ("x_block.attn2.ln_q", "attn2.norm_q"),
    ("x_block.attn2.ln_k", "attn2.norm_k"),
    ("x_block.mlp.fc1", "ff.net.0.proj"),
    ("x_block.mlp.fc2", "ff.net.2"),
)
TABLE = (
    *under("joint_blocks.#.", "transformer_blocks.#.", _BLOCK),
    ("x_embedder.proj", "pos_embed.proj"),
    ("context_embedder", "context_embedder"),
    ("t_embedder.mlp.0", "time_text_embed.timestep_embedder.linear_1"),
    ("t_embedder.mlp.2", "time_text_embed.timestep_embedder.linear_2"),
    ("y_embedder.mlp.0", "time_text_embed.text_embedder.linear_1"),
    ("y_embedder.mlp.2", "time_text_embed.text_embedder.linear_2"),
    ("final_layer.linear", "proj_out"),
    ("final_layer.adaLN_modulation.1", "~norm_out.linear"),
)


class SD3Naming(TableNaming):
    """Joint blocks of two streams; the modulation of the last block's text is in another order than the others."""

    table = TABLE
    known = KnownBase("sd3", "stable-diffusion-3", "https://github.com/Stability-AI/sd3.5")
