"""A model family as data, for backends: see `adapterkit.mapping.family`."""

from adapterkit.mapping.family import (
    Attention,
    Entry,
    Experts,
    Fused,
    FusedInput,
    Group,
    Output,
    Read,
    Tokens,
    Weight,
    equal_parts,
    first_path,
    grouped_heads,
    is_class,
    resolve,
    weight_layout,
)

__all__ = [
    "Attention",
    "Entry",
    "Experts",
    "Fused",
    "FusedInput",
    "Group",
    "Output",
    "Read",
    "Tokens",
    "Weight",
    "equal_parts",
    "first_path",
    "grouped_heads",
    "is_class",
    "resolve",
    "weight_layout",
]
