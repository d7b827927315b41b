"""How the keys and values of an attention that no family describes are reached: by what its forward calls."""

from __future__ import annotations

import inspect

from torch import nn

from adapterkit.backend import SITE, AttentionSeam
from adapterkit.backends.transformers_attention import TransformersAttentionSeam

_INTERFACE = "ALL_ATTENTION_FUNCTIONS"
"""Where transformers' attentions look their function up."""


def seam_of(module: nn.Module) -> AttentionSeam | None:
    """The seam of a module that attends; None where none reaches it."""
    return TransformersAttentionSeam() if _INTERFACE in _names(module) else None


def refusal(module: nn.Module) -> str | None:
    """Why the keys and values of a module cannot be reached, or None."""
    seam = seam_of(module)
    if seam is not None:
        return seam.attend_refusal(module)
    return f"{type(module).__name__} computes its softmax itself, so that no keys can be put beside its own"


def _names(module: nn.Module) -> tuple[str, ...]:
    """What the module's forward names."""
    forward = inspect.unwrap(getattr(module.__dict__.get(SITE), "base", type(module)).forward)
    return forward.__code__.co_names if inspect.isfunction(forward) else ()
