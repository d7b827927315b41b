"""What the original checkpoints of AuraFlow call the modules of its transformer."""

from __future__ import annotations

from adapterkit.contract.naming import KnownBase
from adapterkit.formats.names.tables import TableNaming, under

_MLP = (("c_fc1", "linear_1"), ("c_fc2", "linear_2"), ("c_proj", "out_projection"))
_DOUBLE = (
    *under("mlpX.", "ff.", _MLP),
    *under("mlpC.", "ff_context.", _MLP),
    ("modX.1", "norm1.linear"),
    ("modC.1", "norm1_context.linear"),
    ("attn.w2q", "attn.to_q"),
    ("attn.w2k", "attn.to_k"),
    ("attn.w2v", "attn.to_v"),
    ("attn.w2o", "attn.to_out.0"),
    ("attn.w1q", "attn.add_q_proj"),
    ("attn.w1k", "attn.add_k_proj"),
    ("attn.w1v", "attn.add_v_proj"),
    ("attn.w1o", "attn.to_add_out"),
)
_SINGLE = (
    *under("mlp.", "ff.", _MLP),
    ("modCX.1", "norm1.linear"),
    ("attn.w1q", "attn.to_q"),
    ("attn.w1k", "attn.to_k"),
    ("attn.w1v", "attn.to_v"),
    ("attn.w1o", "attn.to_out.0"),
)
TABLE = (
    *under("double_layers.#.", "joint_transformer_blocks.#.", _DOUBLE),
    *under("single_layers.#.", "single_transformer_blocks.#.", _SINGLE),
    ("t_embedder.mlp.0", "time_step_proj.linear_1"),
    ("t_embedder.mlp.2", "time_step_proj.linear_2"),
    ("cond_seq_linear", "context_embedder"),
    ("init_x_linear", "pos_embed.proj"),
    ("final_linear", "proj_out"),
    ("modF.1", "~norm_out.linear"),
)


class AuraFlowNaming(TableNaming):
    """Double layers of two streams, then single ones."""

    table = TABLE
    known = KnownBase("auraflow", "auraflow-v1", "https://huggingface.co/fal/AuraFlow")
