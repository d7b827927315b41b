"""Attentions by the children that they have."""

from __future__ import annotations

from adapterkit.mapping.entries import Fused, Weight
from adapterkit.mapping.templates.template import AttentionTemplate, Heads

_OUT = "o_proj|out_proj|dense|c_proj|proj|Wo|wo|out_lin|to_out.0|to_out|output_projection|proj_out|out|output"


def _projections(q: str, k: str, v: str, o: str = _OUT) -> tuple[Weight, ...]:
    return tuple(Weight(f"*.{role}", path) for role, path in zip("qkvo", (q, k, v, o), strict=True) if path)


def apart(q: str, k: str, v: str, o: str = _OUT, *, at: str = "", without: str = "") -> AttentionTemplate:
    """Queries, keys and values each by a layer of its own."""
    return AttentionTemplate(f"{q} {k} {v}", _projections(q, k, v, o), without, at=at)


def fused(qkv: str, o: str = _OUT, *, heads: Heads | None = None) -> AttentionTemplate:
    """Queries, keys and values by one layer, a third of the rows each."""
    return AttentionTemplate(qkv, (Fused(("*.q", "*.k", "*.v"), qkv), Weight("*.o", o)), heads=heads)


ATTENTIONS: tuple[AttentionTemplate, ...] = (
    apart("q_proj", "k_proj", "v_proj"),
    # BERT: what attends is a module, and what projects its output another one.
    apart("self.query", "self.key", "self.value", "output.dense", at="self"),
    apart("attention.query", "attention.key", "attention.value", "output.dense", at="attention"),
    apart("query", "key", "value"),
    apart("to_q", "to_k", "to_v", without="to_qkv to_kv"),
    apart("q_lin", "k_lin", "v_lin"),
    apart("Wq", "Wk", "Wv"),
    apart("wq", "wk", "wv"),
    apart("q", "k", "v", "o|proj"),
)
"""The first that matches is a module's."""
