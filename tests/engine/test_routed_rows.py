"""Under routes every adapter computes its own rows and no other, at every kind of point and for every way of acting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit import errors
from adapterkit.engine.bases import Computed, PartBase, WholeBase
from adapterkit.engine.context import no_side
from adapterkit.engine.routed import Routed
from adapterkit.kernels import low_rank
from adapterkit.kernels.rows import Routes
from adapterkit.kernels.sums import effect
from adapterkit.points import Span, WeightLayout, WeightPoint
from adapterkit.testing import toys
from tests.values import randomize

POINT = WeightPoint("attn.q", "q", "", 6, 6, WeightLayout("linear"))


class Seen(ak.AdapterModule):
    """Asks its base about another input, as an adapter may, and keeps how many rows it was given."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor, self.rows = factor, list[int]()

    def forward(self, x: Tensor, base: Any) -> Tensor:
        self.rows.append(len(x))
        return base(x * self.factor) + base(x)


class Whole(ak.AdapterModule):
    """An equivalent weight and nothing else."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight * self.factor, bias


class Thin(ak.AdditiveModule):
    def __init__(self, rank: int) -> None:
        super().__init__()
        self.A, self.B = nn.Parameter(torch.randn(rank, 6)), nn.Parameter(torch.randn(6, rank))

    def factors(self) -> ak.Factors:
        return ak.Factors(self.A, self.B, POINT.layout)


def whole_base(layer: nn.Module, x: Tensor, *, by_rows: bool = True) -> WholeBase:
    read = lambda: (layer.weight.detach(), layer.bias.detach())  # type: ignore # noqa: E731
    return WholeBase(layer, x, no_side, POINT, read, by_rows=by_rows)


@pytest.mark.parametrize("by_rows", [True, False])
@pytest.mark.parametrize("kind", [Seen, Whole, Thin])
def test_every_way_of_acting_equals_each_row_alone(kind: Any, by_rows: bool) -> None:
    layer, x = nn.Linear(6, 6).double(), torch.randn(5, 3, 6).double()
    parts = {0: kind(2), 1: Thin(2), 2: kind(3)}
    for part in parts.values():
        part.double()
    ids = [2, 0, 3, 1, 0]
    routed = Routed(parts, Routes(ids, 3))
    base = whole_base(layer, x, by_rows=by_rows)
    found = routed(x, base)
    for row, place in enumerate(ids):
        alone = x[row : row + 1]
        expected = parts[place](alone, whole_base(layer, alone)) if place in parts else layer(alone)
        torch.testing.assert_close(found[row : row + 1], expected, rtol=1e-10, atol=1e-10)
    added = routed.effect(x, layer(x), base)
    torch.testing.assert_close(added, found - layer(x), rtol=1e-10, atol=1e-10)
    assert torch.equal(effect(routed, x, layer(x), base), added)  # not by way of the sum, which rounds


def test_an_adapter_is_given_its_own_rows_alone() -> None:
    layer, x = nn.Linear(6, 6), torch.randn(5, 6)
    parts = {0: Seen(2.0), 1: Seen(3.0)}
    Routed(parts, Routes([1, 0, 2, 1, 1], 2))(x, whole_base(layer, x))
    assert [part.rows for part in parts.values()] == [[1], [3]]


def test_low_rank_ones_are_computed_at_once_where_none_must_be_called(monkeypatch: pytest.MonkeyPatch) -> None:
    mixed, counts = low_rank.mixed, list[int]()

    def counting(x: Tensor, several: Sequence[ak.Factors], owners: Sequence[int]) -> Tensor:
        counts.append(len(several))
        return mixed(x, several, owners)

    monkeypatch.setattr(low_rank, "mixed", counting)
    layer, x = nn.Linear(6, 6), torch.randn(4, 3, 6)
    one, other, hooked, seen = Thin(2), Thin(2), Thin(2), list[int]()
    hooked.register_forward_hook(lambda module, args, y: seen.append(len(args[0])))
    Routed({0: one, 1: other}, Routes([0, 1, 2, 1], 2))(x, whole_base(layer, x))
    assert counts == [2]
    Routed({0: one, 1: other, 2: hooked}, Routes([0, 1, 2, 2], 3))(x, whole_base(layer, x))
    assert (counts, seen) == ([2, 2], [2])
    found = Routed({0: one}, Routes([0, 0, 0, 0], 1))(x, whole_base(layer, x))
    torch.testing.assert_close(found, one(x, whole_base(layer, x)))
    assert counts == [2, 2]


def test_a_part_of_the_input_is_given_by_rows_too() -> None:
    layer, x = nn.Linear(6, 6).double(), torch.randn(3, 2, 6).double()
    point = WeightPoint("attn.o", "o", "", 4, 6, WeightLayout("linear"), in_span=Span(2, 4))

    def base_of(x: Tensor) -> tuple[Tensor, PartBase]:
        part = x[..., 2:]
        read = lambda: (layer.weight.detach()[:, 2:], layer.bias.detach())  # noqa: E731
        return part, PartBase(Computed(layer, x), x, part, Span(2, 4), point, read)

    parts = {0: Seen(2.0), 1: Whole(3.0)}
    part, base = base_of(x)
    found = Routed(parts, Routes([1, 0, 1], 2))(part, base)
    for row, place in enumerate([1, 0, 1]):
        torch.testing.assert_close(found[row : row + 1], parts[place](*base_of(x[row : row + 1])))


def test_what_overflows_in_other_rows_reaches_none() -> None:
    layer, x = nn.Linear(6, 6), torch.randn(4, 6)
    parts = {0: Thin(2), 1: Thin(2), 2: Thin(3)}
    with torch.no_grad():
        parts[1].A.fill_(float("inf"))
        parts[2].B.fill_(float("nan"))
    found = Routed(parts, Routes([0, 1, 2, 3], 3))(x, whole_base(layer, x))
    torch.testing.assert_close(found[0], layer(x[0]) + x[0] @ parts[0].A.mT @ parts[0].B.mT)
    assert torch.equal(found[3], layer(x)[3])  # of one call: kernels of one row and of several may round apart
    found[0].sum().backward()
    for parameter in (*parts[0].parameters(), *layer.parameters()):
        assert parameter.grad is not None
        assert torch.isfinite(parameter.grad).all()


def test_another_number_of_rows_and_a_wrong_shape_are_errors() -> None:
    layer, x = nn.Linear(6, 6), torch.randn(4, 6)
    with pytest.raises(errors.RoutingError, match=r"3 samples were routed.*has 4 rows"):
        Routed({0: Thin(2)}, Routes([0, 0, 0], 1))(x, whole_base(layer, x))
    parts = {0: Thin(2), 1: Thin(2)}
    parts[0].B = parts[1].B = nn.Parameter(torch.zeros(5, 2))
    with pytest.raises(errors.PluginError, match=r"gave \(2, 5\), and the base \(2, 6\)"):
        Routed(parts, Routes([0, 0, 1, 1], 2))(x, whole_base(layer, x))
    with pytest.raises(errors.RoutingError, match="one weight serves the whole batch"):
        Routed(parts, Routes([0, 1], 2)).merged(layer.weight, None)


@dataclass(frozen=True)
class Watching(ak.AdapterConfig):
    kinds = frozenset({"weight", "output", "tokens"})
    targets: str = "attn.q mlp"

    def build(self, point: ak.InjectionPoint) -> ak.AdapterModule:
        return Watched()


class Watched(ak.AdapterModule):
    def __init__(self) -> None:
        super().__init__()
        self.shift, self.rows = nn.Parameter(torch.zeros(())), list[int]()

    def forward(self, x: Tensor, base: Any) -> Tensor:
        self.rows.append(len(x))
        return base(x) + self.shift


def test_a_model_gives_each_adapter_its_rows() -> None:
    toys.register()
    model = toys.ToyModel().double().eval()
    adapters = ak.Adapters(model)
    for number, name in enumerate("abc"):
        adapters.add(name, Watching())
        randomize(adapters, name, number)
    routes = ["a", None, "b", "a", ak.Stack("a", "b"), "c"]
    x = toys.ids(batch=len(routes))
    with adapters.routed(routes):
        found = model(x)
    seen = {name: {rows for m in adapters.modules(name).values() for rows in m.rows} for name in "abc"}  # type: ignore
    assert seen == {"a": {2, 1}, "b": {1}, "c": {1}}
    for row, route in enumerate(routes):
        with adapters.activated(route):
            torch.testing.assert_close(found[row : row + 1], model(x[row : row + 1]), rtol=1e-10, atol=1e-10)


def test_an_adapter_that_goes_leaves_its_rows_to_the_base() -> None:
    toys.register()
    model = toys.ToyModel().double().eval()
    adapters = ak.Adapters(model)
    for number, name in enumerate("ab"):
        adapters.add(name, ak.LoRA(rank=2, targets="attn.q"))
        randomize(adapters, name, number)
    x = toys.ids(batch=3)
    with adapters.disabled():
        base = model(x)
    with adapters.routed(["b", "a", None]):
        before = model(x)
        adapters.remove("a")
        after = model(x)
        assert adapters.active == {"b": [1, 0, 0]}
    assert torch.equal(after[1:], base[1:])
    torch.testing.assert_close(after[0], before[0], rtol=1e-12, atol=1e-12)
