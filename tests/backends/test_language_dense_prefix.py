"""Prefixes in the further dense families: padding, caches, and the attention that is computed in a family's place."""

from __future__ import annotations

import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.falcon.modeling_falcon import apply_rotary_pos_emb

import adapterkit as ak
from adapterkit.backend import AttentionSeam
from adapterkit.backends.language import LanguageBackend
from adapterkit.errors import AttachError
from adapterkit.kernels.spans import read_span
from adapterkit.points import InjectionPoint
from tests.backends.dense_models import CAUSAL, HEADS, VARIANTS, adapted, build, padded_inputs
from tests.backends.language_models import output, tokens

EXACT = {"rtol": 1e-10, "atol": 1e-10}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # for families that take their softmax in float32 whatever the model's dtype
PREFIX = ak.Prefix(length=3, init_std=1.0)
OWN = [name for name in VARIANTS if name.startswith(("bloom", "falcon", "mpt", "deberta"))]
ALIBI = ["bloom", "falcon alibi", "mpt"]


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_for_the_real_tokens(name: str, side: str) -> None:
    model, _ = adapted(name, PREFIX)
    inputs = padded_inputs(name, side)
    together = output(model, **inputs)
    real = inputs["attention_mask"].bool()
    for row in range(2):
        ids = inputs["input_ids"][row][real[row]][None]
        alone = output(model, ids, attention_mask=torch.ones_like(ids))
        torch.testing.assert_close(together[row][real[row]], alone[0], **CLOSE)


def generated(model: Any, inputs: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    """Greedy tokens, and the logits that chose them [batch, steps, vocabulary]."""
    inputs = {key: value for key, value in inputs.items() if key != "position_ids"}
    fixed = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    result = model.generate(**inputs, **{**fixed, "use_cache": True, **options})
    return result.sequences, torch.stack(result.logits, dim=1)


@pytest.mark.parametrize("name", CAUSAL)
def test_cached_generation_with_a_prefix_equals_uncached(name: str) -> None:
    model, _ = adapted(name, PREFIX)
    inputs = padded_inputs(name, "left")
    cached, uncached = (generated(model, inputs, use_cache=cache) for cache in (True, False))
    assert torch.equal(cached[0], uncached[0])
    torch.testing.assert_close(cached[1], uncached[1], **CLOSE)


@pytest.mark.parametrize("name", ["gemma3", "neox", "opt", "bloom", "falcon grouped"])
def test_a_static_cache_longer_than_the_prompt_changes_nothing(name: str) -> None:
    model, _ = adapted(name, PREFIX)
    inputs = padded_inputs(name, "left")
    expected = generated(model, inputs)
    actual = generated(model, inputs, cache_implementation="static", disable_compile=True)
    assert torch.equal(actual[0], expected[0])
    torch.testing.assert_close(actual[1], expected[1], **CLOSE)


# Not sdpa with weights: there Falcon itself adds a boolean mask to its scores.
def seam_of(model: Any, point: InjectionPoint) -> AttentionSeam:
    """How the family's attention is reached."""
    seam = LanguageBackend().reach(model, point).seam
    assert seam is not None
    return seam


@pytest.mark.parametrize(
    ("name", "attention", "weights"),
    [(name, "eager", weights) for name in OWN for weights in (False, True)]
    + [(name, "sdpa", False) for name in OWN if "falcon" in name],
)
def test_without_a_prefix_it_is_the_familys_own_attention(name: str, attention: str, weights: bool) -> None:
    # In float64 a row of nothing but padding comes out of some of their softmaxes as NaN.
    model = build(name, attn_implementation=attention, dtype=torch.float32)
    point = ak.points(model, "attn.kv@layer=1")[0]
    module, forward = model.get_submodule(point.path), seam_of(model, point).forward
    assert forward is not None
    mask = torch.ones_like(tokens())
    mask[0, :2] = 0
    checked: list[bool] = []

    def compare(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        ours = forward(module, *args, **kwargs)
        torch.testing.assert_close(ours[0][mask.bool()], result[0][mask.bool()], **CLOSE)
        if weights:
            rows = mask.bool()[:, None, :, None]
            torch.testing.assert_close(ours[1] * rows, result[1] * rows, **CLOSE)
        checked.append(ours[1] is not None)

    module.register_forward_hook(compare, with_kwargs=True)
    cache = {"use_cache": False} if name in CAUSAL else {}
    output(model, tokens(), attention_mask=mask, output_attentions=weights, **cache)
    assert checked == [weights or name == "mpt"]


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("bloom", {"attention_dropout": 0.3, "hidden_dropout": 0.3}),
        ("falcon alibi", {"attention_dropout": 0.3}),
        ("falcon grouped", {"attention_dropout": 0.3}),
        ("deberta", {"attention_probs_dropout_prob": 0.3, "hidden_dropout_prob": 0.3}),
    ],
)
def test_in_training_it_drops_out_what_the_family_does(name: str, changes: dict[str, Any]) -> None:
    model = build(name, attn_implementation="eager", dtype=torch.float32, **changes).train()
    point = ak.points(model, "attn.kv@layer=1")[0]
    module, forward = model.get_submodule(point.path), seam_of(model, point).forward
    assert forward is not None
    checked: list[bool] = []

    def reseed(*_: Any) -> None:
        torch.manual_seed(11)

    def compare(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        reseed()
        torch.testing.assert_close(forward(module, *args, **kwargs)[0], result[0], **CLOSE)
        checked.append(True)

    module.register_forward_pre_hook(reseed)
    module.register_forward_hook(compare, with_kwargs=True)
    cache = {"use_cache": False} if name in CAUSAL else {}
    output(model, tokens(), output_attentions=True, **cache)
    assert checked == [True]


@pytest.mark.parametrize("name", [*ALIBI, "falcon multi-query", "falcon grouped", "deberta"])
@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_a_prefix_is_softmax_over_prefix_and_tokens(name: str, weight: float) -> None:
    model, adapters = adapted(name, PREFIX)
    points = {point.role: point for point in adapters.points("attn.*@layer=1")}
    module: Any = model.get_submodule(points["attn.kv"].path)
    prefix: Any = adapters.modules("a")[points["attn.kv"].id]
    seen: dict[str, Any] = {}

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.update(kwargs, x=args[0])

    module.register_forward_pre_hook(keep, with_kwargs=True)
    last = model.get_submodule(points["attn.o"].path)
    last.register_forward_pre_hook(lambda _, args: seen.update(mixed=args[0]))
    adapters.activate({"a": weight})
    with torch.no_grad():
        output(model, tokens())
        parts = [row_part(model, points[f"attn.{part}"], seen["x"], module) for part in "qkv"]
        expected = plain_attention(name, module, seen, prefix, parts, weight)
    torch.testing.assert_close(seen["mixed"], expected, **CLOSE)


def row_part(model: Any, point: InjectionPoint, x: Tensor, module: Any) -> Tensor:
    """Queries, keys or values of all heads [batch, heads, length, head_dim]."""
    y = model.get_submodule(point.path)(x)
    y = y if point.span is None else read_span(y, point.span, -1)
    if (clip := getattr(module, "clip_qkv", None)) is not None:
        y = y.clamp(-clip, clip)
    return y.unflatten(-1, (-1, 4)).transpose(1, 2)


def plain_attention(
    name: str, module: Any, seen: dict[str, Any], prefix: Any, parts: list[Tensor], weight: float
) -> Tensor:
    """softmax(q [P_k; k]^T / sqrt(d) + bias) [P_v; v], written out; a prefix has no distance to any query."""
    q, k, v = parts
    length, scale = q.shape[2], 0.5
    distance = torch.arange(length)[:, None] - torch.arange(length)[None, :]
    bias = torch.zeros(1, 1, length, length, dtype=q.dtype)
    if name in ALIBI:
        slopes = torch.tensor([2.0 ** (-8 * i / HEADS) for i in range(1, HEADS + 1)], dtype=q.dtype)
        bias = -slopes[:, None, None] * distance * (0.5 if name == "falcon alibi" else 1.0)
    if name.startswith("falcon") and name not in ALIBI:
        q, k = apply_rotary_pos_emb(q, k, *seen["position_embeddings"])
    if name == "deberta":
        scale = 1 / math.sqrt(3 * 4)
        q2, k2 = q.flatten(0, 1), k.flatten(0, 1)
        bias = module.disentangled_attention_bias(q2, k2, seen["relative_pos"], seen["rel_embeddings"], 3)
        bias = bias.unflatten(0, (-1, HEADS))
    else:
        bias = bias.masked_fill(distance < 0, -torch.inf)
    keys, values = (torch.cat([p.expand(len(q), -1, -1, -1), t], 2) for p, t in ((prefix.keys, k), (prefix.values, v)))
    keys, values = (t.repeat_interleave(HEADS // t.shape[1], dim=1) for t in (keys, values))
    front = bias.new_full((*bias.shape[:-1], prefix.keys.shape[-2]), math.log(weight))
    scores = q @ keys.mT * scale + torch.cat([front, bias], dim=-1)
    return (scores.softmax(-1) @ values).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("name", ["gemma3", "phi3", "neox", "opt", "roberta", "modernbert", "falcon grouped"])
def test_eager_and_sdpa_are_equal(name: str) -> None:
    inputs = padded_inputs(name, "left")
    real = inputs["attention_mask"].bool()
    both = [output(adapted(name, PREFIX, attn_implementation=each)[0], **inputs)[real] for each in ("sdpa", "eager")]
    torch.testing.assert_close(both[0], both[1], **CLOSE)


def test_an_adapted_model_of_an_own_attention_can_be_pickled() -> None:
    model, _ = adapted("bloom", PREFIX)
    copy = pickle.loads(pickle.dumps(model))
    assert torch.equal(output(copy, tokens()), output(model, tokens()))


def test_an_attention_of_another_forward_is_refused() -> None:
    model = build("falcon grouped")
    attention: Any = model.transformer.h[0].self_attention
    base = type(attention)

    class FalconOther(base):  # type: ignore[misc,valid-type]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    attention.__class__ = FalconOther
    with pytest.raises(AttachError, match=r"FalconOther.*FalconAttention\.forward.*eager"):
        ak.Adapters(model).add("a", PREFIX)
    assert not any("adapterkit" in name for name, _ in model.named_modules())


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.2), (torch.float16, 0.03)])
def test_in_half_precision_padding_gives_no_nan_and_the_outputs_are_near(
    name: str, dtype: torch.dtype, bound: float
) -> None:
    inputs = padded_inputs(name, "left")
    real = inputs["attention_mask"].bool()
    half, full = (output(adapted(name, PREFIX, dtype=each)[0], **inputs)[real] for each in (dtype, torch.float32))
    assert half.isfinite().all()
    assert (half.float() - full).norm() <= bound * full.norm()
