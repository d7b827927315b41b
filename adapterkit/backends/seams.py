"""How the keys and values of an attention that no family describes are reached: by what its forward calls."""

from __future__ import annotations

from torch import nn

from adapterkit.backend import AttentionSeam
from adapterkit.backends.called_attention import CalledAttentionSeam
from adapterkit.backends.computed_attention import ComputedAttentionSeam
from adapterkit.backends.forward_names import mentions
from adapterkit.backends.transformers_attention import TransformersAttentionSeam

_INTERFACE = frozenset({"ALL_ATTENTION_FUNCTIONS"})
"""Where transformers' attentions look their function up."""


def seam_of(module: nn.Module) -> AttentionSeam | None:
    """The seam of a module that attends; None where none reaches it."""
    seams = (TransformersAttentionSeam(),) if mentions(module, _INTERFACE) else ()
    seams = (*seams, CalledAttentionSeam(), ComputedAttentionSeam())
    return next((seam for seam in seams if seam.attend_refusal(module) is None), None)


def refusal(module: nn.Module) -> str | None:
    """Why the keys and values of a module cannot be reached, or None."""
    if seam_of(module) is not None:
        return None
    return f"{type(module).__name__} has no softmax over keys that more keys could join"
