"""What a model inside another one cannot offer there, though it can alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from torch import nn

from adapterkit.backends.forward_names import mentions, method_mentions
from adapterkit.points import InjectionPoint, TokensPoint

_MASKS = frozenset(
    {
        "create_causal_mask",
        "create_sliding_window_causal_mask",
        "create_chunked_causal_mask",
        "create_masks_for_generate",
    }
)
"""Functions of transformers that make masks of queries and keys from one of tokens."""

_EMBEDDINGS = frozenset({"get_input_embeddings"})


def withheld_inside(model: nn.Module, part: str, point: InjectionPoint) -> str | None:
    """Why a point of a part is none in a model around; None where it is one.

    Args:
        model: The model around.
        part: Path of the part in it.
        point: One of the part alone.
    """
    if not isinstance(point, TokensPoint):
        return None
    return _masked_around(model, part) if point.layout.lengthens else _embedded_around(model, part)


def _masked_around(model: nn.Module, part: str) -> str | None:
    """Positions cannot be added to a decoder whose masks are made for the tokens alone, by a model around."""
    if not mentions(model.get_submodule(part), _MASKS):
        return None  # no decoder: what makes no masks of its own is given none
    maker = next((one for one in _around(model, part) if mentions(one, _MASKS)), None)
    if maker is None:
        return None
    return (
        f"{type(maker).__name__} makes the masks of queries and keys for the tokens alone, so that no positions can be "
        "added to them inside: use Prefix, or a prompt at the language model alone"
    )


def _embedded_around(model: nn.Module, part: str) -> str | None:
    """The embedding of a text is no sequence where codes of all pictures are looked up in it too, in one row."""
    found = (one for one in _around(model, part) if method_mentions(one, "get_image_features", _EMBEDDINGS))
    if (owner := next(found, None)) is None:
        return None
    return (
        f"{type(owner).__name__} looks up codes of pictures in the embedding of its text too, all in one row, which is "
        "no sequence of a batch: choose embed.tokens"
    )


def _around(model: nn.Module, part: str) -> Iterator[nn.Module]:
    """The modules around a part, from the outermost."""
    yield model
    for path in itertools.accumulate(part.split(".")[:-1], "{}.{}".format):
        yield model.get_submodule(path)
