"""Structures are found by their children and the order of their calls, whatever the class and wherever they hang."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.mapping.family import Block, Group, Output, Weight, resolve
from adapterkit.mapping.forward_order import called_children, precedes
from adapterkit.mapping.model import map_model
from adapterkit.mapping.sites import block_sites, block_tags
from adapterkit.points import OutputPoint, WeightPoint
from adapterkit.testing.sublayers import Probe, check_order, check_stream, probe, sublayers

WIDTH = 8


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 2
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (2, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class PreNorm(nn.Module):
    """x + sublayer(norm(x)), with names that others give to norms behind the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn = Attention()
        self.self_attn_layer_norm, self.final_layer_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.self_attn_layer_norm(x))
        return x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x))))


class PostNorm(PreNorm):
    """norm(x + sublayer(x)), partly in a method of its own."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.self_attn_layer_norm(x + self.self_attn(x))
        return self._feed_forward(x)

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self.final_layer_norm(x + self.fc2(F.gelu(self.fc1(x))))


class EitherNorm(PreNorm):
    """Which of both is seen when it runs."""

    before = True

    def forward(self, x: Tensor) -> Tensor:
        y = self.self_attn_layer_norm(x) if self.before else x
        x = x + self.self_attn(y)
        if not self.before:
            x = self.self_attn_layer_norm(x)
        return x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x))))


class Hyper(PreNorm):
    """A block with a further layer, of which no template tells what it does to the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.connection = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.connection(x))


class Stack(nn.Module):
    def __init__(self, *blocks: type[nn.Module]) -> None:
        super().__init__()
        self.trunk = nn.ModuleDict({"parts": nn.ModuleList(block() for block in blocks)})

    def forward(self, x: Tensor) -> Tensor:
        for block in self.trunk["parts"]:  # type: ignore[attr-defined]
            x = block(x)
        return x


def stack(*blocks: type[nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Stack(*blocks).double().eval().requires_grad_(False)


def outputs(model: nn.Module) -> dict[str, OutputPoint]:
    return {one.id: one for one in ak.points(model) if isinstance(one, OutputPoint) and not one.is_block}


def test_the_order_of_calls_tells_where_a_norm_stands() -> None:
    model = stack(PreNorm, PostNorm)
    found = outputs(model)
    first, second = (found[f"attn@model.trunk.parts.{layer}"].layout for layer in range(2))
    assert (first.norm_in, first.norm_out) == ("trunk.parts.0.self_attn_layer_norm", None)
    assert (second.norm_in, second.norm_out) == (None, "trunk.parts.1.self_attn_layer_norm")


def test_what_is_said_of_outputs_is_what_happens() -> None:
    model = stack(PreNorm, PostNorm)
    adapters = ak.Adapters(model)
    points = sublayers(adapters.points())
    assert len(points) == 4
    adapters.add("probe", Probe(targets="attn mlp"))
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    probed = probe(model, adapters, points, lambda: model(x))
    for point in points:
        check_stream("stack", point, probed)
    check_order("stack", points[0], points[1], probed)


def test_a_block_of_which_two_arrangements_could_be_true_has_no_outputs_and_says_so() -> None:
    model = stack(EitherNorm)
    assert not outputs(model)
    assert {"attn.q@model.trunk.parts.0", "mlp.up@model.trunk.parts.0"} <= set(ak.points(model).ids)
    mapped = map_model(model).components["model"]
    assert "another order" in mapped.backend.remarks(model)["trunk.parts.0"]


def test_a_block_with_a_further_layer_keeps_what_is_certain() -> None:
    model = stack(Hyper)
    assert not outputs(model)
    assert "linear@model.trunk.parts.0.connection" in ak.points(model).ids


def test_calls_are_read_in_the_order_of_evaluation() -> None:
    assert called_children(PreNorm()) == ("self_attn_layer_norm", "self_attn", "final_layer_norm", "fc1", "fc2")
    assert called_children(PostNorm()) == ("self_attn", "self_attn_layer_norm", "fc1", "fc2", "final_layer_norm")
    assert precedes(("a", "b", "a", "b"), "a", "b")
    assert not precedes(("a", "b", "a"), "a", "b")
    assert not precedes((), "a", "b")


def test_an_adapted_block_is_read_as_the_base() -> None:
    model = stack(PostNorm)
    before = ak.points(model).ids
    ak.Adapters(model).add("a", ak.Bottleneck(targets="attn mlp", width=2))
    assert ak.points(model).ids == before


def test_sites_keep_the_names_that_tell_blocks_apart() -> None:
    one = block_sites(["model.layers.0", "model.layers.11"])
    assert one == {"model.layers.0": "0", "model.layers.11": "11"}
    two = block_sites(["model.encoder.layers.0", "model.decoder.layers.0"])
    assert two == {"model.encoder.layers.0": "encoder.0", "model.decoder.layers.0": "decoder.0"}
    assert block_sites(["layers.1.blocks.0"]) == {"layers.1.blocks.0": "1.0"}
    assert [*block_sites(["bert.a.0", "b.0"], "bert").values()] == ["a.0", "b.0"]
    assert block_tags("stages.1.blocks.3", "1.3") == {"layer": 3, "stage": 1}
    assert block_tags("encoder.layers.2", "encoder.2") == {"layer": 2, "stack": "encoder"}


class OddlyFused(nn.Module):
    """Children of a known attention, and rows that are no thirds."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.qkv, self.proj = 2, nn.Linear(WIDTH, 10), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.scaled_dot_product_attention(x, x, x) + self.qkv(x)[..., :WIDTH])


def test_shapes_that_contradict_a_template_are_a_point_less_and_said() -> None:
    model = nn.Sequential(OddlyFused())
    ids = ak.points(model).ids
    assert "linear@model.0.qkv" in ids
    assert not any(one.startswith(("attn.q", "attn.kv")) for one in ids)
    assert "10 rows of 'qkv' are not 3 equal parts" in map_model(model).remarks()["model.0"]


def test_a_table_leaves_blocks_to_the_templates() -> None:
    """Sites and tags are the table's; so is what it says itself; and its family's layers are called."""
    model = nn.ModuleDict({"stack": nn.ModuleList([PreNorm(), PreNorm()])})
    said = Weight("mlp.down", "fc2"), Output("mlp", "fc2", residual="fc1")
    group = Group("stack.{layer}", "left.{layer}", (Block("attn.kv attn"), *said), {"stack": "left"})
    found = resolve(model, [group], "language")
    roles = ["attn.o", "attn.q", "attn.k", "attn.v", "mlp.up", "mlp.down", "mlp"]
    assert sorted(one.id for one in found) == sorted(f"{role}@language.left.{i}" for role in roles for i in (0, 1))
    assert {one.tags["stack"] for one in found} == {"left"}
    assert {one.layout.access for one in found if isinstance(one, WeightPoint)} == {"call"}
    outputs = [one.layout for one in found if isinstance(one, OutputPoint)]
    assert [(one.residual, one.norm_in) for one in outputs] == [("stack.0.fc1", None), ("stack.1.fc1", None)]
