"""Encoders of text that no family names: what the templates say of their blocks, and the numbers that prove it."""

from __future__ import annotations

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForMaskedLM

import adapterkit as ak
from adapterkit.points import WeightPoint
from adapterkit.testing.proof import Proof, prove
from adapterkit.testing.specimens import specimen


def _proof(name: str) -> Proof:
    with torch.device("meta"):
        skeleton = AutoModelForMaskedLM.from_config(CONFIG_MAPPING[name]())
    made = specimen(skeleton)
    return prove(made.model, made.calls)


@pytest.mark.parametrize(
    ("name", "roles"),
    [
        ("ibert", {"attn.q", "attn.k", "attn.v", "attn.o", "attn.kv", "attn", "mlp", "embed.tokens"}),
        ("mobilebert", {"attn.q", "attn.k", "attn.v", "attn.o", "attn.kv", "mlp"}),
        ("neomme", {"attn.q", "attn.k", "attn.v", "attn.kv", "mlp"}),
        ("reformer", {"attn.q", "attn.v", "attn.o"}),  # which asserts that it is trained where it goes back
        ("squeezebert", {"attn.q", "attn.k", "attn.v", "attn.o", "attn.kv", "attn", "mlp"}),
        ("xmod", {"attn.q", "attn.k", "attn.v", "attn.o", "attn.kv", "attn", "mlp"}),
    ],
)
def test_what_encoders_offer_is_proven(name: str, roles: set[str]) -> None:
    proof = _proof(name)
    assert not proof.false
    assert roles <= {verdict.point.role for verdict in proof.proven}


def test_an_attention_that_sees_the_stream_mixed_with_another_is_no_output() -> None:
    assert "attn" not in {verdict.point.role for verdict in _proof("neomme")}


def test_layers_that_give_a_scale_too_are_adapted_in_their_weight_and_embed_no_tokens() -> None:
    with torch.device("meta"):
        model = AutoModelForMaskedLM.from_config(CONFIG_MAPPING["ibert"]())
    found = {point.role: point for point in ak.points(model) if isinstance(point, WeightPoint)}
    assert found["attn.q"].layout.access == found["embed.tokens"].layout.access == "read"
    assert not [point for point in ak.points(model) if point.kind == "tokens"]
