"""Diffusion models whose sublayers give two streams at once, or stand in an order of their own: what numbers prove."""

from __future__ import annotations

import pytest

import adapterkit as ak
from adapterkit.points import Span
from adapterkit.testing.proof import prove
from adapterkit.testing.specimens import specimen
from tests.architectures.catalogue import skeleton

pytest.importorskip("diffusers")


@pytest.mark.parametrize(
    ("name", "roles"),
    [
        ("CogVideoXTransformer3DModel", {"attn.q", "attn.kv", "attn"}),
        ("CogView3PlusTransformer2DModel", {"attn.q", "attn.kv", "attn"}),
        ("CogView4Transformer2DModel", {"attn.q", "attn.kv", "attn"}),
        ("GlmImageTransformer2DModel", {"attn.q", "attn.kv", "attn"}),
        ("LuminaNextDiT2DModel", {"attn.q", "cross.q", "attn.kv", "cross.kv", "attn", "mlp"}),
        ("OmniGenTransformer2DModel", {"attn.q", "attn.kv", "attn", "mlp"}),
        ("RFD4ProteinaTransformer", {"attn.q", "attn.kv"}),
        (
            "StableAudio3DiTModel",
            {"attn.q", "attn.v", "cross.q", "cross.v", "attn", "cross", "mlp"},
        ),
        ("T5FilmDecoder", {"attn.q", "cross.q", "attn.kv", "cross.kv", "attn", "cross", "mlp"}),
        ("ZImageControlNetModel", {"attn.q", "attn.kv", "attn", "mlp"}),
        pytest.param("EasyAnimateTransformer3DModel", {"attn.q", "attn.kv", "attn", "mlp"}, marks=pytest.mark.slow),
        pytest.param("Kandinsky3UNet", {"attn.q", "mlp.up", "mlp"}, marks=pytest.mark.slow),
        pytest.param("MotionAdapter", {"attn.q", "attn.kv", "attn", "mlp"}, marks=pytest.mark.slow),
    ],
)
def test_what_is_offered_is_proven(name: str, roles: set[str]) -> None:
    made = specimen(skeleton("diffusers", name))
    proof = prove(made.model, made.calls)
    assert not proof.false
    assert roles <= {verdict.point.role for verdict in proof.proven}


@pytest.mark.parametrize("name", ["CogVideoXTransformer3DModel", "CogView4Transformer2DModel"])
def test_a_feed_forward_of_both_streams_is_no_output(name: str) -> None:
    assert "mlp" not in {point.role for point in ak.points(skeleton("diffusers", name)) if point.kind == "output"}


@pytest.mark.parametrize("name", ["Kandinsky6SRTransformer3DModel", "StableAudio3DiTModel"])
def test_flex_attention_and_differences_of_softmaxes_have_no_attention_points(name: str) -> None:
    assert not [point for point in ak.points(skeleton("diffusers", name)) if point.kind == "attention"]


def test_rows_of_a_difference_of_softmaxes() -> None:
    found = {point.role: point for point in ak.points(skeleton("diffusers", "StableAudio3DiTModel"))}
    width = found["attn.o"].out_features
    spans = [found[f"attn.{part}"].span for part in "qkv"]
    assert spans == [Span(0, 2 * width), Span(2 * width, 2 * width), Span(4 * width, width)]
