"""The attention seam of timm's VisionTransformer: that at torch's call, for its plain `Attention` alone."""

from __future__ import annotations

import inspect

from torch import nn

from adapterkit.backends.called_attention import CalledAttentionSeam

_HOMES = ("timm.layers.attention", "timm.models.vision_transformer")
"""Where timm defines its plain `Attention`: now, and in its older releases (1.0.15)."""


class TimmAttentionSeam(CalledAttentionSeam):
    """Reaches timm's plain `Attention`. Its relatives compute something else, and are refused by name."""

    def refusal(self, module: nn.Module) -> str | None:
        plain = [c for c in type(module).__mro__ if c.__name__ == "Attention" and c.__module__ in _HOMES]
        # A subclass with a forward of its own is no longer plain; attachment's wrapper unwraps to the original.
        if plain and inspect.unwrap(type(module).forward) is inspect.unwrap(plain[-1].forward):
            return None
        return (
            f"the keys and values of {type(module).__name__} cannot be extended; supported is timm's plain Attention "
            f"({_HOMES[0]}), which VisionTransformer has unless it was built with another attn_layer"
        )
