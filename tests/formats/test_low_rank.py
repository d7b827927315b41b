"""A type's module from what a file says, and the factors of a foreign module from those of its points."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from adapterkit import errors
from adapterkit.contract.codec import Place, Said
from adapterkit.contract.factors import Factors
from adapterkit.formats.low_rank import factors_of, folded, joined, module_of
from adapterkit.kernels.low_rank import dense
from adapterkit.points import WeightLayout, WeightPoint

POINT = WeightPoint("attn.q", "model.q", "", 6, 4, WeightLayout("linear"))
A, B = torch.randn(2, 6), torch.randn(4, 2)
LORA: dict[str, Any] = {"rank": 2, "alpha": 3.0}


def said(type: str = "lora", **tensors: Tensor) -> Said:
    return Said(type, LORA, {"A": A, "B": B, **tensors})


def test_a_module_holds_what_is_said_and_is_frozen() -> None:
    made: Any = {}
    one, other = (module_of(own, POINT, made=made) for own in (said(), said(B=B + 1)))
    for module, b in ((one, B), (other, B + 1)):
        assert {name: tensor.tolist() for name, tensor in module.state_dict().items()} == {
            "A": A.tolist(),
            "B": b.tolist(),
        }
        assert not any(parameter.requires_grad for parameter in module.parameters())
        assert not module.training
        assert module.at == POINT.id
    assert len(made) == 1
    factors = factors_of(said(), POINT)
    assert factors is not None
    assert torch.allclose(dense(factors), 1.5 * B @ A)


def test_what_is_no_type_or_not_its_tensors_is_told_with_its_place() -> None:
    with pytest.raises(errors.UnknownAdapterTypeError, match=r"it\.bin.*'lroa' is unknown here.*Did you mean .*'lora'"):
        module_of(said("lroa"), POINT, "it.bin")
    with pytest.raises(errors.CheckpointError, match=r"it\.bin.*its tensors are not those of lora") as refused:
        module_of(said(A=A[:, :5]), POINT, "it.bin")
    assert POINT.id in str(refused.value)
    with pytest.raises(errors.CheckpointError, match=r"its tensors are not those of lora: (.|\n)*\"C\""):
        module_of(said(C=A), POINT)


def factors(rank: int, out: int, features: int, scale: float = 1.0) -> Factors:
    return Factors(torch.randn(rank, features).double(), torch.randn(out, rank).double(), WeightLayout("linear"), scale)


SHARED = factors(2, 4, 6).A
PLACES: dict[str, list[tuple[Any, Any, Factors]]] = {
    "the module": [(None, None, factors(2, 8, 6, 0.5))],
    "rows": [(slice(0, 4), None, factors(2, 4, 6, 0.5)), (slice(4, 8), None, factors(3, 4, 6, 2.0))],
    "some rows, every other one": [((1, 3, 5), None, factors(2, 3, 6, 0.5))],
    "rows that share A": [
        (slice(0, 4), None, Factors(SHARED, factors(2, 4, 6).B, WeightLayout("linear"))),
        (slice(4, 8), None, Factors(SHARED, factors(2, 4, 6).B, WeightLayout("linear"), 3.0)),
    ],
    "columns": [(None, slice(0, 2), factors(1, 8, 2)), (None, (2, 5), factors(2, 8, 2, 3.0))],
    "rows and columns": [(slice(0, 4), (0, 3), factors(1, 4, 2)), (slice(4, 8), slice(1, 3), factors(2, 4, 2))],
}


@pytest.mark.parametrize("name", PLACES)
def test_joined_factors_are_the_sum_of_the_points_updates(name: str) -> None:
    places = [(Place(POINT, (8, 6), rows, columns), own) for rows, columns, own in PLACES[name]]
    expected = torch.zeros(8, 6).double()
    for place, own in places:
        rows, columns = (
            [*range(size)[taken]] if isinstance(taken, slice) else [*range(size)] if taken is None else [*taken]
            for taken, size in ((place.rows, 8), (place.columns, 6))
        )
        expected[torch.tensor(rows)[:, None], torch.tensor(columns)] += dense(own)
    a, b, scale = joined(places)
    assert torch.allclose(scale * b @ a, expected, atol=1e-12)
    ranks = sum(own.rank for _, own in places)
    assert len(a) == b.shape[1] == (2 if name == "rows that share A" else ranks)


def test_columns_of_one_a_stay_one() -> None:
    whole = factors(2, 8, 6, 0.5)
    halves = [
        (columns, WeightPoint(f"attn.{'qk'[i]}", f"m{i}.x", "", 3, 8, WeightLayout("linear")))
        for i, columns in enumerate((slice(0, 3), slice(3, 6)))
    ]
    places = [
        (Place(point, (8, 6), None, columns), Factors(whole.A[:, columns], whole.B, whole.layout, 0.5))
        for columns, point in halves
    ]
    a, b, scale = joined(places)
    assert (a.tolist(), b.tolist(), scale) == (whole.A.tolist(), whole.B.tolist(), 0.5)


def test_another_alpha_is_folded_into_b() -> None:
    assert torch.allclose(6.0 / 2 * folded(B, 0.5, 6.0, 2), 0.5 * B)
    assert folded(B, 3.0, 6.0, 2) is B
