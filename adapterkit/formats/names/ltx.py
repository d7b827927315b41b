"""What the original checkpoints of LTX-Video call the modules of its transformer."""

from __future__ import annotations

from adapterkit.formats.names.tables import TableNaming, under
from adapterkit.naming import KnownBase

_BLOCK = (
    ("attn1.q_norm", "attn1.norm_q"),
    ("attn1.k_norm", "attn1.norm_k"),
    ("attn2.q_norm", "attn2.norm_q"),
    ("attn2.k_norm", "attn2.norm_k"),
)
TABLE = (
    *under("transformer_blocks.#.", "transformer_blocks.#.", _BLOCK),
    ("patchify_proj", "proj_in"),
    ("adaln_single.emb.timestep_embedder.linear_1", "time_embed.emb.timestep_embedder.linear_1"),
    ("adaln_single.emb.timestep_embedder.linear_2", "time_embed.emb.timestep_embedder.linear_2"),
    ("adaln_single.linear", "time_embed.linear"),
)


class LTXNaming(TableNaming):
    """Most names are the same."""

    table = TABLE
    known = KnownBase("ltxv", "ltx-video", "https://github.com/Lightricks/LTX-Video", 768, 512, folded=True)
