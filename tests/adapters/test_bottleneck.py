"""Bottleneck against the equations of its papers, in explicit pre-norm and post-norm blocks."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapterkit.adapters.bottleneck import ACTIVATIONS, INPUTS, Bottleneck
from adapterkit.errors import ConfigError, NotMergeableError
from adapterkit.points import OutputLayout, OutputPoint, WeightLayout, WeightPoint
from tests.adapters.recorder import recorded

FEATURES = 12
POINT = OutputPoint("mlp", "mlp", "0", FEATURES, FEATURES, OutputLayout("norm", "norm"))


class Block(nn.Module):
    """One residual sublayer; both normalisations at once stand for sandwich blocks, such as Gemma 2's."""

    def __init__(self, pre: bool, post: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(FEATURES, FEATURES)
        self.pre = nn.LayerNorm(FEATURES) if pre else nn.Identity()
        self.post = nn.LayerNorm(FEATURES) if post else nn.Identity()
        for parameter in self.parameters():
            nn.init.normal_(parameter)
        self.double()

    def sublayer(self, x: Tensor) -> Tensor:
        return torch.sin(self.inner(self.pre(x)))

    def __call__(self, x: Tensor) -> Tensor:
        return self.sublayer(x)

    norm_in = property(lambda self: self.pre)
    norm_out = property(lambda self: self.post)


def built(config: Bottleneck, randomise: bool = True) -> Any:
    torch.manual_seed(1)
    module = config.build(POINT).double()
    if randomise:
        for parameter in module.parameters():
            nn.init.normal_(parameter)
    return module


def network(module: Any, h: Tensor, f: Callable[[Tensor], Tensor] = F.relu) -> Tensor:
    return f(h @ module.down.weight.T + module.down.bias) @ module.up.weight.T + module.up.bias


def stream() -> Tensor:
    torch.manual_seed(2)
    return torch.randn(2, 5, FEATURES, dtype=torch.float64)


BLOCKS = {"pre-norm": Block(True, False), "post-norm": Block(False, True)}


@pytest.fixture(params=list(BLOCKS))
def block(request: pytest.FixtureRequest) -> Block:
    return BLOCKS[request.param]


def test_pfeiffer(block: Block) -> None:
    """LN(A(LN(s + x)) + s + x) after a post-norm sublayer, A(s + x) + s + x in a pre-norm block."""
    module, x = built(Bottleneck(form="pfeiffer")), stream()
    s = block.sublayer(x)
    expected = block.post(network(module, block.post(s + x)) + s + x)
    assert torch.allclose(block.post(x + module(x, block)), expected, atol=1e-12)


def test_houlsby(block: Block) -> None:
    """LN(A(s) + s + x), or A(s) + s + x."""
    module, x = built(Bottleneck(form="houlsby")), stream()
    s = block.sublayer(x)
    assert torch.allclose(block.post(x + module(x, block)), block.post(network(module, s) + s + x), atol=1e-12)


def test_parallel(block: Block) -> None:
    """LN(s + scale A(x) + x), or s + scale A(x) + x."""
    module, x = built(Bottleneck(form="parallel", scaling=4.0)), stream()
    s = block.sublayer(x)
    assert torch.allclose(block.post(x + module(x, block)), block.post(s + 4 * network(module, x) + x), atol=1e-12)


def test_parallel_norm(block: Block) -> None:
    """A sees what the sublayer sees: norm_in(x) in a pre-norm block, x itself in a post-norm block."""
    module, x = built(Bottleneck(form="parallel_norm", scaling=0.5)), stream()
    expected = block.sublayer(x) + 0.5 * network(module, block.pre(x))
    assert torch.allclose(module(x, block), expected, atol=1e-12)
    plain = built(Bottleneck(form="parallel", scaling=0.5))
    assert torch.allclose(module(x, block), plain(x, block), atol=1e-12) is (block is BLOCKS["post-norm"])


def test_forms_differ() -> None:
    x = stream()
    both = Block(True, True)
    outputs = [built(Bottleneck(form=form))(x, both) for form in INPUTS]
    for i, first in enumerate(outputs):
        assert not any(torch.allclose(first, second, atol=1e-3) for second in outputs[i + 1 :])


@pytest.mark.parametrize("form", list(INPUTS))
@pytest.mark.parametrize("scaling", [1.0, -3.0, "learned"])
def test_no_effect_at_initialisation(form: str, scaling: float | str, block: Block) -> None:
    module, x = built(Bottleneck(form=form, scaling=scaling), randomise=False), stream()
    assert torch.equal(module(x, block), block.sublayer(x))
    assert module.down.weight.abs().min() > 0


@pytest.mark.parametrize("form", list(INPUTS))
def test_every_parameter_is_reached_by_training(form: str, block: Block) -> None:
    module, x = built(Bottleneck(form=form, scaling="learned", activation="tanh"), randomise=False), stream()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        block.post(x + module(x, block)).pow(4).sum().backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in module.parameters())


@pytest.mark.parametrize("form", list(INPUTS))
def test_gradients(form: str) -> None:
    block, x = Block(True, True), stream().requires_grad_()
    module = built(Bottleneck(form=form, scaling="learned", activation="silu", width=3))
    assert torch.autograd.gradcheck(lambda *_: module(x, block), [x, *module.parameters()], fast_mode=True)


def test_the_sublayer_runs_once() -> None:
    calls = []

    class Counting(Block):
        def sublayer(self, x: Tensor) -> Tensor:
            calls.append(1)
            return super().sublayer(x)

    for form in INPUTS:
        built(Bottleneck(form=form))(stream(), Counting(True, True))
    assert len(calls) == len(INPUTS)


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("relu", lambda z: z.clamp(min=0)),
        ("gelu", lambda z: z * 0.5 * (1 + torch.erf(z / math.sqrt(2)))),
        ("gelu_new", lambda z: 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))),
        ("silu", lambda z: z / (1 + torch.exp(-z))),
        ("tanh", lambda z: (torch.exp(2 * z) - 1) / (torch.exp(2 * z) + 1)),
        ("sigmoid", lambda z: 1 / (1 + torch.exp(-z))),
        ("leaky_relu", lambda z: torch.where(z > 0, z, 0.01 * z)),
        ("relu2", lambda z: z.clamp(min=0) ** 2),
        ("relu6", lambda z: z.clamp(0, 6)),
        ("mish", lambda z: z * torch.tanh(torch.log(1 + torch.exp(z)))),
        ("quick_gelu", lambda z: z / (1 + torch.exp(-1.702 * z))),
        ("identity", lambda z: z),
    ],
)
def test_activations(name: str, formula: Callable[[Tensor], Tensor]) -> None:
    block, x = BLOCKS["pre-norm"], stream()
    module = built(Bottleneck(form="houlsby", activation=name))
    s = block.sublayer(x)
    assert torch.allclose(module(x, block), s + network(module, s, formula), atol=1e-10)


def test_every_activation_is_tested() -> None:
    marks = test_activations.pytestmark  # type: ignore[attr-defined]
    assert {case[0] for case in marks[0].args[1]} == set(ACTIVATIONS)


@pytest.mark.parametrize(
    ("config", "width"),
    [
        (Bottleneck(), 1),
        (Bottleneck(reduction=4), 3),
        (Bottleneck(reduction=5), 2),
        (Bottleneck(reduction=0.5), 24),
        (Bottleneck(reduction=100), 1),
        (Bottleneck(width=7), 7),
        (Bottleneck(width=7, reduction=2), 7),
    ],
)
def test_hidden_width(config: Bottleneck, width: int) -> None:
    assert config.build(POINT).down.weight.shape == (width, FEATURES)


def test_learnt_scale() -> None:
    block, x = BLOCKS["post-norm"], stream()
    module = built(Bottleneck(form="houlsby", scaling="learned"))
    module.scale.data.fill_(2.5)
    s = block.sublayer(x)
    assert torch.allclose(module(x, block), s + 2.5 * network(module, s), atol=1e-12)
    assert Bottleneck(scaling="learned").build(POINT).scale.item() == 1.0
    assert "scale" not in dict(built(Bottleneck(scaling=2.0)).named_parameters())


def test_dropout_acts_on_the_network_in_training_only() -> None:
    block, x = BLOCKS["pre-norm"], stream()
    module = built(Bottleneck(form="houlsby", dropout=0.5))
    s = block.sublayer(x)
    torch.manual_seed(3)
    trained = module(x, block)
    torch.manual_seed(3)
    assert torch.allclose(trained, s + F.dropout(network(module, s), 0.5), atol=1e-12)
    assert torch.allclose(module.eval()(x, block), s + network(module, s), atol=1e-12)


@pytest.mark.parametrize("form", list(INPUTS))
def test_keeps_the_dtype_of_the_sublayer(form: str) -> None:
    block, x = Block(True, True).bfloat16(), stream().bfloat16()
    module = Bottleneck(form=form, scaling="learned").build(POINT)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    y = module(x, block)
    assert y.dtype == torch.bfloat16
    y.backward(torch.ones_like(y))
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in module.parameters())
    exact = module(x.float(), block.float())
    assert torch.allclose(y.float(), exact, rtol=0.1, atol=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x.float(), block).dtype == block(x.float()).dtype


@pytest.mark.parametrize("form", list(INPUTS))
def test_half_precision_stream_is_never_copied_to_float32(form: str) -> None:
    block = Block(False, False).bfloat16().requires_grad_(False)
    x = torch.randn(31, 17, FEATURES).bfloat16()
    module = Bottleneck(form=form, scaling="learned", width=2, dropout=0.5).build(POINT)
    with recorded() as seen:
        y = module(x, block)
        y.backward(torch.ones_like(y))
    large = x.numel() // 10
    assert max(p.numel() for p in module.parameters()) < large
    assert {dtype for dtype, size in seen if size >= large} <= {torch.bfloat16, torch.bool}


def test_a_wider_residual_stream_does_not_widen_the_sublayer() -> None:
    block, x = BLOCKS["pre-norm"], stream()
    s = block.sublayer(x).bfloat16()
    assert built(Bottleneck(form="parallel"))(x, lambda _: s).dtype == torch.bfloat16


def test_has_no_equivalent_weight() -> None:
    with pytest.raises(NotMergeableError):
        built(Bottleneck()).merged(torch.zeros(2, 2), None)


def test_builds_on_the_meta_device() -> None:
    with torch.device("meta"):
        module = Bottleneck(scaling="learned").build(POINT)
    assert all(p.is_meta for p in module.parameters())


def test_round_trip_through_json() -> None:
    for config in (Bottleneck(), Bottleneck(form="parallel", scaling="learned", reduction=2.5), Bottleneck(width=4)):
        assert Bottleneck.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_refuses_weights() -> None:
    point = WeightPoint("mlp.up", "mlp.up", "0", 4, 4, WeightLayout("linear"))
    assert "output" in str(Bottleneck().accepts(point))
    assert Bottleneck().accepts(POINT) is None


WRONG: list[tuple[str, Any]] = [
    *(("reduction", v) for v in (0, -4, "4", True, None, math.nan, math.inf, 2**17, 1e-9)),
    *(("width", v) for v in (0, -4, 4.5, "4", True, 2**17)),
    *(("form", v) for v in ("pfeifer", "", None, 3)),
    *(("activation", v) for v in ("relu7", "__class__", None, True)),
    *(("scaling", v) for v in ("learnt", math.nan, math.inf, 1e30, None, True)),
    *(("dropout", v) for v in (1.0, -0.1, math.nan, "0", None)),
]


@pytest.mark.parametrize(("key", "value"), WRONG)
def test_wrong_values(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=key) as caught:
        Bottleneck(**{key: value})
    assert repr(value) in str(caught.value)


def test_near_match_of_a_form() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'pfeiffer'"):
        Bottleneck(form="pfeifer")
