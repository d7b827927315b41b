"""Where the points of the further dense families are, and that the taps of their outputs say what they claim."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.backends.language import LanguageBackend
from adapterkit.plugins.builtin import adapterkit_register_backends
from adapterkit.points import AttentionLayout, InjectionPoint, OutputLayout, Span, WeightLayout
from tests.backends.dense_models import LAYERS, VARIANTS, WIDTH, build, skeleton
from tests.backends.language_models import output, tokens, unmapped
from tests.backends.own import own


@pytest.mark.parametrize("name", VARIANTS)
def test_the_ids_are_these(name: str) -> None:
    variant, model = VARIANTS[name], skeleton(name)
    points = own(LanguageBackend().points(model, "language"))
    blocks = [f"{role}@language.{layer}" for layer in range(LAYERS) for role in variant.block.split()]
    stem, tail = ([f"{role}@language" for role in roles.split()] for roles in (variant.stem, variant.tail))
    assert [p.id for p in points] == stem + blocks + tail
    assert unmapped(model, points, LanguageBackend.ignored) == []
    assert {p.in_features for p in points if p.kind == "output"} <= {WIDTH}


CLASSIFIERS = ("Model", "ForSequenceClassification", "ForTokenClassification")
HEADS = {
    "gemma2": CLASSIFIERS,
    "gemma3": ("Gemma3TextModel", "Gemma3TextForSequenceClassification"),
    "phi3": CLASSIFIERS,
    "opt": ("Model", "ForSequenceClassification", "ForQuestionAnswering"),
    **dict.fromkeys(("neox", "bloom", "falcon multi-query", "mpt"), (*CLASSIFIERS, "ForQuestionAnswering")),
    **dict.fromkeys(("roberta", "deberta", "modernbert"), (*CLASSIFIERS, "ForQuestionAnswering", "ForMultipleChoice")),
}


@pytest.mark.parametrize(("name", "head"), [(name, head) for name, heads in HEADS.items() for head in heads])
def test_every_head_is_mapped_and_the_body_keeps_its_ids(name: str, head: str) -> None:
    family = VARIANTS[name].head.partition("For")[0]
    model = skeleton(name, head if hasattr(transformers, head) else family + head)
    points = own(LanguageBackend().points(model, "language"))
    assert unmapped(model, points, LanguageBackend.ignored) == []
    body = [p.id for p in own(LanguageBackend().points(skeleton(name), "language")) if not p.role.startswith("head")]
    assert [p.id for p in points if not p.role.startswith("head") or p.role == "head.proj"] == body
    assert any(p.role == "head" for p in points) == (not head.endswith("Model"))


def test_the_registered_classes_are_those_of_the_tables() -> None:
    (spec,) = (spec for spec in adapterkit_register_backends() if spec.name == "language")
    classes = [name for family in LanguageBackend.families for name in family.classes]
    assert set(spec.models) == {f"transformers:{name}" for name in classes}


def test_gemma_3_with_a_vision_tower_is_not_taken_for_a_text_model() -> None:
    names = ("Gemma3Model", "Gemma3ForConditionalGeneration", "Gemma3ForSequenceClassification")
    ours = {name for family in LanguageBackend.families for name in family.classes}
    for name in names:
        assert not ours & {base.__name__ for base in getattr(transformers, name).__mro__}


@pytest.mark.parametrize(
    ("name", "spans", "kv_heads", "head_dim"),
    [
        ("phi3", (Span(0, 16), Span(16, 8), Span(24, 8)), 2, 4),
        ("neox", (Span(0, 4, 4, 12), Span(4, 4, 4, 12), Span(8, 4, 4, 12)), 4, 4),
        ("bloom", (Span(0, 4, 4, 12), Span(4, 4, 4, 12), Span(8, 4, 4, 12)), 4, 4),
        ("falcon alibi", (Span(0, 4, 4, 12), Span(4, 4, 4, 12), Span(8, 4, 4, 12)), 4, 4),
        ("falcon multi-query", (Span(0, 16), Span(16, 4), Span(20, 4)), 1, 4),
        ("falcon grouped", (Span(0, 8, 2, 16), Span(8, 4, 2, 16), Span(12, 4, 2, 16)), 2, 4),
        ("mpt", (Span(0, 16), Span(16, 16), Span(32, 16)), 4, 4),
        ("modernbert", (Span(0, 16), Span(16, 16), Span(32, 16)), 4, 4),
        ("gemma2", (None, None, None), 2, 6),
        ("opt", (None, None, None), 4, 4),
        ("deberta", (None, None, None), 4, 4),
    ],
)
def test_fused_rows_and_heads(name: str, spans: tuple[Span | None, ...], kv_heads: int, head_dim: int) -> None:
    points = {p.role: p for p in ak.points(skeleton(name), "attn.*@layer=1")}
    assert tuple(points[f"attn.{part}"].span for part in "qkv") == spans
    assert points["attn.kv"].layout == AttentionLayout(kv_heads, head_dim)
    assert points["attn.k"].out_features == kv_heads * head_dim


def test_gemma_scales_its_embedding() -> None:
    for name in ("gemma2", "gemma3"):
        layout = ak.points(skeleton(name), "embed.tokens")[0].layout
        assert isinstance(layout, WeightLayout)
        assert layout.scale == WIDTH**0.5


PARALLEL = ("neox parallel", "falcon multi-query", "falcon grouped")


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "bloom sliced"])
def test_taps_and_norms_are_the_blocks_own(name: str) -> None:
    """norm_in(x) is what a sublayer is given, and norm_out(x + s) is what the block goes on with."""
    model = build(name)
    points = {p.role: p for p in ak.points(model, "@layer=1")}
    layouts = {role: points[role].layout for role in ("attn", "mlp")}
    prefix, _, _ = points["attn"].path.partition(".1.")
    seen: dict[str, Tensor] = {}
    for role, layout in layouts.items():
        assert isinstance(layout, OutputLayout)
        keep(model, layout.residual, seen, before=f"x {role}")
        keep(model, points[role].path, seen, after=f"s {role}")
    keep(model, points["attn.q"].path, seen, before="in attn")
    keep(model, points["mlp.up"].path, seen, before="in mlp")
    keep(model, f"{prefix}.1", seen, before="block in", after="block out")
    output(model, tokens())
    s = {role: seen[f"s {role}"] for role in layouts}
    x = {role: seen[f"x {role}"] for role in layouts}
    for role in layouts:
        close(seen[f"in {role}"], norm(model, points[role], "norm_in", x[role]))
    start = seen["block in"]
    if name == "bloom normed residual":
        block = model.get_submodule(f"{prefix}.1")
        close(x["attn"], block.input_layernorm(start))
        close(x["mlp"], block.post_attention_layernorm(x["attn"] + s["attn"]))
        close(seen["block out"], x["mlp"] + s["mlp"])
        return
    close(x["attn"], start)
    after = start + s["attn"]
    close(x["mlp"], start if name in PARALLEL else norm(model, points["attn"], "norm_out", after))
    end = after + s["mlp"] if name in PARALLEL else x["mlp"] + s["mlp"]
    close(seen["block out"], norm(model, points["mlp"], "norm_out", end))


def keep(model: Any, path: str, seen: dict[str, Tensor], before: str = "", after: str = "") -> None:
    """Keeps a module's first input and its (first) output, one row per token, of its first call."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        first = args[0] if args else next(iter(kwargs.values()))
        seen.setdefault(before, first.flatten(0, -2))
        seen.setdefault(after, (result[0] if isinstance(result, tuple) else result).clone().flatten(0, -2))

    model.get_submodule(path).register_forward_hook(hook, with_kwargs=True)


def norm(model: Any, point: InjectionPoint, which: str, x: Tensor) -> Tensor:
    path = getattr(point.layout, which)
    return x if path is None else model.get_submodule(path).forward(x)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_the_config_chooses_the_layout() -> None:
    chosen = {name: LanguageBackend().family(skeleton(name)) for name in VARIANTS}
    assert chosen["opt"] is not chosen["opt post-norm"]
    assert len({id(chosen[name]) for name in VARIANTS if name.startswith("bloom")}) == 3
    assert chosen["deberta"] is not chosen["deberta new head"]


def test_older_names_give_the_same_points() -> None:
    """GPT-NeoX called its head `embed_out`, and had no dropout behind its embedding."""
    model, expected = skeleton("neox"), own(LanguageBackend().points(skeleton("neox"), "language"))
    model.embed_out = model._modules.pop("lm_head")
    del model.gpt_neox.emb_dropout
    points = own(LanguageBackend().points(model, "language"))
    assert sorted(p.id for p in points) == sorted(p.id for p in expected)
    assert {p.role: p.path for p in points}["head"] == "embed_out"
