"""VeRA: conformance, parameter counts, and PEFT's numbers from the same weights."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from adapterkit_vera.vera import VeRA
from torch import Tensor, nn

import adapterkit as ak
from adapterkit import errors
from adapterkit.testing import AdapterConformance, models


class TestSaved(AdapterConformance):
    config = VeRA(rank=4)


@pytest.mark.slow
class TestDrawnAgain(AdapterConformance):
    config = VeRA(rank=4, save_projection=False, projection_seed=3)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(12, 16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


def test_it_is_that_of_peft() -> None:
    peft = pytest.importorskip("peft")
    base = Model().eval()
    config = peft.VeraConfig(r=6, target_modules=["first", "second"])
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    adapters = ak.Adapters(base)
    adapters.add("a", VeRA(rank=6, targets="*"))
    shared = next(iter(adapters.modules("a").values())).shared
    shared.A.copy_(theirs.base_model.vera_A["default"])
    shared.B.copy_(theirs.base_model.vera_B["default"])
    for key, module in adapters.modules("a").items():
        layer = theirs.base_model.model.get_submodule("first" if "first" in key else "second")
        for ours, other in ((module.d, layer.vera_lambda_d), (module.b, layer.vera_lambda_b)):
            nn.init.normal_(other["default"])
            ours.data.copy_(other["default"].data)  # type: ignore[union-attr,operator]
    x = torch.randn(3, 12)
    expected = theirs(x)
    assert (base(x) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_layer_has_two_vectors() -> None:
    """AdapterHub's are dense matrices: 589,888 numbers for one layer of width 768."""
    adapters = ak.Adapters(nn.Sequential(nn.Linear(768, 768)))
    assert adapters.add("a", VeRA(rank=64, targets="*")).parameters == 64 + 768


@pytest.mark.parametrize("saved", [True, False])
def test_files_hold_the_projections_or_their_seed(tmp_path: Path, saved: bool) -> None:
    example = models.EXAMPLES[0]
    from adapterkit.testing import families

    families.register()
    model = example.make().eval()
    adapters = ak.Adapters(model)
    adapters.add("a", VeRA(rank=64, save_projection=saved, projection_seed=5))
    for parameter in adapters.parameters("a"):
        parameter.data.normal_()
    model.requires_grad_(False)
    (x,), _ = example.inputs(2, torch.float32)
    y = model(x)
    path = adapters.save("a", tmp_path / "a.safetensors")
    assert (path.stat().st_size > 2 * 64 * 8 * 4) == saved or not saved
    adapters.detach()
    adapters.load(path)
    adapters.activate("a")
    model.requires_grad_(False)
    assert torch.equal(model(x), y)


def test_rows_have_their_own() -> None:
    """PEFT ignores `adapter_names` for most types without a word."""
    model = Model().double().eval()
    adapters = ak.Adapters(model)
    for seed, name in enumerate(("a", "b")):
        adapters.add(name, VeRA(rank=3 + seed, targets="*"))
        for parameter in adapters.parameters(name):
            parameter.data.normal_()
    x = torch.randn(3, 12, dtype=torch.float64)
    with adapters.routed(["a", None, "b"]):
        together = model(x)
    for row, name in zip((0, 1, 2), ("a", None, "b"), strict=True):
        with adapters.activated(name):
            assert torch.allclose(together[row], model(x[row : row + 1])[0], rtol=1e-10, atol=1e-10)
    with pytest.raises(errors.UnknownNameError, match="nope"), adapters.routed(["a", "nope", None]):
        pass


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_is_drawn_depends_on_the_seed_alone() -> None:
    def drawn(dtype: torch.dtype, widths: tuple[int, int] = (6, 5)) -> ak.Adapters:
        torch.set_default_dtype(dtype)
        try:
            adapters = ak.Adapters(nn.Sequential(nn.Linear(*widths), nn.Linear(5, 4)).float())
            adapters.add("a", VeRA(rank=3, save_projection=False, targets="*"))
        finally:
            torch.set_default_dtype(torch.float32)
        return adapters

    one, other = drawn(torch.float32), drawn(torch.float64)
    shared = [next(iter(each.modules("a").values())).shared.A for each in (one, other)]
    assert torch.equal(*shared)
    checkpoint = one.checkpoint("a")
    wider = ak.Adapters(nn.Sequential(nn.Linear(9, 5), nn.Linear(5, 4)))
    with pytest.raises(errors.CheckpointError):
        wider.install("a", checkpoint, strict=False)
    assert not len(wider)


@pytest.mark.parametrize("options", [{"rank": 0}, {"dropout": 1.0}, {"projection_seed": -1}, {"d_initial": 0.0}])
def test_wrong_values(options: dict[str, float]) -> None:
    with pytest.raises(errors.ConfigError, match=next(iter(options))):
        VeRA(**options)  # type: ignore[arg-type]


def test_a_whole_number_is_a_start_value() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    adapters = ak.Adapters(model)
    adapters.add("it", VeRA("all", rank=2, d_initial=1))
    (module,) = adapters.modules("it").values()
    assert module.d.dtype == torch.float32
