"""How the types are written: what is read is what was written, and what LyCORIS computes from it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from adapterkit_lycoris.diff import FullDiff, NormDiff
from adapterkit_lycoris.glora import GLoRA
from adapterkit_lycoris.loha import LoHa
from adapterkit_lycoris.lokr import LoKr
from adapterkit_lycoris.oft import BOFT, OFT
from adapterkit_lycoris.scaled import ScaledWeight
from adapterkit_lycoris.tucker import Tucker
from torch import Tensor

import adapterkit as ak
from adapterkit.adapters.dora import DoRA
from adapterkit.checkpoint import Checkpoint
from adapterkit.contract.codec import Context, Place, Said
from adapterkit.contract.layouts import Span, WeightLayout
from adapterkit.contract.naming import Piece
from adapterkit.errors import CheckpointError, MissingKeysError, ShapeMismatchError
from adapterkit.formats.dialect import Dialect, ForeignModule, written_modules
from adapterkit.formats.modules import Modules, made_up
from adapterkit.formats.parts import Collected, said_of
from adapterkit.formats.source import Source
from adapterkit.mapping.fused import fused_points
from adapterkit.plugins import get_plugin_manager
from adapterkit.points import NormPoint, Points, WeightPoint
from adapterkit.testing import AdapterConformance

LINEAR, CONV = made_up("unet", "a", (8, 12)), made_up("unet", "b", (8, 4, 3, 3))
NORM = Place(NormPoint("norm", "n", "n", 8, 8, WeightLayout("norm", bias=True, access="read")), (8,))
CASES: dict[str, tuple[ak.AdapterConfig, Place]] = {
    "loha": (LoHa(rank=2, alpha=3.0), LINEAR),
    "loha of a convolution": (LoHa(rank=2), CONV),
    "loha with cores": (LoHa(rank=2, tucker=True), CONV),
    "loha, decomposed": (LoHa(rank=2, alpha=1.0, decompose="output"), CONV),
    "loha, decomposed by inputs": (LoHa(rank=2, decompose="input"), LINEAR),
    "lokr": (LoKr(rank=1, alpha=0.5), LINEAR),
    "lokr, both products": (LoKr(rank=1, alpha=2.0, decompose_both=True, first=(4, 6)), LINEAR),
    "lokr with a core": (LoKr(rank=1, tucker=True, first=(2, 2)), CONV),
    "lokr, whole": (LoKr(rank=64, first=(2, 3)), LINEAR),
    "lokr, unbalanced": (LoKr(rank=1, first=(4, 2), low_rank=(False, True)), CONV),
    "lokr, decomposed": (LoKr(rank=1, alpha=1.0, decompose="output"), LINEAR),
    "tucker": (Tucker(rank=2, alpha=1.0), CONV),
    "tucker, decomposed": (Tucker(rank=2, alpha=1.0, decompose="output"), CONV),
    "oft": (OFT(block=4), LINEAR),
    "oft, bounded and rescaled": (OFT(block=2, constraint=0.01, constraint_on="layer", rescale=True), CONV),
    "boft": (BOFT(block=4, butterfly=2), LINEAR),
    "boft, bounded and rescaled": (
        BOFT(block=2, butterfly=3, constraint=0.01, constraint_on="layer", rescale=True),
        CONV,
    ),
    "difference": (FullDiff(), CONV),
    "difference of a bias": (FullDiff(part="bias"), LINEAR),
    "difference of a norm": (NormDiff(), NORM),
    "glora": (GLoRA(rank=2, alpha=1.0), LINEAR),
    "glora of a convolution": (GLoRA(rank=2), CONV),
    "factors of outputs": (ScaledWeight(), CONV),
    "factors of inputs": (ScaledWeight(on_input=True), LINEAR),
    "dora": (DoRA(rank=2, alpha=1.0), CONV),
    "dora over outputs": (DoRA(rank=2, alpha=1.0, over="outputs"), LINEAR),
}


def made(config: ak.AdapterConfig, place: Place) -> tuple[Any, Said]:
    generator = torch.Generator().manual_seed(3)
    module = config.build(place.point)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    spec = get_plugin_manager().spec_of(type(config))
    assert spec is not None
    return module, Said(spec.name, config.to_dict(), module.state_dict())


def read(tensors: dict[str, Tensor], *places: Place) -> dict[str, list[Said]]:
    into = Collected()
    module = ForeignModule("m", {name: name for name in tensors}, list(places))
    reading = Dialect("lycoris").read([module], tensors, Context("x"), into)
    assert reading.left_over == []
    return said_of(Checkpoint(into.parts()))


@pytest.mark.parametrize("name", CASES)
def test_what_is_read_is_what_was_written(name: str) -> None:
    config, place = CASES[name]
    module, said = made(config, place)
    written = Dialect("lycoris").write("m", [(place, [said])], Context("x"))
    [again] = read(written, place)[place.point.id]
    assert again.type == said.type
    back = type(config).from_dict(dict(again.config)).build(place.point)
    back.load_state_dict(dict(again.tensors), strict=True)
    weight, bias = torch.randn(place.shape), torch.randn(place.shape[0])
    expected, expected_bias = module.merged(weight, bias)
    got, got_bias = back.merged(weight, bias)
    assert torch.equal(got, expected)
    assert torch.equal(got_bias, expected_bias)
    rewritten = Dialect("lycoris").write("m", [(place, [again])], Context("x"))
    assert rewritten.keys() == written.keys()
    assert all(torch.equal(rewritten[key], written[key]) for key in written)


def test_lokr_of_two_whole_factors_has_no_scale() -> None:
    tensors = {"lokr_w1": torch.randn(2, 3), "lokr_w2": torch.randn(4, 4), "alpha": torch.tensor(0.25)}
    [said] = read(tensors, LINEAR)[LINEAR.point.id]
    module = LoKr.from_dict(dict(said.config)).build(LINEAR.point)
    module.load_state_dict(dict(said.tensors))
    torch.testing.assert_close(module.delta_weight(), torch.kron(tensors["lokr_w1"], tensors["lokr_w2"]))


def fused(*sizes: int) -> list[Place]:
    """A layer in three modules of ours."""
    points = [
        WeightPoint("attn", f"p{i}", f"p{i}", 12, size, WeightLayout("linear"), tags={"component": "unet"})
        for i, size in enumerate(sizes)
    ]
    places = Modules(Points(points)).placed("unet", [Piece(point.path) for point in points])
    assert places is not None
    return places


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("loha", (2, 2, 4)), ("lokr", (4, 4)), ("lokr", (3, 5)), ("glora", (2, 6)), ("difference of a bias", (3, 5))],
)
def test_rows_of_a_fused_layer_are_those_of_the_whole(name: str, sizes: tuple[int, ...]) -> None:
    config, place = CASES[name]
    module, said = made(config, place)
    written = Dialect("lycoris").write("m", [(place, [said])], Context("x"))
    weight, bias = torch.randn(place.shape), torch.randn(place.shape[0])
    expected, expected_bias = module.merged(weight, bias)
    at = 0
    for part, (key, [own]) in zip(fused(*sizes), read(written, *fused(*sizes)).items(), strict=True):
        assert part.point.id == key
        cls: Any = get_plugin_manager().adapter(own.type).load()
        back = cls.from_dict(dict(own.config)).build(part.point)
        back.load_state_dict(dict(own.tensors))
        rows = slice(at, at + part.point.out_features)
        got, got_bias = back.merged(weight[rows], bias[rows])
        torch.testing.assert_close(got, expected[rows])
        torch.testing.assert_close(got_bias, expected_bias[rows])
        at += part.point.out_features


@pytest.mark.parametrize("name", ["loha", "glora", "dora", "factors of outputs", "lokr", "oft"])
def test_at_the_whole_of_a_fused_layer_a_type_comes_back_as_it_was(name: str) -> None:
    config, place = CASES[name]
    _, said = made(config, place)
    written = Dialect("lycoris").write("m", [(place, [said])], Context("x"))
    out, width, *_ = place.shape
    parts = [Span(0, out // 2), Span(out // 2, out // 2)]
    layout = place.point.layout
    points: list[Any] = [
        WeightPoint(f"mlp.{role}", "m", "m", width, out // 2, layout, span, tags={"component": "unet"})
        for role, span in zip(("up", "gate"), parts, strict=True)
    ]
    modules = Modules(Points([*points, *fused_points(points)]))
    places = modules.placed("unet", [Piece("m")])
    assert places is not None
    said_again = read(written, *places)
    assert list(said_again) == ["fused.mlp@unet.m"]
    [(label, touched)] = written_modules(said_again, [("m", places)])
    again = Dialect("lycoris").write(label, touched, Context("x"))
    assert again.keys() == written.keys()
    assert all(torch.equal(again[key], written[key]) for key in written)


def test_a_rotation_of_all_rows_is_refused_for_parts_of_them() -> None:
    _, said = made(*CASES["boft"])
    written = Dialect("lycoris").write("m", [(LINEAR, [said])], Context("x"))
    with pytest.raises(CheckpointError, match="cannot be told apart"):
        read(written, *fused(4, 4))


def test_what_a_file_of_this_kind_cannot_say_is_refused() -> None:
    for config, told in (
        (OFT(block=4, side="input"), "of inputs cannot be said"),
        (OFT(block=4, constraint=0.1), "a bound on each block"),
    ):
        _, said = made(config, LINEAR)
        with pytest.raises(CheckpointError, match=told):
            Dialect("lycoris").write("m", [(LINEAR, [said])], Context("x"))
    _, said = made(LoHa(rank=2), LINEAR)
    part = Place(LINEAR.point, (16, 12), slice(0, 8))
    with pytest.raises(CheckpointError, match="fused layer"):
        Dialect("lycoris").write("m", [(part, [said])], Context("x"))


@pytest.mark.parametrize(
    "tensors",
    [
        {"hada_w1_a": (8, 2), "hada_w1_b": (2, 12), "hada_w2_a": (7, 2), "hada_w2_b": (2, 12)},
        {"hada_w1_a": (9, 2), "hada_w1_b": (2, 12), "hada_w2_a": (9, 2), "hada_w2_b": (2, 12)},
        {"lokr_w1": (2, 3), "lokr_w2": (4, 5)},
        {"oft_blocks": (3, 4, 4)},
        {"oft_blocks": (4, 2)},
        {"diff": (8, 11)},
        {"a1.weight": (12, 2), "a2.weight": (3, 12), "b1.weight": (8, 2), "b2.weight": (2, 12)},
        {"weight": (7,), "on_input": ()},
        {"lora_down.weight": (2, 12), "lora_up.weight": (8, 2), "dora_scale": (1, 11)},
    ],
    ids=lambda tensors: " ".join(tensors),
)
def test_tensors_that_do_not_fit_are_refused(tensors: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(ShapeMismatchError, match=r"x: '(a|m)'"):
        read({name: torch.zeros(shape) for name, shape in tensors.items()}, LINEAR)


def test_half_a_lokr_is_refused() -> None:
    with pytest.raises(MissingKeysError, match="lacks its w2"):
        read({"lokr_w1": torch.zeros(2, 3)}, LINEAR)


def test_sparse_biases_are_biases() -> None:
    tensors = {
        "bias_indices": torch.tensor([[1, 6]]),
        "bias_values": torch.tensor([0.5, -2.0]),
        "bias_size": torch.tensor([8]),
    }
    [said] = read(tensors, LINEAR)[LINEAR.point.id]
    assert said.tensors["diff_b"].tolist() == [0, 0.5, 0, 0, 0, 0, -2.0, 0]


def test_a_span_of_a_layer_is_written_with_zeros_beside_it() -> None:
    span = WeightPoint("attn.q", "qkv", "q", 4, 2, WeightLayout("linear", bias=True), Span(2, 2))
    place = Place(span, (6, 4), slice(2, 4))
    said = Said("full_diff", {"part": "all"}, {"diff": torch.ones(2, 4), "diff_b": torch.ones(2)})
    written = Dialect("lycoris").write("m", [(place, [said])], Context("x"))
    assert written["diff"].sum(1).tolist() == [0, 0, 4, 4, 0, 0]
    assert written["diff_b"].tolist() == [0, 0, 1, 1, 0, 0]


@pytest.mark.slow
class TestGLoRA(AdapterConformance):
    config = GLoRA(rank=2, alpha=3)


@pytest.mark.slow
class TestScaledWeight(AdapterConformance):
    config = ScaledWeight(targets="attention")


@pytest.mark.slow
class TestScaledInputs(AdapterConformance):
    config = ScaledWeight(on_input=True, targets="attention")


@pytest.mark.slow
class TestDecomposed(AdapterConformance):
    config = LoHa(rank=2, decompose="output")


@pytest.mark.slow
class TestDecomposedInputs(AdapterConformance):
    config = LoKr(rank=1, decompose="input")


@pytest.mark.slow
class TestBoundedOFT(AdapterConformance):
    config = OFT(block=2, constraint=0.1, constraint_on="layer")


@pytest.mark.slow
class TestColumnDoRA(AdapterConformance):
    config = DoRA(rank=2, over="outputs")


@pytest.mark.parametrize("metadata", [{"r": 2, "alpha": 3.0}, None])
def test_lokr_in_files_of_diffusers_has_the_scale_that_is_said_or_none(metadata: dict[str, Any] | None) -> None:
    """Without metadata its alpha is in the factors, whichever format is taken to read it."""
    model = torch.nn.Sequential(torch.nn.Linear(8, 4))
    noise = torch.Generator().manual_seed(1)
    w1 = torch.randn(2, 2, generator=noise)
    a, b = torch.randn(2, 2, generator=noise), torch.randn(2, 4, generator=noise)
    tensors = {"0.lokr_w1": w1, "0.lokr_w2_a": a, "0.lokr_w2_b": b}
    if metadata is None:
        tensors = {f"transformer.{key}": tensor for key, tensor in tensors.items()}
    told = {} if metadata is None else {"lora_adapter_metadata": json.dumps({"peft_type": "LOKR", **metadata})}
    adapters, before = ak.Adapters(model), model[0].weight.clone()
    format = "diffusers" if metadata is None else None
    adapters.load(Source.of(tensors, told), "it", format=format)
    adapters.activate("it")
    adapters.merge()
    scale = 1.0 if metadata is None else 1.5
    torch.testing.assert_close(model[0].weight - before, scale * torch.kron(w1, a @ b))
