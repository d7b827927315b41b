"""Attentions by the children that they have."""

from __future__ import annotations

from typing import Any

from adapterkit.mapping.entries import Fused, SplitRows, Weight
from adapterkit.mapping.templates.template import AttentionTemplate

_OUT = "o_proj|out_proj|dense|c_proj|proj|Wo|wo|out_lin|to_out.0|to_out|output_projection|proj_out|out|output"


def layers(told: str, split: SplitRows | None = None) -> tuple[Weight | Fused, ...]:
    """Entries as `q to_q, k+v to_kv, o to_out`: the role, or those that one layer makes, and its path."""
    return tuple(_layer(one, split) for one in told.split(","))


def _layer(told: str, split: SplitRows | None) -> Weight | Fused:
    roles, path = told.split()
    names = tuple(f"*.{role}" for role in roles.split("+"))
    return Weight(names[0], path) if len(names) == 1 else Fused(names, path, split)


def attention(told: str, split: SplitRows | None = None, also: str = "", **further: Any) -> AttentionTemplate:
    """A template of an attention that has the layers told, the one of its output if it is named `also`.

    Args:
        told: See `layers`.
        split: As of `Fused`.
        also: What it has beside them.
        **further: See `AttentionTemplate`.
    """
    entries = layers(told, split)
    has = [one.path for one in entries if isinstance(one, Fused) or one.role != "*.o"]
    return AttentionTemplate(" ".join([*has, *also.split()]), entries, **further)


def apart(q: str, k: str, v: str, o: str = _OUT, **further: Any) -> AttentionTemplate:
    """Queries, keys and values each by a layer of its own."""
    return attention(f"q {q}, k {k}, v {v}, o {o}", **further)


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
