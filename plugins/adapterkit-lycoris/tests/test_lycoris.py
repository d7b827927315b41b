"""The types of LyCORIS: conformance, equations, and PEFT's numbers from the same weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from adapterkit_lycoris.diff import FullDiff, NormDiff
from adapterkit_lycoris.loha import LoHa
from adapterkit_lycoris.lokr import LoKr, factored
from adapterkit_lycoris.oft import BOFT, OFT
from adapterkit_lycoris.tucker import Tucker
from torch import Tensor, nn

import adapterkit as ak
from adapterkit import errors
from adapterkit.testing import AdapterConformance


@pytest.mark.slow
class TestLoHa(AdapterConformance):
    config = LoHa(rank=2, alpha=3, tucker=True)


class TestLoKr(AdapterConformance):
    config = LoKr(rank=1, alpha=2, decompose_both=True, tucker=True)


@pytest.mark.slow
class TestTucker(AdapterConformance):
    config = Tucker(rank=2)


class TestOFT(AdapterConformance):
    config = OFT(rescale=True, constraint=0.5)


@pytest.mark.slow
class TestBOFT(AdapterConformance):
    config = BOFT(block=2)


@pytest.mark.slow
class TestInputOFT(AdapterConformance):
    config = OFT(block=2, side="input", rescale=True)


@pytest.mark.slow
class TestFullDiff(AdapterConformance):
    config = FullDiff()


class TestNormDiff(AdapterConformance):
    config = NormDiff()


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(12, 16)
        self.conv = nn.Conv2d(4, 6, 3, padding=1, dilation=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.first(x).relu().view(-1, 4, 2, 2))


X = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))


def close(ours: Tensor, theirs: Tensor) -> bool:
    return (ours - theirs).abs().max().item() <= 1e-5 * theirs.abs().max().item()


def same_as_peft(config: ak.AdapterConfig, theirs: Any, prefix: str) -> None:
    peft = pytest.importorskip("peft")
    base = Model().eval()
    model = peft.get_peft_model(copy.deepcopy(base), theirs).eval()
    for name, parameter in model.named_parameters():
        if prefix in name:
            nn.init.normal_(parameter, std=0.3)
    adapters = ak.Adapters(base)
    adapters.add("a", config)
    layers = {"first": model.base_model.model.first, "conv": model.base_model.model.conv}
    for key, module in adapters.modules("a").items():
        layer = layers["conv" if "conv" in key else "first"]
        for name, parameter in module.named_parameters():
            parameter.data.copy_(getattr(layer, name)["default"].data.view_as(parameter))
    expected = model(X)
    assert not close(Model().eval()(X), expected)
    assert close(base(X), expected)
    with adapters.merged():
        assert close(base(X), expected)


@pytest.mark.parametrize("tucker", [False, True])
def test_loha_is_that_of_peft(tucker: bool) -> None:
    peft = pytest.importorskip("peft")
    theirs = peft.LoHaConfig(r=3, alpha=7, target_modules=["first", "conv"], use_effective_conv2d=tucker)
    same_as_peft(LoHa(rank=3, alpha=7, targets="*", tucker=tucker), theirs, "hada")


@pytest.mark.parametrize(("rank", "both", "factor"), [(1, False, -1), (1, True, -1), (8, False, -1), (1, False, 2)])
def test_lokr_is_that_of_peft(rank: int, both: bool, factor: int) -> None:
    peft = pytest.importorskip("peft")
    theirs = peft.LoKrConfig(
        r=rank, alpha=5, target_modules=["first", "conv"], decompose_both=both, decompose_factor=factor
    )
    same_as_peft(LoKr(rank=rank, alpha=5, targets="*", decompose_both=both, factor=factor), theirs, "lokr")


def test_oft_is_that_of_peft() -> None:
    """PEFT keeps the upper triangle of a skew matrix, and multiplies it from the other side."""
    peft = pytest.importorskip("peft")
    base = Model().eval()
    config = peft.OFTConfig(r=0, oft_block_size=4, target_modules=["first"], use_cayley_neumann=False)
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    weight = theirs.base_model.model.first.oft_R["default"].weight
    nn.init.normal_(weight, std=0.5)
    adapters = ak.Adapters(base)
    adapters.add("a", OFT(block=4, side="input", targets="path:first"))
    [module] = adapters.modules("a").values()
    rows, columns = torch.triu_indices(4, 4, 1)
    skew = torch.zeros(len(weight), 4, 4)
    skew[:, rows, columns] = weight.data
    module.oft_blocks.data.copy_(skew[None])  # type: ignore[union-attr,operator]
    expected = theirs(X)
    assert not close(Model().eval()(X), expected)
    assert close(base(X), expected)
    with adapters.merged():
        assert close(base(X), expected)


@pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension", "ignore::UserWarning")
def test_boft_is_that_of_peft() -> None:
    """PEFT halves what makes the rotation. Without its CUDA extension it has one factor."""
    peft = pytest.importorskip("peft")
    base = Model().eval()
    config = peft.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=1, target_modules=["first"])
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    layer = theirs.base_model.model.first
    nn.init.normal_(layer.boft_R["default"], std=0.5)
    nn.init.normal_(layer.boft_s["default"])
    adapters = ak.Adapters(base)
    adapters.add("a", BOFT(block=4, butterfly=1, side="input", rescale=True, targets="path:first"))
    [module] = adapters.modules("a").values()
    module.oft_blocks.data.copy_(layer.boft_R["default"] / 2)  # type: ignore[union-attr,operator]
    module.rescale.data.copy_(layer.boft_s["default"][:, 0])  # type: ignore[union-attr,operator]
    expected = theirs(X)
    assert not close(Model().eval()(X), expected)
    assert close(base(X), expected)
    with adapters.merged():
        assert close(base(X), expected)


def test_butterflies_are_those_of_peft() -> None:
    """Two factors, by PEFT's permutations. Its third pairs what its second does: it reaches no further."""
    layers = pytest.importorskip("peft.tuners.boft.layer")
    torch.manual_seed(0)
    layer = nn.Linear(16, 6).double()
    x = torch.randn(3, 16, dtype=torch.float64)
    adapters = ak.Adapters(nn.Sequential(layer))
    adapters.add("a", BOFT(block=4, butterfly=2, side="input", targets="*"))
    [module] = adapters.modules("a").values()
    module.oft_blocks.data.normal_()  # type: ignore[union-attr,operator]
    rotation = torch.eye(16, dtype=torch.float64)
    for i, blocks in enumerate(module.rotations()):  # type: ignore[operator]
        order = layers.BOFTLayer.block_butterfly_perm(None, 16, 4 // 2**i, 2, 1)
        permutation = torch.eye(16, dtype=torch.float64)[order]
        rotation = rotation @ (permutation.T @ torch.block_diag(*blocks) @ permutation)
    assert torch.allclose(layer(x), nn.functional.linear(x @ rotation.T, layer.weight, layer.bias), rtol=1e-9)


@pytest.mark.parametrize("butterfly", [1, 2, 3])
def test_every_factor_reaches_twice_as_far(butterfly: int) -> None:
    adapters = ak.Adapters(nn.Sequential(nn.Linear(5, 16).double()))
    adapters.add("a", BOFT(block=4, butterfly=butterfly, targets="*"))
    [module] = adapters.modules("a").values()
    module.oft_blocks.data.normal_()  # type: ignore[union-attr,operator]
    rotation, _ = module.merged(torch.eye(16, dtype=torch.float64), None)
    blocks = torch.block_diag(*torch.ones(4, 4, 4))
    reach = torch.block_diag(*torch.ones(16 // (4 * 2 ** (butterfly - 1)), *[4 * 2 ** (butterfly - 1)] * 2))
    assert torch.equal(rotation.abs() > 1e-9, reach > 0)
    assert reach.sum() == blocks.sum() * 2 ** (butterfly - 1)


def test_kronecker_is_torchs() -> None:
    model = nn.Sequential(nn.Linear(12, 16)).double()
    adapters = ak.Adapters(model)
    adapters.add("a", LoKr(rank=1, targets="*", decompose_both=True))
    [module] = adapters.modules("a").values()
    for parameter in module.parameters():
        parameter.data.normal_()
    m: Any = module
    expected = torch.kron(m.lokr_w1_a @ m.lokr_w1_b, m.lokr_w2_a @ m.lokr_w2_b)
    assert torch.allclose(m.delta_weight(), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("size", "factor", "expected"),
    [(16, -1, (4, 4)), (12, -1, (3, 4)), (12, 8, (2, 6)), (7, -1, (1, 7)), (12, 4, (3, 4))],
)
def test_sides_are_factored(size: int, factor: int, expected: tuple[int, int]) -> None:
    assert factored(size, factor) == expected


@pytest.mark.parametrize("config", [OFT(block=4, targets="*"), BOFT(block=2, butterfly=3, targets="*")])
def test_rows_keep_their_lengths_and_angles(config: OFT) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(5, 16).double()
    adapters = ak.Adapters(nn.Sequential(layer))
    adapters.add("a", config)
    [module] = adapters.modules("a").values()
    for parameter in module.parameters():
        parameter.data.normal_()
    merged, bias = module.merged(layer.weight.detach(), layer.bias)
    assert torch.allclose(merged.T @ merged, layer.weight.T @ layer.weight, rtol=1e-10, atol=1e-10)
    assert bias is layer.bias
    rotation, _ = module.merged(torch.eye(16, dtype=torch.float64), None)
    assert torch.allclose(rotation @ rotation.T, torch.eye(16, dtype=torch.float64), rtol=1e-10, atol=1e-10)
    blocks = torch.block_diag(*torch.ones(4, 4, 4))
    assert bool((rotation.abs() > 1e-9).double().sum() > blocks.sum()) == isinstance(config, BOFT)  # reaches further


def test_a_constraint_bounds_the_rotation() -> None:
    layer = nn.Linear(5, 8).double()
    adapters = ak.Adapters(nn.Sequential(layer))
    adapters.add("a", OFT(block=4, constraint=1e-3, targets="*"))
    [module] = adapters.modules("a").values()
    next(module.parameters()).data.normal_(std=10)
    rotation, _ = module.merged(torch.eye(8, dtype=torch.float64), None)
    assert (rotation - torch.eye(8)).norm() < 4 * 2 * 1e-3 * 4


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Tucker(targets="path:first"), "use LoRA"),
        (OFT(block=5, targets="path:first"), "its 16 features"),
    ],
)
def test_where_types_cannot_act(config: ak.AdapterConfig, message: str) -> None:
    with pytest.raises(errors.IncompatibleTargetError, match=message):
        ak.Adapters(Model()).add("a", config)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LoHa(rank=0), "rank must be from 1"),
        (lambda: LoHa(dropout=1.0), "dropout must be"),
        (lambda: LoKr(factor=0), "factor must be"),
        (lambda: OFT(block=0), "block must be"),
        (lambda: OFT(constraint=-1.0), "constraint must be"),
        (lambda: BOFT(butterfly=0), "butterfly must be"),
    ],
)
def test_wrong_values(make: Any, message: str) -> None:
    with pytest.raises(errors.ConfigError, match=message):
        make()
