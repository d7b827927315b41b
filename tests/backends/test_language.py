"""Where the points of language models are."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

import adapterkit as ak
from adapterkit.backend import AttentionSeam, Backend, Reach
from adapterkit.backends.language import LanguageBackend
from adapterkit.errors import IncompatibleTargetError, UnsupportedModelError
from adapterkit.points import AttentionLayout, Span
from tests.backends.language_models import EVERY, LAYERS, build, skeleton, unmapped
from tests.backends.own import own

LLAMA_BLOCK = ["attn.kv", "attn.q", "attn.k", "attn.v", "attn.o", "attn", "mlp.gate", "mlp.up", "mlp.down", "mlp"]
GPT2_BLOCK = ["attn.kv", "attn.q", "attn.k", "attn.v", "attn.o", "attn", "mlp.up", "mlp.down", "mlp"]
GPT2_CROSS = ["cross.kv", "cross.k", "cross.v", "cross.q", "cross.o", "cross"]
BERT_CROSS = ["cross.kv", "cross.q", "cross.k", "cross.v", "cross.o", "cross"]
LLAMA_STEM = ["embed.tokens", "tokens"]
GPT2_STEM = ["embed.tokens", "embed.pos", "tokens"]
BERT_STEM = ["embed.tokens", "embed.pos", "embed.type", "tokens"]
DECODER = {"is_decoder": True, "add_cross_attention": True}

SNAPSHOTS: list[tuple[str, str, dict[str, Any], list[str], list[str], list[str]]] = [
    *(
        (name, f"{name}{head}", {}, LLAMA_STEM, LLAMA_BLOCK, roles)
        for name in ("Llama", "Mistral", "Qwen2", "Qwen3")
        for head, roles in {
            "Model": [],
            "ForCausalLM": ["head"],
            "ForSequenceClassification": ["head"],
            "ForTokenClassification": ["head"],
            "ForQuestionAnswering": ["head"],
        }.items()
    ),
    *(
        ("GPT2", f"GPT2{head}", {}, GPT2_STEM, GPT2_BLOCK, roles)
        for head, roles in {
            "Model": [],
            "LMHeadModel": ["head"],
            "DoubleHeadsModel": ["head", "head.choice"],
            "ForSequenceClassification": ["head"],
            "ForTokenClassification": ["head"],
            "ForQuestionAnswering": ["head"],
        }.items()
    ),
    (
        "GPT2",
        "GPT2Model",
        {"add_cross_attention": True},
        GPT2_STEM,
        [*GPT2_BLOCK[:6], *GPT2_CROSS, *GPT2_BLOCK[6:]],
        [],
    ),
    *(
        ("Bert", f"Bert{head}", {}, BERT_STEM, GPT2_BLOCK, roles)
        for head, roles in {
            "Model": ["head.pooler"],
            "ForPreTraining": ["head.pooler", "head.transform", "head", "head.next"],
            "ForMaskedLM": ["head.transform", "head"],
            "ForNextSentencePrediction": ["head.pooler", "head.next"],
            "ForSequenceClassification": ["head.pooler", "head"],
            "ForMultipleChoice": ["head.pooler", "head"],
            "ForTokenClassification": ["head"],
            "ForQuestionAnswering": ["head"],
        }.items()
    ),
    (
        "Bert",
        "BertLMHeadModel",
        DECODER,
        BERT_STEM,
        [*GPT2_BLOCK[:6], *BERT_CROSS, *GPT2_BLOCK[6:]],
        ["head.transform", "head"],
    ),
]


@pytest.mark.parametrize(("layout", "head", "changes", "stem", "block", "tail"), SNAPSHOTS)
def test_the_ids_are_these(
    layout: str, head: str, changes: dict[str, Any], stem: list[str], block: list[str], tail: list[str]
) -> None:
    model = skeleton(layout, head, **changes)
    points = own(LanguageBackend().points(model, "language"))
    blocks = [f"{role}@language.{layer}" for layer in range(LAYERS) for role in block]
    assert [p.id for p in points] == [f"{r}@language" for r in stem] + blocks + [f"{r}@language" for r in tail]
    assert unmapped(model, points, LanguageBackend.ignored) == []
    assert all(p.tags["component"] == "language" for p in points)
    assert [p.tags["layer"] for p in points if p.role == "attn.q"] == [*range(LAYERS)]


def test_coverage_notices_a_module_that_no_entry_names() -> None:
    model = skeleton("Llama", "LlamaModel")
    model.surprise = nn.Linear(2, 2)
    assert unmapped(model, own(LanguageBackend().points(model, "language")), LanguageBackend.ignored) == ["surprise"]


def test_presets_keep_out_of_embeddings_and_heads() -> None:
    roles = {p.role for p in ak.points(skeleton("Bert", "BertForPreTraining"), "linear")}
    assert roles == {"attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.down"}


@pytest.mark.parametrize(
    ("layout", "kv_heads", "head_dim"), [("Llama", 2, 12), ("Mistral", 2, 8), ("GPT2", 4, 8), ("Bert", 4, 8)]
)
def test_attention_points_tell_heads_and_their_width(layout: str, kv_heads: int, head_dim: int) -> None:
    point = ak.points(skeleton(layout, EVERY[layout]), "attn.kv@layer=0")[0]
    assert point.layout == AttentionLayout(kv_heads, head_dim)
    assert point.out_features == kv_heads * head_dim


def test_gpt2_projections_are_spans_of_transposed_weights() -> None:
    points = ak.points(skeleton("GPT2", "GPT2Model", add_cross_attention=True), "{attn,cross}.{q,k,v}@layer=0")
    spans = {p.role: p.span for p in points}
    assert spans == {
        "attn.q": Span(0, 32),
        "attn.k": Span(32, 32),
        "attn.v": Span(64, 32),
        "cross.q": None,
        "cross.k": Span(0, 32),
        "cross.v": Span(32, 32),
    }
    assert {p.layout.form for p in points} == {"linear_t"}  # type: ignore[union-attr]


def test_subclasses_are_of_their_base_classes_family() -> None:
    class Mine(type(build("Mistral"))):  # type: ignore[misc]
        pass

    assert LanguageBackend().family(Mine(build("Mistral").config)) is LanguageBackend.families[0]


def test_a_model_of_no_family_is_refused_with_the_families_names() -> None:
    with pytest.raises(UnsupportedModelError, match=r"Linear.*LlamaPreTrainedModel.*BertPreTrainedModel"):
        ak.points(nn.Linear(2, 2), backend="language")


def test_only_attention_points_have_a_seam() -> None:
    model = skeleton("Llama", "LlamaModel")
    assert LanguageBackend().reach(model, ak.points(model, "attn.q")[0]) == Reach()
    point = next(point for point in ak.points(model) if point.kind == "attention")
    assert isinstance(LanguageBackend().reach(model, point).seam, AttentionSeam)
    with pytest.raises(IncompatibleTargetError, match=r"attn\.kv@language\.0: its reach\(\) gives no seam"):
        Backend.reach(LanguageBackend(), model, point)
