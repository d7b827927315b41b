"""LoRA against its equations, on every kind of weight, without a model around it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapterkit.adapters.lora import LoRA, LoRAModule
from adapterkit.errors import ConfigError, SelectorError
from adapterkit.kernels.spans import read_span, write_spans
from adapterkit.kernels.weights import canonical
from adapterkit.mapping.family import weight_layout
from adapterkit.points import InjectionPoint, OutputLayout, OutputPoint, Span, WeightLayout, WeightPoint
from tests.adapters.recorder import recorded

Input = Callable[[], Tensor]

# torch's own remark on the even kernel below, made for the plain module too.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")


def point_of(module: nn.Module, role: str = "attn.q", span: Span | None = None, layer: int = 0) -> InjectionPoint:
    found = weight_layout(module)
    assert found is not None
    layout, inputs, outputs = found
    outputs = outputs if span is None else span.features
    return WeightPoint(role, "module", str(layer), inputs, outputs, layout, span, {"layer": layer})


def randomised(adapter: nn.Module) -> Any:
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.5)
    return adapter


def conv1d(inputs: int, outputs: int) -> nn.Module:
    layer = pytest.importorskip("transformers.pytorch_utils").Conv1D(outputs, inputs)
    nn.init.normal_(layer.bias)
    return layer


def image() -> Tensor:
    return torch.randn(2, 6, 9, 8)


MODULES: dict[str, tuple[Callable[[], nn.Module], Input]] = {
    "linear": (lambda: nn.Linear(6, 10), lambda: torch.randn(2, 3, 6)),
    "linear-no-bias": (lambda: nn.Linear(6, 10, bias=False), lambda: torch.randn(2, 3, 6)),
    "linear-transposed": (lambda: conv1d(6, 10), lambda: torch.randn(2, 3, 6)),
    "embedding": (lambda: nn.Embedding(7, 6), lambda: torch.randint(7, (2, 5))),
    "conv1d": (lambda: nn.Conv1d(6, 4, 3, stride=2, padding=1), lambda: torch.randn(2, 6, 9)),
    "conv2d": (lambda: nn.Conv2d(6, 4, 3), image),
    "conv2d-1x1": (lambda: nn.Conv2d(6, 4, 1), image),
    "conv2d-stride-padding": (lambda: nn.Conv2d(6, 4, (3, 5), stride=(2, 1), padding=(1, 2), bias=False), image),
    "conv2d-dilation": (lambda: nn.Conv2d(6, 4, 3, padding=2, dilation=2), image),
    "conv2d-groups": (lambda: nn.Conv2d(6, 9, 3, padding=1, groups=3), image),
    "conv2d-depthwise": (lambda: nn.Conv2d(6, 12, 3, groups=6), image),
    "conv2d-same": (lambda: nn.Conv2d(6, 4, (4, 3), padding="same", dilation=(1, 2)), image),
    "conv2d-valid": (lambda: nn.Conv2d(6, 4, 3, padding="valid", padding_mode="reflect"), image),
    "conv2d-reflect": (lambda: nn.Conv2d(6, 4, 3, padding=(2, 1), padding_mode="reflect"), image),
    "conv2d-circular": (lambda: nn.Conv2d(6, 4, 3, padding=2, stride=2, padding_mode="circular", groups=2), image),
    "conv2d-replicate-same": (lambda: nn.Conv2d(6, 4, (2, 3), padding="same", padding_mode="replicate"), image),
    "conv3d": (lambda: nn.Conv3d(4, 6, 3, padding=1, groups=2), lambda: torch.randn(1, 4, 4, 5, 3)),
}


@pytest.fixture(params=list(MODULES))
def layer(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor]:
    """A float64 module of each kind with an input for it."""
    torch.manual_seed(0)
    module, make = MODULES[request.param]
    x = make()
    return module().double(), x.double() if x.is_floating_point() else x


def test_no_effect_at_initialisation(layer: tuple[nn.Module, Tensor]) -> None:
    module, x = layer
    adapter = LoRA(rank=3, targets="*").build(point_of(module)).double()
    assert torch.equal(adapter(x, module), module(x))
    assert any(p.abs().sum() > 0 for p in adapter.parameters())  # one factor is random, else nothing could be learnt


def test_every_factor_is_reached_by_training(layer: tuple[nn.Module, Tensor]) -> None:
    """One step of gradient descent makes both gradients nonzero, from the zero effect."""
    module, x = layer
    adapter = LoRA(rank=3).build(point_of(module)).double()
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        adapter(x, module).square().sum().backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in adapter.parameters())


def test_merged_equals_unmerged(layer: tuple[nn.Module, Tensor]) -> None:
    module, x = layer
    adapter = randomised(LoRA(rank=3, alpha=5).build(point_of(module)).double())
    active = adapter(x, module)
    assert (active - module(x)).abs().max() > 1e-2
    _merge(module, adapter)
    assert torch.allclose(module(x), active, rtol=1e-10, atol=1e-10)


def _merge(module: Any, adapter: LoRAModule) -> None:
    layout = adapter.layout
    bias = getattr(module, "bias", None)
    weight, new_bias = adapter.merged(canonical(module.weight.detach(), layout), bias)
    assert new_bias is bias
    module.weight.data = canonical(weight.detach(), layout)


def test_delta_is_the_textbook_formula() -> None:
    module, x = nn.Linear(6, 10).double(), torch.randn(4, 6, dtype=torch.float64)
    adapter = randomised(LoRA(rank=2, alpha=3.0).build(point_of(module)).double())
    expected = F.linear(x, module.weight, module.bias) + 3.0 / 2 * x @ adapter.A.T @ adapter.B.T
    assert torch.allclose(adapter(x, module), expected, atol=1e-12)
    assert torch.allclose(adapter.delta_weight(), 1.5 * adapter.B @ adapter.A, atol=1e-12)


def test_scaled_embedding_has_the_scale_of_its_rows() -> None:
    """Gemma multiplies rows by sqrt(d); a merge into the table must still equal the adapter."""
    table = nn.Embedding(7, 4).double()
    layout = WeightLayout("embedding", scale=2.0)
    point = WeightPoint("embed.tokens", "embed", "", 7, 4, layout)
    adapter = randomised(LoRA(rank=2, targets="*").build(point).double())
    x = torch.tensor([[1, 6, 1]])
    active = adapter(x, lambda i: 2.0 * table(i))
    table.weight.data += adapter.delta_weight().T
    assert torch.allclose(2.0 * table(x), active, atol=1e-12)


@pytest.mark.parametrize("span", [Span(2, 4), Span(1, 2, count=2, step=5)], ids=["contiguous", "per-head"])
@pytest.mark.parametrize("name", ["linear", "linear-transposed", "conv2d-stride-padding"])
def test_span_equals_the_split_module(name: str, span: Span) -> None:
    module = (MODULES[name][0]() if "conv2d" not in name else nn.Conv2d(6, 10, 3, stride=2, padding=1)).double()
    x = MODULES[name][1]().double()
    point = point_of(module, span=span)
    adapter = randomised(LoRA(rank=2).build(point).double())
    dim = -1 - len(adapter.layout.kernel)
    whole = module(x)
    part = adapter(x, lambda x: read_span(module(x), span, dim))
    assert part.shape[dim] == span.features
    weight = canonical(module.weight.detach(), adapter.layout)
    rows, _ = adapter.merged(read_span(weight, span, 0), None)
    module.weight.data = canonical(write_spans(weight, [(span, rows.detach())], 0), adapter.layout)
    assert torch.allclose(module(x), write_spans(whole, [(span, part)], dim), atol=1e-10)


def test_part_of_a_grouped_convolution_is_refused() -> None:
    point = point_of(nn.Conv2d(6, 9, 3, groups=3), span=Span(0, 3))
    reason = LoRA().accepts(point)
    assert "grouped" in str(reason)
    assert LoRA().accepts(point_of(nn.Conv2d(6, 9, 3, groups=3))) is None


def test_refuses_other_kinds_of_points() -> None:
    point = OutputPoint("mlp", "mlp", "0", 4, 4, OutputLayout("norm"))
    assert "weight" in str(LoRA().accepts(point))


@pytest.mark.parametrize("name", ["linear", "conv2d-groups", "conv2d-circular", "embedding", "linear-transposed"])
def test_gradients(name: str) -> None:
    torch.manual_seed(1)
    module = MODULES[name][0]().double().requires_grad_(False)
    adapter = randomised(LoRA(rank=2, alpha=3.0).build(point_of(module)).double())
    x = MODULES[name][1]()
    x = x.double().requires_grad_() if x.is_floating_point() else x

    def run(*_: Tensor) -> Tensor:
        return adapter(x, module)

    checked = [t for t in (x, adapter.A, adapter.B) if t.requires_grad]
    assert torch.autograd.gradcheck(run, checked, fast_mode=True)


# --- dtypes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["linear", "linear-transposed", "conv2d", "conv2d-reflect"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_half_precision_input_is_never_copied_to_float32(name: str, dropout: float) -> None:
    module = MODULES[name][0]().bfloat16().requires_grad_(False)
    adapter = LoRA(rank=2, dropout=dropout).build(point_of(module))
    randomised(adapter).train()
    x = (torch.randn(31, 6, 13, 11) if "conv" in name else torch.randn(31, 17, 6)).bfloat16()
    with recorded() as seen:
        y = adapter(x, module)
        y.backward(torch.ones_like(y))
    assert y.dtype == torch.bfloat16
    assert adapter.A.grad.dtype == adapter.A.dtype == torch.float32
    large = x.numel() // 10
    assert max(p.numel() for p in adapter.parameters()) < large
    assert {dtype for dtype, size in seen if size >= large} <= {torch.bfloat16, torch.bool}


def test_embedding_keeps_the_dtype_of_its_base() -> None:
    table = nn.Embedding(7, 4).bfloat16()
    adapter = randomised(LoRA(rank=2).build(point_of(table)))
    x = torch.tensor([[0, 3]])
    assert adapter(x, table).dtype == torch.bfloat16
    assert adapter.delta(x).dtype == torch.float32


@pytest.mark.parametrize("name", ["linear", "conv2d", "embedding"])
def test_autocast(name: str) -> None:
    module, x = MODULES[name][0](), MODULES[name][1]()
    adapter = randomised(LoRA(rank=2).build(point_of(module)))
    exact = adapter(x, module)
    with torch.autocast("cpu", torch.bfloat16):
        y = adapter(x, module)
        assert y.dtype == module(x).dtype
    assert torch.allclose(y.float(), exact, rtol=0.05, atol=0.1)
    y.float().sum().backward()
    assert adapter.A.grad.dtype == torch.float32


def test_delta_weight_rounds_only_once() -> None:
    """A half-precision adapter is multiplied out in float32: the merge is the rounding of the exact sum."""
    module = nn.Linear(64, 64, bias=False).bfloat16()
    adapter = randomised(LoRA(rank=8, alpha=3.0).build(point_of(module))).bfloat16()
    assert adapter.delta_weight().dtype == torch.float32
    exact = module.weight.double() + 3.0 / 8 * adapter.B.double() @ adapter.A.double()
    merged, _ = adapter.merged(module.weight.float(), None)
    assert torch.allclose(merged.double(), exact, rtol=1e-6, atol=1e-6)
    float64 = adapter.double().delta_weight()
    assert float64.dtype == torch.float64


# --- dropout ----------------------------------------------------------------------------------------------------------


def test_dropout_acts_on_the_input_in_training_only() -> None:
    module, x = nn.Linear(6, 10).double(), torch.randn(4, 6, dtype=torch.float64)
    adapter = randomised(LoRA(rank=2, dropout=0.5).build(point_of(module)).double())
    torch.manual_seed(3)
    trained = adapter(x, module)
    torch.manual_seed(3)
    dropped = F.dropout(x, 0.5)
    assert torch.allclose(trained, module(x) + dropped @ adapter.A.T @ adapter.B.T, atol=1e-12)
    adapter.eval()
    assert torch.allclose(adapter(x, module), module(x) + x @ adapter.A.T @ adapter.B.T, atol=1e-12)


def test_dropout_of_an_embedding_acts_on_its_rows() -> None:
    table, x = nn.Embedding(7, 4).double(), torch.tensor([[1, 2, 3]])
    adapter = randomised(LoRA(rank=2, dropout=0.5).build(point_of(table)).double())
    torch.manual_seed(3)
    trained = adapter(x, table)
    torch.manual_seed(3)
    rows = F.dropout(F.embedding(x, adapter.A.T), 0.5)
    assert torch.allclose(trained, table(x) + rows @ adapter.B.T, atol=1e-12)


# --- configuration ----------------------------------------------------------------------------------------------------


def test_ranks_by_selector_last_match_wins() -> None:
    config = LoRA(rank=8, ranks={"mlp.*": 4, "*@layer>=2": 2, "mlp.down": 16})
    module = nn.Linear(6, 10)

    def rank(role: str, layer: int) -> int:
        return config.build(point_of(module, role, layer=layer)).A.shape[0]

    assert [rank("attn.q", 0), rank("mlp.up", 0)] == [8, 4]
    assert [rank("attn.q", 2), rank("mlp.up", 3), rank("mlp.down", 3)] == [2, 2, 16]


def test_scale_is_alpha_over_the_rank_of_the_point() -> None:
    module = nn.Linear(6, 10)
    fixed = LoRA(rank=8, alpha=4, ranks={"mlp.*": 2})
    assert fixed.build(point_of(module)).scale == 0.5
    assert fixed.build(point_of(module, "mlp.up")).scale == 2.0
    assert LoRA(rank=8, ranks={"mlp.*": 2}).build(point_of(module, "mlp.up")).scale == 1.0


def test_round_trip_through_json() -> None:
    import json

    config = LoRA(rank=4, alpha=2.5, dropout=0.1, targets="attn.{q,v}", ranks={"mlp.*": 2, "attn.*": 3})
    again = LoRA.from_dict(json.loads(json.dumps(config.to_dict(), sort_keys=True)))
    assert again == config
    assert list(again.ranks) == ["mlp.*", "attn.*"]
    assert hash(again) == hash(config)


def test_later_changes_of_the_table_do_not_reach_the_config() -> None:
    ranks = {"mlp.*": 4}
    config = LoRA(ranks=ranks)
    ranks["mlp.*"] = -1
    assert config.ranks == {"mlp.*": 4}
    assert config == LoRA.from_dict({"ranks": {"mlp.*": 4}})


def test_parameters_are_named_a_and_b() -> None:
    adapter = LoRA(rank=3).build(point_of(nn.Conv2d(6, 9, 3, groups=3)))
    assert {n: tuple(p.shape) for n, p in adapter.named_parameters()} == {"A": (3, 2, 3, 3), "B": (9, 3)}
    assert "A=(3, 2, 3, 3)" in repr(adapter)


def test_builds_on_the_meta_device() -> None:
    with torch.device("meta"):
        adapter = LoRA().build(point_of(nn.Linear(4096, 4096)))
    assert all(p.is_meta for p in adapter.parameters())


@pytest.mark.parametrize("rank", [0, -4, 4.5, "4", True, None, 2**16 + 1, math.nan])
def test_wrong_ranks(rank: Any) -> None:
    with pytest.raises(ConfigError, match="rank must be"):
        LoRA(rank=rank)
    with pytest.raises(ConfigError, match=r"ranks\['mlp.\*'\] must be"):
        LoRA(ranks={"mlp.*": rank})


@pytest.mark.parametrize("alpha", [math.nan, math.inf, -math.inf, 1e30, -1e30, "8", True, 8.1e4])
def test_wrong_alphas(alpha: Any) -> None:
    with pytest.raises(ConfigError, match="alpha"):
        LoRA(rank=8, alpha=alpha)


def test_alpha_is_bounded_for_every_rank() -> None:
    LoRA(rank=8, alpha=8e4)
    with pytest.raises(ConfigError, match="alpha / rank"):
        LoRA(rank=8, alpha=8e4, ranks={"mlp.*": 4})


@pytest.mark.parametrize("dropout", [-0.1, 1.0, 1.5, math.nan, "0.1", None, True])
def test_wrong_dropouts(dropout: Any) -> None:
    with pytest.raises(ConfigError, match="dropout must be"):
        LoRA(dropout=dropout)


@pytest.mark.parametrize("ranks", ["mlp.*", 4, [1], [["mlp.*", 4, 5]], [[["mlp.*"], 4]], None])
def test_wrong_rank_tables(ranks: Any) -> None:
    with pytest.raises(ConfigError, match="ranks must map"):
        LoRA(ranks=ranks)


@pytest.mark.parametrize("selector", ["", "attn.{q", 3])
def test_wrong_rank_selectors(selector: Any) -> None:
    with pytest.raises(SelectorError):
        LoRA(ranks={selector: 4})


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        LoRA(rank=0, dropout=2.0, ranks={"mlp.*": -1})
    assert len(caught.value.problems) == 3


def test_unknown_key() -> None:
    with pytest.raises(ConfigError, match="unknown key 'r'"):
        LoRA.from_dict({"r": 4})
