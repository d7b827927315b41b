"""How many heads an attention has, and how wide they are: told by its attributes, and counted on its layers."""

from __future__ import annotations

from typing import Any

_WIDTHS = ("head_dim", "attention_head_size", "head_size", "d_head", "dim_head", "key_value_proj_dim", "dim_per_head")
_COUNTS = ("num_key_value_heads", "num_kv_heads", "kv_heads", "n_kv_heads")
_ALL = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "nhead", "nb_heads")


def counted_heads(attention: Any, keys: int, values: int, inner: Any = None) -> tuple[int, int, int] | None:
    """Heads of keys, their width, and the width of values; None where nothing certain is told.

    Args:
        attention: The module whose forward attends.
        keys, values: Features that its layers make.
        inner: Another object that may tell, such as a processor.
    """
    for one in (attention, inner):
        width = _number(one, _WIDTHS)
        if width and keys % width == 0 and values % (keys // width) == 0:
            return keys // width, width, values // (keys // width)
        count = _number(one, _COUNTS) or _number(one, _ALL)
        if count and keys % count == 0 and values % count == 0:
            return count, keys // count, values // count
    return None


def _number(module: Any, names: tuple[str, ...]) -> int | None:
    found = (getattr(module, name, None) for name in names)
    return next((int(value) for value in found if isinstance(value, int) and value > 0), None)
