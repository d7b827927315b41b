"""Where the points of encoder-decoder models are."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import adapterkit as ak
from adapterkit.backends.seq2seq import Seq2SeqBackend
from adapterkit.errors import UnsupportedModelError
from adapterkit.points import AttentionLayout, WeightLayout
from tests.backends.transformers_models import build, roles, run, skeleton, unmapped

STEM = "embed.tokens tokens"
T5_ATTENTION = "attn.kv attn.q attn.k attn.v attn.o attn"
T5_FIRST = "attn.kv attn.q attn.k attn.v attn.o embed.pos attn"
T5_CROSS = "cross.kv cross.q cross.k cross.v cross.o cross"
BART_ATTENTION, BART_CROSS = (
    "attn.kv attn.k attn.v attn.q attn.o attn",
    "cross.kv cross.k cross.v cross.q cross.o cross",
)
MLP, GATED = "mlp.up mlp.down mlp", "mlp.gate mlp.up mlp.down mlp"


def t5(mlp: str, *, decoder: bool = True, every: bool = False) -> dict[str, str]:
    later = T5_FIRST if every else T5_ATTENTION
    encoder = {"encoder": f"{STEM} prompt", "encoder.0": f"{T5_FIRST} {mlp}", "encoder.1": f"{later} {mlp}"}
    blocks = {f"decoder.{i}": f"{a} {T5_CROSS} {mlp}" for i, a in enumerate((T5_FIRST, later))}
    return {**encoder, **({"decoder": STEM, **blocks} if decoder else {})}


def bart(
    *, encoder: bool = True, decoder: bool = True, stem: str = f"{STEM} embed.pos prompt", written: str = ""
) -> dict[str, str]:
    found = {}
    if encoder:
        found |= {"encoder": stem, **{f"encoder.{i}": f"{BART_ATTENTION} {MLP}" for i in range(2)}}
    if decoder:
        blocks = {f"decoder.{i}": f"{BART_ATTENTION} {BART_CROSS} {MLP}" for i in range(2)}
        found |= {"decoder": f"{STEM} embed.pos{written}", **blocks}
    return found


CONVOLUTIONS = {"encoder.conv1": "embed.audio", "encoder.conv2": "embed.audio"}
SNAPSHOTS: list[tuple[str, str | None, dict[str, Any], dict[str, str]]] = [
    ("T5", None, {}, {**t5(MLP), "": "head"}),
    ("T5", "T5Model", {}, t5(MLP)),
    ("T5", "T5ForQuestionAnswering", {}, {**t5(MLP), "": "head"}),
    ("T5", "T5ForSequenceClassification", {}, {**t5(MLP), "": "head.transform head"}),
    ("T5", "T5ForTokenClassification", {}, {**t5(MLP, decoder=False), "": "head"}),
    ("FlanT5", None, {}, {**t5(GATED), "": "head"}),
    ("T5Encoder", None, {}, t5(MLP, decoder=False)),
    ("MT5Encoder", None, {}, t5(GATED, decoder=False)),
    ("UMT5", None, {}, {**t5(GATED, every=True), "": "head"}),
    ("Bart", None, {}, {**bart(), "": "head"}),
    ("Bart", "BartModel", {}, bart()),
    ("Bart", "BartForCausalLM", {}, {**bart(encoder=False, written=" prompt"), "": "head"}),
    ("Bart", "BartForSequenceClassification", {}, {**bart(), "": "head.transform head"}),
    ("Bart", "BartForQuestionAnswering", {}, {**bart(), "": "head"}),
    ("Whisper", None, {}, {**CONVOLUTIONS, **bart(stem="embed.pos"), "": "head"}),
    ("Whisper", "WhisperModel", {}, {**CONVOLUTIONS, **bart(stem="embed.pos")}),
    ("Whisper", "WhisperForCausalLM", {}, {**bart(encoder=False), "": "head"}),
    (
        "Whisper",
        "WhisperForAudioClassification",
        {"use_weighted_layer_sum": True},
        {**CONVOLUTIONS, **bart(decoder=False, stem="embed.pos"), "": "head.transform head"},
    ),
]


@pytest.mark.parametrize(("name", "head", "changes", "expected"), SNAPSHOTS)
def test_the_points_are_these(name: str, head: str | None, changes: dict[str, Any], expected: dict[str, str]) -> None:
    model = skeleton(name, head, **changes)
    points = Seq2SeqBackend().points(model, "language")
    assert roles(points) == expected
    assert unmapped(model, points, Seq2SeqBackend.ignored) == []
    assert len({point.id for point in points}) == len(points)
    for point in points:
        assert point.tags.get("stack", "") == point.site.partition(".")[0]
        assert point.tags["component"] == "language"


def test_the_whole_list_of_one_layer_of_t5() -> None:
    points = ak.points(skeleton("FlanT5"), "{attn,cross,mlp}*@stack=decoder,layer=1")
    assert points.ids[0] == "attn.kv@language.decoder.1"
    assert {p.id: (p.path, p.shape) for p in points if p.role in ("cross.k", "mlp.gate", "mlp.down")} == {
        "cross.k@language.decoder.1": ("decoder.block.1.layer.1.EncDecAttention.k", (12, 16)),
        "mlp.gate@language.decoder.1": ("decoder.block.1.layer.2.DenseReluDense.wi_0", (24, 16)),
        "mlp.down@language.decoder.1": ("decoder.block.1.layer.2.DenseReluDense.wo", (16, 24)),
    }


@pytest.mark.parametrize(("name", "width"), [("T5", 6), ("UMT5", 6), ("Bart", 8), ("Whisper", 8)])
def test_attention_points_tell_heads_and_their_width(name: str, width: int) -> None:
    points = ak.points(skeleton(name), "attn.kv cross.kv")
    assert {point.layout for point in points} == {AttentionLayout(2, width)}
    assert len(points) == 6


def test_a_t5_encoder_is_a_component_of_a_pipeline() -> None:
    pipe = SimpleNamespace(components={"text_encoder_2": skeleton("T5Encoder"), "tokenizer": None})
    points = ak.points(pipe, "attn.{q,v}@component=text_encoder_2")
    assert points.ids == [f"{role}@text_encoder_2.encoder.{i}" for i in range(2) for role in ("attn.q", "attn.v")]


def test_tables_of_positions_are_read_and_scaled_embeddings_say_so() -> None:
    for name in ("Bart", "Whisper"):
        layouts = [point.layout for point in ak.points(skeleton(name), "embed.pos")]
        assert layouts == [WeightLayout("embedding", access="read")] * 2
    assert {p.layout.scale for p in ak.points(skeleton("Bart"), "embed.tokens")} == {4.0}  # type: ignore[union-attr]


def test_one_embedding_for_both_stacks_is_one_point() -> None:
    """As in transformers 4, where the stacks share the module and not just its weight."""
    model = build("T5")
    model.encoder.embed_tokens = model.decoder.embed_tokens = model.shared
    adapters = ak.Adapters(model)
    adapters.add("a", ak.LoRA(rank=2, targets="embed.tokens"))
    assert list(adapters.modules("a")) == ["embed.tokens@language.encoder"]
    module: Any = adapters.modules("a")["embed.tokens@language.encoder"]
    module.A.data.normal_()
    reference = build("T5")
    for stack in (reference.encoder, reference.decoder):  # the head's weight, which was tied to these, stays
        stack.embed_tokens.weight = nn.Parameter(stack.embed_tokens.weight + (module.B @ module.A).T)
    torch.testing.assert_close(run(model), run(reference), rtol=1e-10, atol=1e-10)


def test_a_stack_without_its_model_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"T5Stack is one stack.*T5EncoderModel"):
        ak.points(skeleton("T5").encoder)


def test_a_model_of_no_family_is_refused_with_the_families_names() -> None:
    with pytest.raises(UnsupportedModelError, match=r"seq2seq backend.*Linear.*T5PreTrainedModel.*WhisperPre"):
        ak.points(nn.Linear(2, 2), backend="seq2seq")
