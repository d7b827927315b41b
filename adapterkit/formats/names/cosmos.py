"""What the original checkpoints of Cosmos-Predict 2, and of Anima, call the modules of its transformer."""

from __future__ import annotations

from adapterkit.contract.naming import KnownBase
from adapterkit.formats.names.tables import TableNaming, under

_ATTENTION = (
    ("q_proj", "to_q"),
    ("k_proj", "to_k"),
    ("v_proj", "to_v"),
    ("output_proj", "to_out.0"),
    ("q_norm", "norm_q"),
    ("k_norm", "norm_k"),
)
_BLOCK = (
    *under("self_attn.", "attn1.", _ATTENTION),
    *under("cross_attn.", "attn2.", _ATTENTION),
    ("mlp.layer1", "ff.net.0.proj"),
    ("mlp.layer2", "ff.net.2"),
    ("adaln_modulation_self_attn.1", "norm1.linear_1"),
    ("adaln_modulation_self_attn.2", "norm1.linear_2"),
    ("adaln_modulation_cross_attn.1", "norm2.linear_1"),
    ("adaln_modulation_cross_attn.2", "norm2.linear_2"),
    ("adaln_modulation_mlp.1", "norm3.linear_1"),
    ("adaln_modulation_mlp.2", "norm3.linear_2"),
)


class CosmosNaming(TableNaming):
    """Those of the second generation."""

    table = (
        *under("blocks.#.", "transformer_blocks.#.", _BLOCK),
        ("x_embedder.proj.1", "patch_embed.proj"),
        ("t_embedder.1.linear_1", "time_embed.t_embedder.linear_1"),
        ("t_embedder.1.linear_2", "time_embed.t_embedder.linear_2"),
        ("t_embedding_norm", "time_embed.norm"),
        ("final_layer.adaln_modulation.1", "norm_out.linear_1"),
        ("final_layer.adaln_modulation.2", "norm_out.linear_2"),
        ("final_layer.linear", "proj_out"),
    )
    known = KnownBase(
        "cosmos_predict2", "cosmos-predict2", "https://github.com/nvidia-cosmos/cosmos-predict2", folded=True
    )
