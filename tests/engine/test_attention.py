"""Prefixes with weights, where the model has no mask and where it has one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.backend import Projection
from adapterkit.contract.abilities import Abilities
from adapterkit.engine.attending import Attended, _projected
from adapterkit.engine.attention import extend_all
from adapterkit.engine.switch import Switch
from adapterkit.errors import AttachError
from adapterkit.points import Span, WeightLayout, WeightPoint
from adapterkit.testing import families, models, toys
from tests.values import randomize


@pytest.mark.parametrize("make", [models.ToyVision, toys.ToyModel], ids=["no mask", "causal"])
@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.25, 0.75)])
def test_shares_of_a_prefix_are_the_prefix(make: type[nn.Module], weights: tuple[float, float]) -> None:
    """A weight multiplies a prefix's terms in the softmax: of two copies, w and 1 - w are the one."""
    families.register()
    model = make().double().eval().requires_grad_(False)
    x = toys.ids() if make is toys.ToyModel else torch.randn(2, 3, models.IMAGE, models.IMAGE, dtype=torch.float64)
    adapters = ak.Adapters(model)
    for name in ("one", "other"):
        adapters.add(name, ak.Prefix(length=2))
        randomize(adapters, name)
    with adapters.disabled():
        base = model(x)
    with adapters.activated("one"):
        expected = model(x)
    with adapters.activated(dict(zip(("one", "other"), weights, strict=True))):
        assert torch.allclose(model(x), expected, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(base, expected, rtol=1e-3)


def put(count: int) -> Any:
    """An adapter that puts so many positions in front."""

    def extend(keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.cat([one[:, :, :1].expand(-1, -1, count, -1), one], dim=2) for one in (keys, values))

    return SimpleNamespace(abilities=Abilities(extend=True), extend=extend)


def masked(mask: Tensor | None, weight: Any, *, queries: int = 3, causal: bool = False) -> Tensor | None:
    keys = torch.randn(2, 1, 3, 4)
    return extend_all(keys, keys, mask, [(put(2), weight)], queries=queries, causal=causal)[2]


def test_a_mask_is_made_where_one_is_needed_alone() -> None:
    assert masked(None, 1.0) is None
    assert masked(None, 1.0, queries=1, causal=True) is None
    found = masked(None, 1.0, causal=True)
    assert found is not None
    assert found[0, 0].int().tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]


def test_a_mask_that_is_given_stays_as_it_is() -> None:
    given = torch.tensor([True, False, True])[None, None, None].expand(2, 1, 3, 3)
    found = masked(given, 1.0, causal=True)
    assert found is not None
    assert torch.equal(found[..., 2:], given)
    assert found[..., :2].all()


def test_a_weight_that_a_program_computes_is_a_column() -> None:
    found, expected = (masked(None, weight) for weight in (torch.tensor(0.5), 0.5))
    assert found is not None
    assert expected is not None
    assert torch.allclose(found, expected)


@pytest.mark.parametrize("bias", [True, False])
def test_tokens_are_projected_by_a_weight_that_the_model_reads(bias: bool) -> None:
    held = nn.MultiheadAttention(4, 2, bias=bias)
    layout = WeightLayout("linear", bias, access="read", parameter="in_proj_weight", bias_parameter="in_proj_bias")
    point = WeightPoint("attn.k", "k", "", 4, 4, layout, span=Span(4, 4))
    x, projection = torch.randn(3, 4), Projection(held, point, 2)
    found = _projected(projection, x, Switch())
    expected = F.linear(x, held.in_proj_weight[4:8], held.in_proj_bias[4:8] if bias else None)
    torch.testing.assert_close(found, expected.view(3, 2, 2).transpose(0, 1))
    held.in_proj_weight = None  # type: ignore[assignment]
    with pytest.raises(AttachError, match="no dense weight at"):
        _projected(projection, x, Switch())


def test_what_an_attention_cannot_be_asked_is_told() -> None:
    query, keys, values, output = (torch.randn(1, 2, 3, 4) for _ in range(4))
    side: Any = None
    base = Attended(query, keys, values, output, None, Switch(), side, None)
    assert base(query) is output
    with pytest.raises(ValueError, match=r"base\(query\) can only be asked for the query that attend was given"):
        base(query.clone())
    with pytest.raises(AttachError, match=r"keys and values are not known, and base\.project needs them"):
        base.project(torch.randn(1, 5, 8))
