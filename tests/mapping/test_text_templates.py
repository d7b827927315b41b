"""Language models that no family names: what the templates say of their blocks, and the numbers that prove it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from adapterkit.handle.listing import points
from adapterkit.mapping.forward_order import called_children
from adapterkit.testing.proof import prove
from adapterkit.testing.specimens import specimen


def _skeleton(name: str) -> nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(CONFIG_MAPPING[name]())


@pytest.mark.parametrize(
    ("name", "attention", "forward"),
    [
        ("cohere", "self_attn.o_proj", "mlp"),
        ("gptj", "attn.resid_dropout", "mlp"),
        ("glm4", "post_self_attn_layernorm", "post_mlp_layernorm"),
        ("openai-gpt", "attn.resid_dropout", "mlp"),
        ("persimmon", "self_attn.dense", "mlp"),
    ],
)
def test_outputs_of_sublayers_are_where_the_numbers_say(name: str, attention: str, forward: str) -> None:
    made = specimen(_skeleton(name))
    found = points(made.model)
    paths = {point.role: point.path for point in found if point.role in ("attn", "mlp")}
    assert paths["attn"].endswith(f".{attention}")
    assert paths["mlp"].endswith(f".{forward}")
    proof = prove(made.model, made.calls)
    assert not [verdict for verdict in proof if verdict.result == "false"]
    outputs = [verdict for verdict in proof if verdict.point.role in ("attn", "mlp")]
    assert outputs
    assert {verdict.result for verdict in outputs} == {"proven"}


@pytest.mark.parametrize("name", ["codegen", "gpt_bigcode", "gpt_neox_japanese"])
def test_rows_of_a_fused_projection_are_those_that_torch_attends_with(name: str) -> None:
    made = specimen(_skeleton(name))
    proof = prove(made.model, made.calls)
    rows = [verdict for verdict in proof if verdict.point.role in ("attn.q", "attn.k", "attn.v")]
    assert len(rows) == 6
    assert {verdict.result for verdict in rows} == {"proven"}


def test_latent_attention_says_how_wide_its_keys_are_once_they_are_expanded() -> None:
    found = points(_skeleton("minicpm3"))
    roles = {point.role for point in found}
    assert {"attn.q_a", "attn.q_b", "attn.kv_a", "attn.kv_b", "attn.o"} <= roles
    config = CONFIG_MAPPING["minicpm3"]()
    point = next(point for point in found if point.role == "attn.kv")
    assert point.layout.head_dim == config.qk_nope_head_dim + config.qk_rope_head_dim


def test_what_sees_windows_of_keys_has_no_point_for_more_of_them() -> None:
    with torch.device("meta"):
        model = nn.ModuleDict({"longformer": _longformer()})
    roles = {point.role for point in points(model)}
    assert {"attn.q", "attn.k", "attn.v", "attn.o"} <= roles
    assert "attn.kv" not in roles


def _longformer() -> nn.Module:
    from transformers import LongformerModel

    return LongformerModel(CONFIG_MAPPING["longformer"](num_hidden_layers=2, attention_window=[4, 4]))


class Branching(nn.Module):
    def __init__(self, *, mixes: bool) -> None:
        super().__init__()
        self.norm, self.out = nn.LayerNorm(4), nn.Linear(4, 4)
        self.attention = nn.Linear(4, 4) if mixes else None
        self.scan = None if mixes else nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.attention is not None:  # noqa: SIM108 - the statement is what is tested
            x = x + self.attention(self.norm(x))
        else:
            x = x + self.scan(self.norm(x))  # type: ignore[misc]
        return self.deferred(self.end, x)

    def deferred(self, function: object, x: torch.Tensor) -> torch.Tensor:
        return function(x)  # type: ignore[operator]

    def end(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(x)


@pytest.mark.parametrize(("mixes", "sublayer"), [(True, "attention"), (False, "scan")])
def test_of_a_condition_the_branch_counts_whose_children_are_there(mixes: bool, sublayer: str) -> None:
    assert called_children(Branching(mixes=mixes)) == ("norm", sublayer, "out")
