"""What the original checkpoints of Lumina Image 2 call the modules of its transformer."""

from __future__ import annotations

from adapterkit.contract.naming import KnownBase
from adapterkit.formats.names.tables import TableNaming, under

_BLOCK = (
    ("attention.qkv", "attn.to_q attn.to_k attn.to_v"),
    ("attention.out", "attn.to_out.0"),
    ("attention.q_norm", "attn.norm_q"),
    ("attention.k_norm", "attn.norm_k"),
    ("feed_forward.w1", "feed_forward.linear_1"),
    ("feed_forward.w2", "feed_forward.linear_2"),
    ("feed_forward.w3", "feed_forward.linear_3"),
    ("adaLN_modulation.1", "norm1.linear"),
    ("attention_norm1", "norm1.norm"),
    ("attention_norm1", "norm1"),
    ("attention_norm2", "norm2"),
)
TABLE = (
    *under("layers.#.", "layers.#.", _BLOCK),
    *under("noise_refiner.#.", "noise_refiner.#.", _BLOCK),
    *under("context_refiner.#.", "context_refiner.#.", _BLOCK),
    ("cap_embedder.0", "time_caption_embed.caption_embedder.0"),
    ("cap_embedder.1", "time_caption_embed.caption_embedder.1"),
    ("t_embedder.mlp.0", "time_caption_embed.timestep_embedder.linear_1"),
    ("t_embedder.mlp.2", "time_caption_embed.timestep_embedder.linear_2"),
    ("final_layer.adaLN_modulation.1", "norm_out.linear_1"),
    ("final_layer.linear", "norm_out.linear_2"),
)


class Lumina2Naming(TableNaming):
    """Queries, keys and values are one module; there are fewer keys than queries."""

    table = TABLE
    known = KnownBase("lumina2", "lumina-2", "https://github.com/Alpha-VLLM/Lumina-Image-2.0", folded=True)
