"""Codecs, namings and what carries them: a type and a module of a stranger's, read and written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.adapter import AdapterModule
from adapterkit.checkpoint import Checkpoint
from adapterkit.contract.codec import Codec, Context, Place, Said
from adapterkit.contract.factors import Factors
from adapterkit.contract.layouts import Span, WeightLayout
from adapterkit.contract.naming import Piece
from adapterkit.errors import BrokenFormatError, CheckpointError, ShapeMismatchError
from adapterkit.formats.dialect import Dialect, ForeignModule, written_modules
from adapterkit.formats.low_rank import factors_of, joined
from adapterkit.formats.modules import Modules, made_up, placed
from adapterkit.formats.parts import Collected, said_of
from adapterkit.mapping.fused import fused_points
from adapterkit.plugins import get_plugin_manager
from adapterkit.points import InjectionPoint, Points, WeightPoint
from adapterkit.specs import CodecSpec


def point(role: str, path: str, out: int, span: Span | None = None) -> WeightPoint:
    return WeightPoint(role, path, path, 4, out, WeightLayout("linear"), span, tags={"component": "unet"})


FUSED = [point(f"attn.{name}", "qkv", 2, Span(2 * i, 2)) for i, name in enumerate("qkv")]
PER_HEAD = [point(f"attn.{name}", "qkv", 4, Span(2 * i, 2, 2, 6)) for i, name in enumerate("qkv")]


def test_a_fused_module_has_the_rows_of_all_its_points() -> None:
    [module] = Modules(Points(FUSED))
    assert module.shape == (6, 4)
    assert [place.rows for place in module.places] == [slice(0, 2), slice(2, 4), slice(4, 6)]
    [module] = Modules(Points(PER_HEAD))
    assert module.shape == (12, 4)
    whole = torch.arange(12)
    assert [place.of_rows(whole).tolist() for place in module.places] == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]


def test_rows_of_a_foreign_module_follow_its_pieces() -> None:
    modules = Modules(Points([*FUSED, point("mlp.up", "up", 6)]))
    places = modules.placed("unet", [Piece("up", halves_swapped=True), Piece("qkv")])
    assert places is not None
    whole = torch.arange(12)
    assert [place.of_rows(whole).tolist() for place in places] == [[3, 4, 5, 0, 1, 2], [6, 7], [8, 9], [10, 11]]
    assert modules.placed("unet", [Piece("up"), Piece("nothing")]) is None
    [tail] = modules.placed("unet", [Piece("up", rows=(3, 6))]) or []
    assert tail.rows == slice(3, 9)


def test_joined_factors_are_the_sum_of_the_parts() -> None:
    generator = torch.Generator().manual_seed(0)
    [module] = Modules(Points(PER_HEAD))
    own = [
        (
            place,
            Factors(torch.randn(2, 4, generator=generator), torch.randn(4, 2, generator=generator), FUSED[0].layout, s),
        )
        for place, s in zip(module.places, (0.5, 2.0, 1.0), strict=True)
    ]
    a, b, scale = joined(own[:2])
    dense = torch.zeros(12, 4)
    for place, f in own[:2]:
        dense[list(place.rows)] = f.scale * f.B @ f.A  # type: ignore[arg-type]
    torch.testing.assert_close(scale * b @ a, dense)
    assert a.shape == (4, 4)
    alike = [(place, Factors(own[0][1].A, f.B, f.layout, f.scale)) for place, f in own]
    assert joined(alike)[0].shape == (2, 4)  # equal factors are written once


def test_what_differs_from_point_to_point_becomes_settings() -> None:
    found = Collected()
    for name, rank in (("a", 2), ("b", 2), ("c", 3)):
        found.add(name, Said("lora", {"rank": rank, "alpha": 1.0}, {"A": torch.ones(rank, 4)}))
    [part] = found.parts()
    assert part.config == {"rank": 2, "alpha": 1.0}
    assert part.settings == {"a": {}, "b": {}, "c": {"rank": 3}}
    again = said_of(Checkpoint([part]))
    assert again["c"][0].config == {"rank": 3, "alpha": 1.0}
    with pytest.raises(CheckpointError, match="says lora twice at a"):
        found.add("a", Said("lora", {}, {}))


def test_several_types_at_a_point_are_a_union_and_come_back_as_they_were() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    adapters = ak.Adapters(model)
    first, second = (p.id for p in adapters.points() if p.kind == "weight")
    lora = Said("lora", {"rank": 1, "alpha": None}, {"A": torch.ones(1, 4), "B": torch.full((3, 1), 0.5)})
    shift = Said("trainable", {"part": "bias"}, {"shift": torch.ones(3)})
    found = Collected()
    found.add(first, [lora, shift])
    found.add(second, Said("lora", {"rank": 2, "alpha": 4.0}, {"A": torch.ones(2, 3), "B": torch.ones(2, 2)}))
    checkpoint = Checkpoint(found.parts())
    adapters.install("both", checkpoint)
    again = said_of(adapters.checkpoint("both"))
    assert [one.type for one in again[first]] == ["lora", "trainable"]
    torch.testing.assert_close(again[first][1].tensors["shift"], torch.ones(3))
    x = torch.randn(5, 4)
    hidden = model[0](x)
    adapters.activate("both")
    torch.testing.assert_close(model[0](x), hidden + 0.5 * x.sum(1, keepdim=True) + 1.0)


class Turned(Codec):
    """Reads `turned`, which has no parts."""

    names = frozenset({"turned"})
    types = frozenset({"turned"})

    def takes(self, names: object, context: Context) -> frozenset[str]:
        return self.names

    def for_all(self, tensors: Mapping[str, Tensor]) -> bool:
        return True

    def read(self, tensors: Mapping[str, Tensor], place: Place, context: Context) -> Said:
        return Said("turned", {"whole": place.whole}, dict(tensors))

    def write(self, said: Sequence[tuple[Place, Said]], context: Context) -> Mapping[str, Tensor]:
        return said[0][1].tensors


def test_what_has_no_parts_is_read_and_written_at_the_layer_itself(turning: Dialect) -> None:
    points = Points([*FUSED, *fused_points(FUSED), point("mlp.up", "up", 6)])
    modules, into = Modules(points), Collected()
    places = modules.placed("unet", [Piece("qkv")])
    tensors = {"qkv.turned": torch.arange(6.0)}
    turning.read([ForeignModule("qkv", {"turned": "qkv.turned"}, places)], tensors, Context("x"), into)
    said = said_of(Checkpoint(into.parts()))
    assert list(said) == ["fused.attn@unet.qkv"]
    assert said["fused.attn@unet.qkv"][0].config == {"whole": True}
    [(name, touched)] = written_modules(
        said, [("qkv", places or ()), ("up", modules.placed("unet", [Piece("up")]) or ())]
    )
    assert name == "qkv"
    assert torch.equal(turning.write(name, touched, Context("x"))["turned"], torch.arange(6.0))
    both = modules.placed("unet", [Piece("up"), Piece("qkv")])  # several modules have no point of their own
    turning.read([ForeignModule("b", {"turned": "qkv.turned"}, both)], tensors, Context("x"), into := Collected())
    assert len(said_of(Checkpoint(into.parts()))) == 4


@pytest.fixture
def turning() -> Iterator[Dialect]:
    class Turning:
        @ak.hookimpl
        def adapterkit_register_codecs(self) -> Sequence[CodecSpec]:
            return [CodecSpec("turned", f"{__name__}:Turned", dialect="turns")]

    plugin = Turning()
    get_plugin_manager().register(plugin, name="turning")
    yield Dialect("turns")
    get_plugin_manager().unregister(name="turning")


class Half(Codec):
    """Reads `half`, a matrix that is twice too small."""

    names = frozenset({"half"})
    axes: ClassVar[Mapping[str, int]] = {"half": 2}

    def takes(self, names: object, context: Context) -> frozenset[str]:
        return self.names

    def shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
        return tuple(tensors["half"].shape)

    def read(self, tensors: Mapping[str, Tensor], place: Place, context: Context) -> Said:
        if tensors["half"].numel() == 1:
            raise ValueError("a bug")
        torch.zeros(*place.point.shape).add_(tensors["half"])
        return Said("half", {}, {"whole": place.of_rows(tensors["half"])})


class Plugin:
    @ak.hookimpl
    def adapterkit_register_codecs(self) -> Sequence[CodecSpec]:
        return [
            CodecSpec("half", f"{__name__}:Half", dialect="halves"),
            CodecSpec("broken", "adapterkit_nowhere:Codec", dialect="halves"),
        ]


@pytest.fixture
def halves() -> Iterator[Dialect]:
    plugin = Plugin()
    get_plugin_manager().register(plugin, name="halves")
    yield Dialect("halves")
    get_plugin_manager().unregister(name="halves")


def test_a_strangers_codec_reads_what_only_it_knows(halves: Dialect) -> None:
    assert halves.split("blocks.0.half") == ("blocks.0", "half")
    assert halves.split("blocks.0.other") is None
    assert "adapterkit_nowhere" in str(halves.missing[0])
    tensors = {"a.half": torch.ones(6, 4), "b.half": torch.ones(6, 4)}
    into = Collected()
    places = Modules(Points(FUSED)).placed("unet", [Piece("qkv")])
    modules = [ForeignModule("a", {"half": "a.half"}, places), ForeignModule("b", {"half": "b.half"}, None)]
    with pytest.raises(ShapeMismatchError, match=r"'a': its tensors do not fit together .*size"):
        halves.read(modules, tensors, Context("x"), into)
    tensors["a.half"] = torch.ones(2, 4)
    reading = halves.read(modules[1:], tensors, Context("x"), into)
    assert (reading.matched, reading.unmatched) == ([], ["b.half"])
    for wrong in (torch.ones(4), torch.ones(0, 4), torch.ones(1, 2, 4)):
        with pytest.raises(ShapeMismatchError, match=r"'a': half is .* a tensor of 2 axes is expected"):
            halves.read(modules[:1], {**tensors, "a.half": wrong}, Context("x"), into)
        with pytest.raises(ShapeMismatchError, match="2 axes"):
            halves.shape({"half": wrong}, Context("x"))
    tensors["a.half"] = torch.ones(1, 1)
    with pytest.raises(BrokenFormatError, match=r"codec 'half'.*ValueError: a bug"):
        halves.read(modules[:1], tensors, Context("x"), into)


def test_a_type_without_a_codec_is_refused_by_name(halves: Dialect) -> None:
    place = made_up("unet", "a.b", (3, 4))
    with pytest.raises(CheckpointError, match=r"cannot say 'trainable'.*native holds any"):
        halves.write("a.b", [(place, [Said("trainable", {"part": "bias"}, {})])], Context("x"))
    with pytest.raises(CheckpointError, match="cannot be written"):
        Half().write([(place, Said("half", {}, {}))], Context("x"))


def test_whatever_has_factors_is_written_as_a_low_rank_update() -> None:
    place = made_up("unet", "a.b", (3, 4))
    config = ak.AdaLoRA(rank=2, alpha=3.0)
    module = config.build(place.point)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    said = Said("adalora", config.to_dict(), module.state_dict())
    written = Dialect("lycoris").write("a.b", [(place, [said])], Context("x"))
    assert set(written) == {"lora_down.weight", "lora_up.weight", "alpha"}
    down, up = written["lora_down.weight"], written["lora_up.weight"]
    dense = written["alpha"] / len(down) * up @ down
    torch.testing.assert_close(dense, module.delta_weight())  # type: ignore[operator]
    back = Dialect("lycoris")
    into = Collected()
    tensors = {f"m.{key}": tensor for key, tensor in written.items()}
    back.read([ForeignModule("m", {key: f"m.{key}" for key in written}, [place])], tensors, Context("x"), into)
    [one] = said_of(Checkpoint(into.parts()))[place.point.id]
    factors = factors_of(one, place.point)
    assert factors is not None
    torch.testing.assert_close(factors.scale * factors.B @ factors.A, dense)


def test_points_that_are_alike_share_the_building(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []
    build = ak.LoRA.build

    def counting(self: ak.LoRA, point: InjectionPoint) -> AdapterModule:
        built.append(point.id)
        return build(self, point)

    monkeypatch.setattr(ak.LoRA, "build", counting)
    places = [made_up("", name, shape) for name, shape in (("a", (3, 4)), ("b", (3, 4)), ("c", (4, 4)))]
    context = Context("x")
    tensors = [{"A": torch.randn(2, 4), "B": torch.randn(place.shape[0], 2)} for place in places]
    said = [Said("lora", {"rank": 2, "alpha": alpha}, own) for alpha, own in zip((1.0, 1.0, 1.0), tensors, strict=True)]
    said.append(Said("lora", {"rank": 2, "alpha": 3.0}, tensors[0]))
    state = torch.get_rng_state()
    found = [
        factors_of(one, place.point, context.where, context.made)
        for one, place in zip(said, [*places, places[0]], strict=True)
    ]
    assert built == [places[0].point.id, places[2].point.id, places[0].point.id]  # a shape, another, another config
    assert [one and one.scale for one in found] == [0.5, 0.5, 0.5, 1.5]
    assert all(
        one is not None and one.A.data_ptr() == own["A"].data_ptr() for one, own in zip(found, tensors, strict=False)
    )
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("wrong", [{"A": torch.ones(2, 4)}, {"A": torch.ones(2, 4), "B": torch.ones(5, 2)}])
def test_tensors_that_are_not_the_types_are_refused(wrong: Mapping[str, Tensor]) -> None:
    place, context = made_up("", "a", (3, 4)), Context("x")
    for _ in range(2):  # the first builds, the second finds it
        with pytest.raises(CheckpointError, match="its tensors are not those of lora"):
            factors_of(Said("lora", {"rank": 2}, wrong), place.point, "x", context.made)


def test_places_of_one_whole_module_need_no_rows() -> None:
    [module] = Modules(Points([point("linear", "a", 3)]))
    [place] = placed([(module, Piece("a"))])
    assert place.whole
    assert place.of_rows(torch.ones(3)) is not None


def test_a_place_that_is_made_up_has_the_layout_of_its_shape() -> None:
    linear, conv = made_up("unet", "a.b", (3, 4)).point, made_up("unet", "a.c", (3, 4, 5, 1)).point
    assert (linear.role, linear.form, linear.layout.kernel) == ("linear", "linear", ())
    assert (conv.role, conv.form, conv.layout.kernel) == ("conv", "conv", (5, 1))
    assert (conv.layout.stride, conv.layout.padding, conv.layout.dilation) == ((1, 1), (0, 0), (1, 1))
    assert (conv.in_features, conv.out_features) == (4, 3)
