"""Whether a model keeps the documents of a row apart, measured."""

from __future__ import annotations

from typing import Any

import torch

from adapterkit.errors import ConfigError
from adapterkit.training.language.packing import collated, line_of
from adapterkit.training.language.tokens import Encoded

_LENGTHS = (5, 8)
_TOLERANCE = 1e-3  # of the largest logit: what a mask that is not followed moves is of the logits' own size


def check_apart(model: Any, device: torch.device) -> None:
    """Gives a model two short documents in a row and each by itself, and compares.

    Args:
        model: A causal language model of transformers, without adapters, in evaluation mode.
        device: Where it is.

    Raises:
        ConfigError: It takes no positions, or one document changes what it makes of the other.
    """
    first, second = (_document(length, model.config.get_text_config().vocab_size) for length in _LENGTHS)
    with torch.no_grad():
        try:
            together = _logits(model, [first, second], device)
        except TypeError as error:
            raise _refused(model, f"its forward takes no positions ({error})") from error
        alone = torch.cat([_logits(model, [one], device) for one in (first, second)])
    difference, scale = (together - alone).abs().max().item(), alone.abs().max().item()
    if not difference <= _TOLERANCE * scale * (1 if together.dtype == torch.float32 else 30):
        raise _refused(model, f"one document changes the logits of another by {difference:.2g} of {scale:.2g}")


def _logits(model: Any, documents: list[Encoded], device: torch.device) -> torch.Tensor:
    batch = collated([line_of(documents)], 0, apart=True)
    told = {key: value.to(device) for key, value in batch.items() if key != "labels"}
    return model(**told, use_cache=False).logits[0]


def _document(length: int, vocabulary: int) -> Encoded:
    tokens = torch.randint(vocabulary, (length,), generator=torch.Generator().manual_seed(length), dtype=torch.int32)
    return Encoded(tokens, torch.ones(length, dtype=torch.bool))


def _refused(model: Any, reason: str) -> ConfigError:
    name = type(model).__name__
    return ConfigError(
        [f"options.packing: {name} does not keep the documents of a row apart: {reason}. Set options.packing=rows"],
        "run",
    )
