"""Whether a block's forward uses its children as a template says: names, order, widths."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import nn

from adapterkit.mapping.entries import Output
from adapterkit.mapping.forward_order import called_children, names_of, precedes
from adapterkit.mapping.layouts import first_path, module_at
from adapterkit.mapping.templates import BlockTemplate


def most_told(templates: Sequence[BlockTemplate]) -> list[BlockTemplate]:
    """The templates of which no other says all children and more."""
    said = [set(one.has.split()) for one in templates]
    return [one for one, names in zip(templates, said, strict=True) if not any(names < others for others in said)]


def is_arranged(template: BlockTemplate, block: nn.Module) -> bool:
    """Whether the block's forward names what the template says, and calls norms before and behind the sublayers."""
    named = names_of(block)
    if not named.isdisjoint(template.unless.split()) or (template.names and named.isdisjoint(template.names.split())):
        return False
    order = template.order.split()
    if not all(_follows(block, first, second) for first, second in itertools.pairwise(order)):
        return False
    outputs = [entry for entry in template.entries if isinstance(entry, Output)]
    wide = all(_is_as_wide(entry, block) for entry in outputs)
    return wide and (template.branches or all(_is_ordered(entry, block) for entry in outputs))


def _is_as_wide(entry: Output, block: nn.Module) -> bool:
    """Whether a sublayer makes what its x is: not in a block that joins x with something before its norm."""
    norm, core = (first_path(block, path) if path else None for path in (entry.norm_in, entry.core))
    if norm is None or core is None or not isinstance(last := module_at(block, core), nn.Linear):
        return True
    gain = module_at(block, norm)._parameters.get("weight")
    return gain is None or gain.dim() != 1 or gain.numel() == last.out_features


def _is_ordered(entry: Output, block: nn.Module) -> bool:
    core = first_path(block, entry.core)
    if core is None:
        return True
    norm_in, norm_out = (first_path(block, path) if path else None for path in (entry.norm_in, entry.norm_out))
    return (norm_in is None or _follows(block, norm_in, core)) and (norm_out is None or _follows(block, core, norm_out))


def _follows(block: nn.Module, first: str, second: str) -> bool:
    """Whether the module at `second` is called behind that at `first`, in the smallest module that holds both."""
    while (step := first.partition(".")[0]) == second.partition(".")[0] and "." in first and "." in second:
        block, first, second = block.get_submodule(step), first.partition(".")[2], second.partition(".")[2]
    first, second = first.partition(".")[0], second.partition(".")[0]
    calls = called_children(block)
    return first == second or (calls is not None and precedes(calls, first, second))
