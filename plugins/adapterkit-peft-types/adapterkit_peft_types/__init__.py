"""Types of PEFT. This module is what adapterkit imports when it starts, so it imports no torch."""

from __future__ import annotations

from adapterkit import hookimpl
from adapterkit.specs import AdapterSpec

# One line a type, in the order of their names.
_TYPES = (
    ("beft", "beft:BEFT", "weight", "a bias beside the one that a projection has"),
    ("cpt", "cpt:CPT", "tokens", "examples as a prompt, whose vectors move a little"),
    ("delora", "delora:DeLoRA", "weight", "a low-rank update whose size is bounded, and learnt apart"),
    ("elementwise_glora", "glora:ElementwiseGLoRA", "weight", "weight and bias scaled and shifted, element by element"),
    ("gralora", "gralora:GraLoRA", "weight", "low-rank updates of the blocks of a weight"),
    ("hira", "hira:HiRA", "weight", "a weight times a low-rank one, element by element"),
    ("lily", "lily:Lily", "weight", "low-rank updates whose second factors all layers share, mixed by a router"),
    ("osf", "osf:OSF", "weight", "a weight's smaller singular values and their vectors, learnt anew"),
    ("psoft", "psoft:PSOFT", "weight", "a rotation inside of a weight's principal subspace"),
)  # fmt: skip


@hookimpl
def adapterkit_register_adapters() -> list[AdapterSpec]:
    """Adds every type of `_TYPES`."""
    return [
        AdapterSpec(name, f"adapterkit_peft_types.{target}", kinds={kind}, summary=summary)
        for name, target, kind, summary in _TYPES
    ]
