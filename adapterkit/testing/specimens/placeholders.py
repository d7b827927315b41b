"""Texts beside a picture or sound: tokens that hold its place, and what else a model wants told about them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from adapterkit.testing.specimens.configs import VOCABULARY, special_ids
from adapterkit.testing.specimens.images import ROWS, Inputs, noise, size_in
from adapterkit.testing.specimens.picture_configs import configs_in

_LENGTH: Final = 7
_SEED: Final = 2


@dataclass(frozen=True)
class _Text:
    """A text and its model's config.

    Attributes:
        ids: [rows, tokens].
        held: [rows, tokens], true where a token holds the place of something sensed.
    """

    ids: Tensor
    held: Tensor
    config: Any


def text_alone(model: nn.Module, taken: frozenset[str], length: int = _LENGTH) -> Inputs:
    """Two rows of ordinary tokens, as those of a model's inputs that have to do with text."""
    config: Any = model.config
    ids = _ordinary(config, ROWS, length)
    return _inputs(_Text(ids, torch.zeros_like(ids, dtype=torch.bool), config), taken)


def text_with(model: nn.Module, sense: str, numbers: int, taken: frozenset[str]) -> Inputs:
    """Two rows of tokens that hold a place for so many numbers in all."""
    count = _tokens(model, numbers)
    config: Any = model.config
    ids = _ordinary(config, ROWS, count + _LENGTH)
    held = torch.zeros_like(ids, dtype=torch.bool)
    held[:, 2 : 2 + count] = True
    token = _token(config, sense)
    if token is not None:
        ids[held] = token
    return _inputs(_Text(ids, held, config), taken)


def text_as_long(model: nn.Module, numbers: int, taken: frozenset[str]) -> Inputs:
    """Two rows of ordinary tokens, to each of which what is sensed is added."""
    return text_alone(model, taken, _tokens(model, numbers))


def _tokens(model: nn.Module, numbers: int) -> int:
    """Of how many tokens a row's embeddings have as many numbers as there are of it."""
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    return numbers // embeddings.weight.shape[-1] // ROWS


def _ordinary(config: Any, rows: int, length: int) -> Tensor:
    """Tokens of which none is special."""
    special = special_ids(config)
    ids = torch.tensor([n for n in range(VOCABULARY) if n not in special])
    generator = torch.Generator().manual_seed(_SEED)
    return ids[torch.randint(len(ids), (rows, length), generator=generator)]


def _token(config: Any, sense: str) -> int | None:
    """The token that holds the place of what a sense gives."""
    kinds = (sense, "video") if sense == "image" else (sense,)
    names = [f"{kind}_{ending}" for kind in kinds for ending in ("token_id", "token_index", "patch_id")]
    found = (getattr(part, name, None) for name in names for part in configs_in(config))
    return next((token for token in found if isinstance(token, int)), None)


def _inputs(text: _Text, taken: frozenset[str]) -> Inputs:
    return {name: make(text) for name, make in _TOLD.items() if name in taken}


def _boxes(text: _Text) -> Tensor:
    rows, length = text.ids.shape
    corner = torch.rand(rows, length, 2, generator=torch.Generator().manual_seed(_SEED), dtype=torch.float64) / 2
    return torch.cat([corner, corner + 0.4], -1)


def _query_tokens(text: _Text) -> Tensor:
    """Places for what the picture's queries give, behind the first token."""
    count = size_in(text.config, ("latent_query_num",), 0)
    if text.held.any() or not count:
        return text.held.long()
    return (torch.arange(text.ids.shape[1]) < 2).long().expand_as(text.ids)


def _tiles(text: _Text) -> Tensor:
    tiles = next((n for part in configs_in(text.config) if (n := size_in(part, ("max_num_tiles",), 0))), 1)
    return torch.ones(*text.ids.shape, 1, tiles, dtype=torch.long)


_TOLD: Final[Mapping[str, Callable[[_Text], Any]]] = {
    "input_ids": lambda text: text.ids,
    "decoder_input_ids": lambda text: _ordinary(text.config, ROWS, _LENGTH - 2),
    "mm_token_type_ids": lambda text: text.held.long(),
    "moe_mm_token_type_ids": lambda text: text.held.long(),
    "token_type_ids": lambda text: text.held.long(),
    "image_embeds_position_mask": _query_tokens,
    "image_attention_mask": lambda text: torch.ones(*text.ids.shape, 1, dtype=torch.long),
    "cross_attention_mask": _tiles,
    "qformer_input_ids": lambda text: _ordinary(text.config, ROWS, _LENGTH),
    "protein_input_ids": lambda text: _ordinary(text.config, ROWS, _LENGTH),
    "protein_attention_mask": lambda text: torch.ones(ROWS, _LENGTH, dtype=torch.long),
    "bbox": _boxes,
    "sample": lambda text: False,  # of noise around what is heard
    "state": lambda text: noise(ROWS, size_in(text.config, ("max_state_dim",), 0)),
    "noise": lambda text: noise(
        ROWS, size_in(text.config, ("chunk_size",), 0), size_in(text.config, ("max_action_dim",), 0)
    ),
    "timestep": lambda text: torch.full((ROWS,), 0.5, dtype=torch.float64),
}
"""Parameter of a model's forward -> what it is told about a text."""
