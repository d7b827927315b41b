"""What adapters are given as their base, beside the whole of a layer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapterkit.engine.around_weights import _around_whole
from adapterkit.engine.bases import Computed, Frozen, PartBase, SublayerBase
from adapterkit.engine.context import Context, no_side
from adapterkit.engine.nesting import first_argument
from adapterkit.points import Span, TokensLayout, TokensPoint, WeightLayout, WeightPoint

POINT = WeightPoint("attn.o", "o", "", 4, 5, WeightLayout("linear"), in_span=Span(2, 4))


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("own", [True, False])
def test_a_layer_of_a_part_of_the_input_keeps_the_rest(own: bool, given: bool) -> None:
    layer, x = nn.Linear(6, 5, bias=own).double(), torch.randn(3, 6).double()
    weight, bias = torch.randn(5, 4).double(), torch.randn(5).double() if given else None
    part = x[:, 2:]
    base = PartBase(Computed(layer, x), x, part, Span(2, 4), POINT, lambda: (layer.weight[:, 2:], layer.bias))
    whole = torch.cat([layer.weight[:, :2], weight], dim=1)
    expected = F.linear(x, whole, layer.bias if bias is None else bias)
    torch.testing.assert_close(base.layer(part, weight, bias), expected)


def test_the_part_itself_is_the_whole_input_that_was_computed() -> None:
    asked: list[Tensor] = []
    x = torch.randn(3, 6)
    part = x[:, 2:]
    base = PartBase(
        Computed(lambda one: asked.append(one) or one * 2, x), x, part, Span(2, 4), POINT, lambda: (x, None)
    )
    assert base(part) is base(part)
    assert torch.equal(base(part + 1), torch.cat([x[:, :2], part + 1], dim=1) * 2)
    assert asked[0] is x
    assert len(asked) == 2


def test_the_norms_beside_a_sublayer_are_asked_where_there_are_some() -> None:
    x, y, norms = torch.randn(2, 4), torch.randn(2, 4), (nn.LayerNorm(4), nn.Tanh())
    bare, between = SublayerBase(x, y, None, None), SublayerBase(x, y, *norms)
    assert bare.norm_in(x) is x
    assert bare.norm_out(y) is y
    assert torch.equal(between.norm_in(x), norms[0](x))
    assert torch.equal(between.norm_out(y), norms[1](y))


def test_a_number_has_one_row() -> None:
    found = Context({"image": torch.ones(1, 3)}, torch.tensor(5.0), "time")["image"]
    assert found.shape == (1, 3)


def test_a_module_gets_all_that_it_is_called_with() -> None:
    def forward(*args: object, **kwargs: object) -> tuple[object, ...]:
        return (*args, kwargs)

    for args, kwargs in (((1, 2, 3), {"k": 4}), ((1,), {"k": 4}), ((1, 2), {}), ((1,), {})):
        x, run = first_argument(forward, args, kwargs)
        assert (x, run(x)) == (1, forward(*args, **kwargs))
        found = _around_whole(POINT, no_side, lambda x, base: base(x), nn.Module(), forward, args, kwargs)
        assert found == forward(*args, **kwargs)
    x, run = first_argument(forward, (), {"k": 4, "l": 5})
    assert (x, run(6)) == (4, ({"k": 6, "l": 5},))


def test_an_input_is_computed_once() -> None:
    asked: list[Tensor] = []
    x = torch.ones(2)
    base = Computed(lambda one: asked.append(one) or one + 1, x)
    assert base(x) is base(x)
    assert torch.equal(base(x + 1), x + 2)
    assert len(asked) == 2


def test_a_base_without_a_weight_is_told() -> None:
    tokens = TokensPoint("tokens", "embed", "", 6, 6, TokensLayout())
    x = torch.randn(3, 6)
    base = Frozen(Computed(nn.Identity(), x), tokens, lambda: (x, None))
    with pytest.raises(TypeError, match="tokens@model is no weight point"):
        base.layer(x, x, None)
