"""Ranks of types whose layers have fewer directions than the config asks for."""

from __future__ import annotations

from adapterkit.contract.codec import Context


def nominal(context: Context, rank: int, most: int) -> int:
    """The rank that a config asks for, where a layer has all that it can have of it; else the layer's own.

    Args:
        context: The file.
        rank: The layer's.
        most: The most that it can have.
    """
    asked = context.config.get("r")
    return asked if type(asked) is int and min(asked, most) == rank else rank
