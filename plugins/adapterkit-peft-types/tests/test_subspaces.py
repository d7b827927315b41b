"""PSOFT and OSF: conformance, and PEFT's numbers from the same tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from adapterkit_peft_types.osf import OSF
from adapterkit_peft_types.psoft import PSOFT
from torch import nn

import adapterkit as ak
from adapterkit import errors
from adapterkit.testing import AdapterConformance


@pytest.mark.slow
class TestPSOFT(AdapterConformance):
    config = PSOFT(rank=3)


@pytest.mark.slow
class TestPSOFTBySums(AdapterConformance):
    config = PSOFT(rank=2, balanced=True, terms=4, bound=0.5, iterations=3, scale_after=False)


@pytest.mark.slow
class TestPSOFTFree(AdapterConformance):
    config = PSOFT(rank=2, orthogonal=False, scale_before=False)


@pytest.mark.slow
class TestOSF(AdapterConformance):
    config = OSF()


@pytest.fixture
def peft() -> Any:
    return pytest.importorskip("peft")


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({}, {}),
        ({"psoft_orth": False, "psoft_mag_a": False}, {"orthogonal": False, "scale_before": False}),
        ({"ab_svd_init": "pissa_init", "psoft_mag_b": False}, {"balanced": True, "scale_after": False}),
        ({"use_cayley_neumann": True}, {"terms": 5}),
        ({"use_cayley_neumann": True, "num_cayley_neumann_terms": 2}, {"terms": 2}),
        ({"use_cayley_neumann": True, "num_cayley_neumann_terms": 3}, {"terms": 4}),
        (
            {"use_cayley_neumann": True, "num_cayley_neumann_terms": 7, "cayley_neumann_eps": 0.4},
            {"terms": 7, "bound": 0.4},
        ),
        ({"psoft_svd": "lowrank", "psoft_svd_lowrank_niter": 2, "random_seed": 3}, {"iterations": 2, "seed": 3}),
    ],
)
def test_psoft_is_that_of_peft(
    same_as_peft: Callable[..., None], peft: Any, theirs: dict[str, Any], ours: dict[str, Any]
) -> None:
    def copied(module: Any, layer: Any) -> None:
        other = layer.psoft_R["default"]
        module.turn.data.copy_(other.weight.data)
        for name, vector in (("after", other.vector_b), ("before", other.vector_a)):
            assert (getattr(module, name) is None) == (vector is None)
            if vector is not None:
                getattr(module, name).data.copy_(vector.data)

    config = PSOFT(rank=4, targets="path:first path:second", **ours)
    same_as_peft(config, peft.PsoftConfig(r=4, psoft_alpha=12, target_modules=["first", "second"], **theirs), copied)


@pytest.mark.parametrize("kept", [None, 3, 0.7])
def test_osf_is_that_of_peft(same_as_peft: Callable[..., None], peft: Any, kept: Any) -> None:
    def copied(module: Any, layer: Any) -> None:
        for name in "USV":
            getattr(module, name).data.copy_(layer.osf_svd_params["default"][f"{name}_low"].data)

    config = OSF(kept=kept, targets="path:first path:second path:square")
    same_as_peft(
        config, peft.OSFConfig(effective_rank=kept, target_modules=["first", "second", "square"]), copied, layers()
    )


def layers() -> nn.Sequential:
    """A wide layer, a tall one and a square one."""
    torch.manual_seed(0)
    model = nn.Sequential()
    for name, layer in (("first", nn.Linear(12, 8)), ("second", nn.Linear(8, 12)), ("square", nn.Linear(12, 12))):
        model.add_module(name, layer)
    return model


def test_gradients_of_osf_are_projected_as_those_of_peft(peft: Any) -> None:
    base = layers()
    names = ["first", "second", "square"]
    theirs = peft.get_peft_model(layers(), peft.OSFConfig(target_modules=names))
    adapters = ak.Adapters(base)
    adapters.add("a", OSF(targets="path:first path:second path:square"))
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
    for model in (base, theirs):
        model(x).square().sum().backward()
    for module, name in zip(adapters.modules("a").values(), names, strict=True):
        params = theirs.base_model.model.get_submodule(name).osf_svd_params["default"]
        for ours in "USV":
            found, expected = getattr(module, ours).grad, params[f"{ours}_low"].grad
            assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_the_larger_singular_values_stay() -> None:
    """A step along the projected gradient leaves the larger part of the decomposition where it was."""
    model = nn.Sequential(nn.Linear(6, 9))
    u, s, vh = torch.linalg.svd(model[0].weight.detach(), full_matrices=False)
    adapters = ak.Adapters(model)
    adapters.add("a", OSF(kept=2, targets="*"))
    optimizer = torch.optim.SGD(adapters.parameters("a"), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 6)).square().mean().backward()
        optimizer.step()
    with adapters.merged():
        now = u.mT @ model[0].weight @ vh.mT
    assert torch.allclose(now[:2, :2], torch.diag(s[:2]), atol=1e-5)
    assert now[:2, 2:].abs().max() < 1e-5
    assert now[2:, :2].abs().max() < 1e-5


@pytest.mark.parametrize(
    ("cls", "options", "named"),
    [
        (PSOFT, {"bound": 0.5}, "bound"),
        (PSOFT, {"terms": 0}, "terms"),
        (PSOFT, {"iterations": -1}, "iterations"),
        (PSOFT, {"seed": -1}, "seed"),
        (OSF, {"kept": 0}, "kept"),
        (OSF, {"kept": 1.5}, "kept"),
    ],
)
def test_wrong_values(cls: Any, options: dict[str, Any], named: str) -> None:
    with pytest.raises(errors.ConfigError, match=named):
        cls(**options)


@pytest.mark.parametrize("config", [PSOFT(rank=5, targets="*"), OSF(kept=4, targets="*")])
def test_a_weight_with_too_few_singular_values(config: ak.AdapterConfig) -> None:
    with pytest.raises(errors.IncompatibleTargetError, match=r"which has 4|has 4 singular values"):
        ak.Adapters(nn.Sequential(nn.Linear(4, 7))).add("a", config)
