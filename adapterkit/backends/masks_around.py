"""Which model makes the masks of a decoder inside another one: then the decoder's sequence cannot grow unseen."""

from __future__ import annotations

import itertools

from torch import nn

from adapterkit.backends.forward_names import mentions
from adapterkit.points import InjectionPoint, TokensPoint

_MAKERS = frozenset(
    {
        "create_causal_mask",
        "create_sliding_window_causal_mask",
        "create_chunked_causal_mask",
        "create_masks_for_generate",
    }
)
"""Functions of transformers that make masks of queries and keys from one of tokens."""


def made_around(model: nn.Module, part: str, point: InjectionPoint) -> str | None:
    """Why positions cannot be added to a part's sequence: its masks are made for the tokens alone, by a model around.

    Args:
        model: The model around.
        part: Path of the part in it.
        point: One of the part alone.
    """
    if not isinstance(point, TokensPoint) or not point.lengthens:
        return None
    if not mentions(model.get_submodule(part), _MAKERS):
        return None  # no decoder: what makes no masks of its own is given none
    names = part.split(".")[:-1]
    around = [model, *(model.get_submodule(path) for path in itertools.accumulate(names, "{}.{}".format))]
    maker = next((one for one in around if mentions(one, _MAKERS)), None)
    if maker is None:
        return None
    return (
        f"{type(maker).__name__} makes the masks of queries and keys for the tokens alone, so that no positions can be "
        "added to them inside: use Prefix, or a prompt at the language model alone"
    )
