"""Attentions and blocks of vision models are found by their children, with the order in which their rows are split."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.kernels.spans import read_span
from adapterkit.testing.proof import prove
from adapterkit.testing.specimens import specimen
from tests.architectures import catalogue

pytest.importorskip("timm")

WIDTH = 12


class ByHeads(nn.Module):
    """Rows [heads, queries + keys + values], of different widths."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.key_dim = 3, 2
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * (2 + 2 + 5)), nn.Linear(15, WIDTH)

    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.qkv(x).unflatten(-1, (self.num_heads, -1)).split([2, 2, 5], dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (part.transpose(1, 2) for part in self.parts(x))
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class Packed(nn.Module):
    """Gate and value in one layer."""

    def __init__(self, gate_last: bool) -> None:
        super().__init__()
        self.gate_last = gate_last
        self.fc1, self.fc2 = nn.Linear(WIDTH, 8), nn.Linear(4, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(first * second.sigmoid() if self.gate_last else first.sigmoid() * second)


class Block(nn.Module):
    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = nn.LayerNorm(WIDTH), ByHeads(), nn.LayerNorm(WIDTH), mlp

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ClassBlock(Block):
    """Only the first token attends, so that what enters the norm is not what is added to."""

    def forward(self, x: Tensor) -> Tensor:
        first = x[:, :1] + self.attn(self.norm1(x))[:, :1]
        first = first + self.mlp(self.norm2(first))
        return torch.cat([first, x[:, 1:]], dim=1)


class Behind(Block):
    """x + norm(sublayer(x))."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__(mlp)
        self.drop_path1, self.drop_path2 = nn.Identity(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.norm1(self.attn(x)))
        return x + self.drop_path2(self.norm2(self.mlp(x)))


def model_of(block: type[Block], *, gate_last: bool = False) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = nn.Sequential(*(block(Packed(gate_last)) for _ in range(2))).double().eval().requires_grad_(False)
        for parameter in made.parameters():
            nn.init.normal_(parameter, std=0.5)
    return made


X = torch.randn(2, 5, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_rows_by_heads_are_those_that_the_attention_splits() -> None:
    model = model_of(Block)
    attention = model[0].attn
    points = {point.role: point for point in ak.points(model) if point.path == "0.attn.qkv"}
    rows = attention.qkv(X)
    for role, part in zip(("attn.q", "attn.k", "attn.v"), attention.parts(X), strict=True):
        span = points[role].span
        assert span is not None
        assert torch.equal(read_span(rows, span, -1), part.flatten(2)), role


@pytest.mark.parametrize("gate_last", [True, False])
def test_gate_and_value_in_one_layer_have_their_order(gate_last: bool) -> None:
    points = {p.role: p.span for p in ak.points(model_of(Block, gate_last=gate_last)) if p.path == "0.mlp.fc1"}
    assert (points["mlp.gate"].start, points["mlp.up"].start) == ((4, 0) if gate_last else (0, 4))  # type: ignore[union-attr]


def outputs(model: nn.Module) -> dict[str, str]:
    """Role -> path of the first block's sublayers."""
    return {p.role: p.path for p in ak.points(model) if p.role in ("attn", "mlp") and p.path.startswith("0.")}


def test_the_order_of_calls_tells_blocks_with_the_same_children_apart() -> None:
    assert outputs(model_of(Block)) == {"attn": "0.attn", "mlp": "0.mlp"}
    assert outputs(model_of(Behind)) == {"attn": "0.drop_path1", "mlp": "0.drop_path2"}


def test_where_only_some_tokens_attend_there_is_no_such_output() -> None:
    assert outputs(model_of(ClassBlock)) == {"mlp": "0.mlp"}


@pytest.mark.parametrize("block", [Block, Behind, ClassBlock])
def test_what_is_claimed_is_proven(block: type[Block]) -> None:
    model = model_of(block)
    proof = prove(model, {"tokens": lambda: model(X)})
    assert not proof.false
    assert {verdict.point.role for verdict in proof.proven} >= {"mlp", "attn.q", "attn.kv", "mlp.gate"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "roles"),
    [
        ("coatnet_0_224", {"attn.q", "attn.kv", "attn", "mlp"}),
        ("davit_base", {"attn.q", "attn.kv", "attn", "mlp"}),
        ("efficientvit_m0", {"attn", "mlp"}),
        ("levit_128", {"attn.q", "attn.kv", "attn", "mlp"}),
        ("mvitv2_base", {"attn.q", "attn.kv", "attn", "mlp"}),
        ("pvt_v2_b0", {"attn.q", "attn.kv", "attn", "mlp"}),
        ("samvit_base_patch16", {"attn.q", "attn.kv", "mlp"}),
        ("swinv2_cr_base_224", {"attn.q", "attn", "mlp"}),
        ("tnt_b_patch16_224", {"attn.q", "attn.kv", "attn", "mlp"}),
        ("volo_d1_224", {"attn.q", "attn.kv", "attn", "mlp"}),
        ("visformer_small", {"attn.q", "attn.kv", "attn", "mlp"}),
        ("xcit_large_24_p8_224", {"attn.q", "attn.kv", "attn", "mlp"}),
    ],
)
def test_models_of_timm_are_proven(name: str, roles: set[str]) -> None:
    made = specimen(catalogue.skeleton("timm", name))
    proof = prove(made.model, made.calls)
    assert not proof.false
    assert {verdict.point.role for verdict in proof.proven} >= roles


@torch.no_grad()
def test_the_gate_of_vitamin_is_what_its_activation_sees() -> None:
    model: Any = specimen(catalogue.skeleton("timm", "vitamin_small_224")).model
    mlp = model.blocks[0].mlp
    paths = {point.role: point.path for point in ak.points(model, "mlp.*@layer=0")}
    x = torch.randn(3, mlp.w0.in_features, dtype=torch.float64)

    def without_bias() -> Tensor:
        return mlp(x) - mlp.w2.bias

    def is_linear_in(role: str) -> bool:
        layer, once = model.get_submodule(paths[role]), without_bias()
        for parameter in layer.parameters():
            parameter.mul_(2)
        doubled = torch.allclose(without_bias(), 2 * once, rtol=1e-12, atol=0)
        for parameter in layer.parameters():
            parameter.div_(2)
        return doubled

    assert {role: is_linear_in(role) for role in ("mlp.gate", "mlp.up")} == {"mlp.gate": False, "mlp.up": True}
