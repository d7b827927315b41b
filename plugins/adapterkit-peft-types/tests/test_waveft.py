"""WaveFT: conformance, wavelets, and PEFT's numbers from the same coefficients."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapterkit_peft_types import wavelets
from adapterkit_peft_types.waveft import WaveFT
from torch import nn

import adapterkit as ak
from adapterkit import errors
from adapterkit.testing import AdapterConformance


@pytest.mark.slow
class TestConformance(AdapterConformance):
    config = WaveFT(coefficients=20, wavelet="db2", scaling=5.0)


@pytest.mark.slow
class TestEntries(AdapterConformance):
    config = WaveFT(coefficients=20, transform=False, scaling=5.0)


class Odd(nn.Module):
    """A weight of odd sides, and one in another order of memory."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        torch.manual_seed(0)
        self.first, self.second = nn.Linear(12, 15), Conv1D(7, 15)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).relu())


OPTIONS: list[dict[str, Any]] = [
    {"wavelet": name} for name in ("db1", "db4", "db10", "sym4", "sym7", "sym10", "coif1", "coif2", "coif3")
]


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("options", [*OPTIONS, {"transform": False, "location_seed": 3}])
def test_it_is_that_of_peft(same_as_peft: Callable[..., None], options: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")

    def copied(module: ak.AdapterModule, layer: nn.Module) -> None:
        module.values.data.copy_(layer.waveft_spectrum["default"].data)  # type: ignore[union-attr,operator,index]

    theirs = peft.WaveFTConfig(
        n_frequency=30,
        scaling=7.0,
        wavelet_family=options.get("wavelet", "db1"),
        use_idwt=options.get("transform", True),
        random_loc_seed=options.get("location_seed", 777),
        target_modules=["first", "second"],
    )
    same_as_peft(WaveFT(coefficients=30, scaling=7.0, targets="*", **options), theirs, copied, Odd())


@pytest.mark.parametrize("name", [name for name in wavelets.NAMES if name != "coif4"])
def test_wavelets_are_orthonormal(name: str) -> None:
    smooth, details = (torch.tensor(each, dtype=torch.float64) for each in wavelets.synthesis(name))
    length = len(smooth)
    assert smooth.sum().item() == pytest.approx(math.sqrt(2))
    assert details.sum().item() == pytest.approx(0, abs=1e-9)
    for shift in range(0, length, 2):
        for one, other, expected in (
            (smooth, smooth, shift == 0),
            (smooth, details, 0),
            (details, details, shift == 0),
        ):
            assert one[shift:].dot(other[: length - shift]).item() == pytest.approx(float(expected), abs=1e-9)


def test_a_whole_spectrum_keeps_its_norm() -> None:
    """The transform of Haar is orthogonal; a weight with fewer entries than coefficients has as many as entries."""
    adapters = ak.Adapters(nn.Sequential(nn.Conv2d(2, 6, 3)).double())
    adapters.add("a", WaveFT(scaling=2.0, targets="*"))
    [module] = adapters.modules("a").values()
    values = module.get_parameter("values")
    assert values.numel() == 6 * 18
    values.data.normal_()
    assert module.delta_weight().norm().item() == pytest.approx(2 * values.norm().item())  # type: ignore[operator]


@pytest.mark.parametrize("options", [{"coefficients": 0}, {"scaling": 0.0}, {"wavelet": "db11"}, {"location_seed": -1}])
def test_wrong_values(options: dict[str, Any]) -> None:
    with pytest.raises(errors.ConfigError, match=next(iter(options))):
        WaveFT(**options)


def test_other_tools_get_the_nearest_lora_with_a_number_of_coefficients_for_each_point(tmp_path: Path) -> None:
    """What all points share is in no file, and is drawn for what each point needs."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).eval()
    adapters = ak.Adapters(model)
    keys = [point.id for point in adapters.points()]
    settings = {keys[0]: {"coefficients": 4}, keys[1]: {"coefficients": 9}}
    adapters.add("a", WaveFT(coefficients=4, settings=settings))
    for parameter in adapters.parameters("a"):
        parameter.data.normal_()
    x = torch.randn(3, 8)
    adapters.activate("a")
    with torch.no_grad():
        expected = model(x)
    with pytest.warns(UserWarning, match="is an approximation"):
        path = adapters.save("a", tmp_path / "a.safetensors", format="diffusers", approximate=True)
    adapters.detach()
    adapters.load(path, "b")
    adapters.activate("b")
    assert (model(x) - expected).abs().max() <= 1e-5 * expected.abs().max()
