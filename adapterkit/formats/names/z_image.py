"""What the original checkpoints of Z-Image call the modules of its transformer."""

from __future__ import annotations

from adapterkit.contract.naming import KnownBase
from adapterkit.contract.view import ComponentView
from adapterkit.formats.names.tables import TableNaming, under

_BLOCK = (
    ("attention.qkv", "attention.to_q attention.to_k attention.to_v"),
    ("attention.out", "attention.to_out.0"),
    ("attention.q_norm", "attention.norm_q"),
    ("attention.k_norm", "attention.norm_k"),
)
TABLE = (
    *under("layers.#.", "layers.#.", _BLOCK),
    *under("noise_refiner.#.", "noise_refiner.#.", _BLOCK),
    *under("context_refiner.#.", "context_refiner.#.", _BLOCK),
    ("x_embedder", "all_x_embedder.2-1"),
    ("final_layer.linear", "all_final_layer.2-1.linear"),
    ("final_layer.adaLN_modulation.1", "all_final_layer.2-1.adaLN_modulation.1"),
)


class ZImageNaming(TableNaming):
    """Queries, keys and values are one module."""

    table = TABLE
    known = KnownBase("z_image", "Z-Image", "https://github.com/Tongyi-MAI/Z-Image", folded=True)

    def in_files(self, component: ComponentView, style: str) -> bool:
        return style != "comfy"  # queries, keys and values are apart there, as here
