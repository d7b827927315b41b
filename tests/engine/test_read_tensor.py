"""A weight that a model reads where nobody foresaw it is a tensor: whatever is done to it sees the adapters in it."""

from __future__ import annotations

import copy
import operator
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.engine.read_weights import ReadWeight
from adapterkit.errors import AttachError
from tests.values import randomize

X = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Reading(nn.Module):
    """Does something to the weight of a layer that it never calls."""

    def __init__(self, what: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.what = nn.Linear(4, 4), what

    def forward(self, x: Tensor) -> Any:
        return self.what(self.layer.weight)


def reading(what: Callable[[Tensor], Any]) -> tuple[Reading, ak.Adapters, Tensor]:
    """A model, its adapters and its weight with the adapter in it."""
    torch.manual_seed(0)
    model = Reading(what).double()
    adapters = ak.Adapters(model)
    adapters.add("a", ak.LoRA(rank=2, targets="*"))
    randomize(adapters, "a")
    module = adapters.modules("a")["linear@model.layer"]
    return model, adapters, model.layer.weight + module.B @ module.A  # type: ignore[operator]


OPERATIONS: dict[str, Callable[[Tensor], Any]] = {
    "power": lambda w: w**2,
    "division": lambda w: 1 / w,
    "divided": lambda w: w / 2,
    "abs": abs,
    "greater": lambda w: w > 0,
    "equal": lambda w: w == w,
    "negative": operator.neg,
    "product": lambda w: X @ w,
    "right product": lambda w: w @ X.T,
    "difference": lambda w: 1 - w,
    "floor": lambda w: w // 0.1,
    "method": lambda w: w.mT.norm(dim=0),
    "function": lambda w: F.linear(X, w),
    "inside a list": lambda w: torch.stack([w, w]),
    "inside a tuple": lambda w: torch.cat((w, w)),
    "by keyword": lambda w: torch.add(input=X[:, :4].new_ones(4, 4), other=w),
    "item": lambda w: w[0, 0],
    "rows": lambda w: torch.stack([row.sum() for row in w]),
    "cast": lambda w: w.to(torch.float32),
    "data": lambda w: w.data,
    "detached": lambda w: w.detach(),
    "deep copy": copy.deepcopy,
    "pickle": lambda w: pickle.loads(pickle.dumps(w.detach())),
    "linear module": lambda w: torch.func.functional_call(nn.Linear(4, 4, bias=False).double(), {"weight": w}, (X,)),
    "einsum": lambda w: torch.einsum("ij,kj->ik", X, w),
}


@pytest.mark.parametrize("what", OPERATIONS.values(), ids=OPERATIONS)
def test_what_is_done_to_a_read_weight_sees_the_adapter(what: Callable[[Tensor], Any]) -> None:
    model, adapters, weight = reading(what)
    found, expected = model(X), what(weight.detach())
    assert type(found) is Tensor
    torch.testing.assert_close(found.detach(), expected, rtol=1e-10, atol=1e-10)
    with adapters.disabled():
        assert torch.equal(model(X), what(model.layer.weight.detach()))


def test_it_is_a_tensor_of_the_parameters_form() -> None:
    seen: list[Tensor] = []

    def look(weight: Tensor) -> Tensor:
        seen.append(weight)
        assert isinstance(weight, Tensor)
        assert isinstance(weight, ReadWeight)
        assert (weight.shape, weight.dtype, weight.device, weight.ndim, len(weight)) == (
            torch.Size((4, 4)),
            torch.float64,
            torch.device("cpu"),
            2,
            4,
        )
        assert (weight.dim(), weight.size(0), weight.numel(), weight.is_floating_point()) == (2, 4, 16, True)
        assert not weight.is_meta
        assert hash(weight) == hash(weight)
        return weight * 1

    model, _, weight = reading(look)
    torch.testing.assert_close(model(X), weight, rtol=1e-10, atol=1e-10)
    assert repr(seen[0]).startswith("tensor(")


def test_it_is_folded_once_and_only_where_it_is_computed_with(monkeypatch: pytest.MonkeyPatch) -> None:
    model, adapters, _ = reading(lambda w: w.sum() + w.mean() if w.dtype == torch.float64 else w)
    module, folds = adapters.modules("a")["linear@model.layer"], []
    kind, merged = type(module), type(module).merged

    def counted(self: Any, *given: Any) -> Any:
        folds.append(self)
        return merged(self, *given)

    monkeypatch.setattr(kind, "merged", counted)
    model(X)
    assert len(folds) == 1
    model.what = lambda w: X.to(w.dtype).to(w.device).view(-1)[: w.numel()]
    model(X)
    assert len(folds) == 1


def test_gradients_reach_the_adapter_through_it() -> None:
    model, adapters, weight = reading(lambda w: (w**2).sum() + abs(w).sum())
    model(X).backward()
    found = [parameter.grad.clone() for parameter in adapters.parameters("a") if parameter.grad is not None]
    for parameter in adapters.parameters("a"):
        parameter.grad = None
    ((weight**2).sum() + abs(weight).sum()).backward()
    assert len(found) == 2
    for one, parameter in zip(found, adapters.parameters("a"), strict=True):
        torch.testing.assert_close(one, parameter.grad, rtol=1e-10, atol=1e-10)


def test_what_reaches_below_torch_is_told_and_computes_nothing_wrong() -> None:
    def below(weight: Tensor) -> Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            return torch.sin(weight)

    model, _, _ = reading(below)
    with pytest.raises(AttachError, match=r"sin.*by a way that torch does not show"):
        model(X)
