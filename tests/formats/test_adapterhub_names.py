"""What AdapterHub calls a layer is where it lies in transformers' own model, in every family that kept its paths."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import transformers

import adapterkit as ak
from adapterkit.formats.adapterhub_names import FAMILIES, Places
from adapterkit.points import Points, WeightPoint

MOVED = {"vit", "beit"}
"""Transformers 5 gave their layers other paths."""
SIZES = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embedding_size"), 8),
    **dict.fromkeys(("intermediate_size", "hidden_dim", "d_ff"), 12),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers"), 1),
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 1),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "n_head", "n_heads", "num_heads"), 2),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2),
    **dict.fromkeys(("d_kv", "head_dim", "rotary_dim"), 4),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "decoder_start_token_id"), 1),
    **dict.fromkeys(("max_position_embeddings", "max_source_positions", "max_target_positions"), 16),
    "vocab_size": 16,
    "pad_token_id": 0,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - MOVED))
def test_layers_lie_where_the_tool_has_them(name: str) -> None:
    known: Any = transformers.AutoConfig.for_model(name)
    given = inspect.signature(type(known)).parameters
    config = type(known)(**{key: value for key, value in SIZES.items() if key in given})
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config)
    places = Places(FAMILIES[name], Points(ak.points(model)))
    points = [(block, role, places.point(role, block)) for block in places.blocks for role in block.stack.names]
    layers = [(block, role, point) for block, role, point in points if isinstance(point, WeightPoint)]
    assert {role for _, role, _ in layers} >= {"mlp.up", "mlp.down"}
    for block, role, point in layers:
        if point.span is None:  # one of its own, and no part of a fused one
            paths = {f"{block.stack.path}.{block.number}.{own}" for own in block.stack.names[role]}
            assert point.path in paths, role
