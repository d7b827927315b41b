"""A proof by numbers finds what is true, what is false and why, and what no call tells of."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import adapterkit as ak
from adapterkit.testing import ProofError, prove
from adapterkit.testing.proofs.attentions import Reference
from adapterkit.testing.proofs.residuals import Sums
from adapterkit.testing.specimens import strengthened

WIDTH = 8


def llama(**values: Any) -> nn.Module:
    sizes = {"hidden_size": WIDTH, "intermediate_size": 12, "num_hidden_layers": 2, "vocab_size": 17}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6}
    return strengthened(LlamaForCausalLM(LlamaConfig(**sizes, **heads, **values)))


def call(model: nn.Module) -> Callable[[], Tensor]:
    ids = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
    return lambda: model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("tied", [False, True])
def test_a_known_family_is_true_in_numbers(tied: bool) -> None:
    model = llama(tie_word_embeddings=tied)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    proof = prove(model, {"text": call(model)})
    assert len(proof.proven) == len(proof) == len(ak.points(model)), str(proof)
    assert {one.why for one in proof if one.point.kind == "attention"} == {"attention equation"}
    assert {one.why for one in proof if one.point.role in ("attn", "mlp")} == {"x + y"}
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert {type(module).__module__.partition(".")[0] for module in model.modules()} <= {"transformers", "torch"}


def test_spans_are_rows() -> None:
    model = strengthened(GPT2LMHeadModel(GPT2Config(n_embd=WIDTH, n_layer=2, n_head=2, vocab_size=17, n_positions=9)))
    proof = prove(model, {"text": call(model)})
    assert not proof.false, str(proof)
    assert {one.point.role for one in proof.proven} >= {"attn.q", "attn.k", "attn.v", "fused.attn"}


def test_what_no_call_runs_is_said() -> None:
    model = nn.ModuleDict({"used": nn.Linear(4, 4), "idle": nn.Linear(4, 4)}).double().requires_grad_(False)
    x = torch.ones(2, 4, dtype=torch.float64)
    proof = prove(model, {"used": lambda: model["used"](x)})
    assert [(one.point.path, one.why) for one in proof.unreached] == [("idle", "no call runs this module")]
    assert [one.point.path for one in proof.proven] == ["used"]


def test_what_runs_but_does_not_arrive_is_said() -> None:
    model = nn.ModuleDict({"lost": nn.Linear(4, 4), "used": nn.Linear(4, 4)}).double().requires_grad_(False)
    x = torch.ones(2, 4, dtype=torch.float64)

    def run() -> Tensor:
        model["lost"](x)
        return model["used"](x)

    proof = prove(model, {"run": run})
    assert [one.why for one in proof.unreached] == ["what it makes arrives in no output of these calls"]


def test_a_proof_is_json_and_counts_by_kind() -> None:
    model = llama()
    proof = prove(model, {"text": call(model)})
    told = json.loads(json.dumps(proof.to_dict()))
    assert told["counts"]["attention"] == {"proven": 2, "false": 0, "not reached": 0}
    assert [one["id"] for one in told["points"]] == ak.points(model).ids
    assert "attn.kv  attention  2 proven (attention equation)" in str(proof)


@pytest.mark.parametrize(
    ("run", "told"),
    [
        (lambda: torch.full((2,), float("nan")), "not finite"),
        (lambda: torch.rand(2), "the same twice"),
        (lambda: torch.ones(2) @ torch.ones(3), "call 'broken' fails: RuntimeError"),
    ],
)
def test_a_call_that_tells_nothing_is_an_error(run: Callable[[], Tensor], told: str) -> None:
    with pytest.raises(ProofError, match=told):
        prove(nn.Linear(2, 2), {"broken": run})


def told_of(model: Callable[[Tensor, Tensor], Tensor]) -> str:
    x, y = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    with Sums() as sums:
        sums.claim("here", x, y)
        model(x, y)
    return sums.claims["here"][0].found


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (lambda x, y: x + y, "x + y"),
        (lambda x, y: y.clone() + x, "x + y"),
        (lambda x, y: x.add_(y), "x + y"),
        (lambda x, y: x + 0.5 * y, "x + c y"),
        (lambda x, y: 0.5 * x + y, "x + c y"),
        (lambda x, y: x + torch.full((2, 1, 4), 2.0) * y, "x + c y"),
        (lambda x, y: (x + x.sin()) + y, "x + c y"),
        (lambda x, y: x + (y + x.sin()), "x + c y"),
        (lambda x, y: x.mT + y.mT, "x + y"),
        (lambda x, y: torch.addcmul(x, y, torch.ones(4)), "x + y"),
        (lambda x, y: x + y / y.norm(), ""),
        (lambda x, y: x + torch.layer_norm(y, (4,)), ""),
        (lambda x, y: x + y.relu(), ""),
        (lambda x, y: x.relu() + y, ""),
        (lambda x, y: torch.cat([x, y]), ""),
    ],
)
def test_the_residual_equation_is_seen(model: Callable[[Tensor, Tensor], Tensor], told: str) -> None:
    assert told_of(model) == told


@pytest.mark.parametrize("causal", [False, True])
def test_the_reference_of_no_prefix_is_torchs_own(causal: bool) -> None:
    q, k, v = torch.rand(2, 4, 5, 6, dtype=torch.float64), *torch.rand(2, 2, 2, 5, 6, dtype=torch.float64)
    empty = torch.empty(2, 0, 6)
    reference = Reference(nn.Module(), {"": (empty, empty)}, nearest=False)
    found = reference.attend("", q, k, v, is_causal=causal, enable_gqa=True)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


def test_a_module_that_never_runs_is_not_wrong_for_its_weight_being_anothers() -> None:
    model = nn.ModuleDict({"used": nn.Linear(4, 4), "idle": nn.Linear(4, 4)}).double().requires_grad_(False)
    model["idle"].weight = model["used"].weight
    x = torch.ones(2, 4, dtype=torch.float64)
    proof = prove(model, {"used": lambda: model["used"](x)})
    assert [(one.point.path, one.why) for one in proof.unreached] == [
        ("idle", "no call runs this module, and its weight is that of used")
    ]
    assert [one.point.path for one in proof.proven] == ["used"]


class TopOne(nn.Module):
    """A router whose chosen expert gets all of the weight, as DBRX's of one: but for rounding, it changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(8, 3, bias=False)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        weights = self.router(x).softmax(-1)
        weights = weights * nn.functional.one_hot(torch.zeros(len(x), dtype=torch.long), 3)
        weights = weights / weights.norm(p=1, dim=-1, keepdim=True)
        return sum(weight[:, None] * one(x) for weight, one in zip(weights.unbind(-1), self.experts, strict=True))  # type: ignore[return-value]


def test_rounding_is_no_effect() -> None:
    torch.manual_seed(0)
    model = TopOne().double().eval().requires_grad_(False)
    x = torch.randn(16, 8, dtype=torch.float64)
    proof = prove(model, {"run": lambda: model(x)})
    assert {one.point.path: one.result for one in proof} == {
        "router": "not reached",
        "experts.0": "proven",
        "experts.1": "not reached",
        "experts.2": "not reached",
    }
