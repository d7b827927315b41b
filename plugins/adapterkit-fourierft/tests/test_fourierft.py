"""FourierFT: conformance, its equation, and PEFT's numbers from the same coefficients."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from adapterkit_fourierft.fourierft import FourierFT
from torch import nn

import adapterkit as ak
from adapterkit import errors
from adapterkit.testing import AdapterConformance


class TestConformance(AdapterConformance):
    config = FourierFT(coefficients=20, scaling=20.0)


def test_it_is_a_sum_of_cosines() -> None:
    model = nn.Sequential(nn.Linear(6, 4)).double()
    adapters = ak.Adapters(model)
    adapters.add("a", FourierFT(coefficients=5, scaling=3.0, targets="*"))
    [module] = adapters.modules("a").values()
    module.spectrum.data.normal_()  # type: ignore[union-attr,operator]
    rows, columns = torch.arange(4.0).double()[:, None], torch.arange(6.0).double()
    expected = torch.zeros(4, 6, dtype=torch.float64)
    spectrum, places = (module.get_parameter("spectrum"), module.places)
    for c, place in zip(spectrum.detach(), places.tolist(), strict=True):
        u, v = divmod(place, 6)
        expected += c * torch.cos(2 * math.pi * (u * rows / 4 + v * columns / 6)) / 24
    assert torch.allclose(module.delta_weight(), 3 * expected, rtol=1e-9, atol=1e-9)  # type: ignore[operator]


def test_it_is_that_of_peft() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 10)).eval()
    config = peft.FourierFTConfig(n_frequency=30, scaling=40.0, target_modules=["0", "2"], random_loc_seed=777)
    x = torch.randn(3, 12)
    ours = nn.Sequential(*(type(m)(m.in_features, m.out_features) if isinstance(m, nn.Linear) else m for m in base))
    ours.load_state_dict(base.state_dict())
    theirs = peft.get_peft_model(base, config).eval()
    adapters = ak.Adapters(ours.eval())
    adapters.add("a", FourierFT(coefficients=30, scaling=40.0, targets="*"))
    for key, module in adapters.modules("a").items():
        layer = theirs.base_model.model[int(key[-1])]
        module.spectrum.data.copy_(layer.fourierft_spectrum["default"].data)  # type: ignore[union-attr,operator]
    expected = theirs(x)
    assert (ours(x) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_places_hold_no_more_than_themselves_and_half_precision_works() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    adapters = ak.Adapters(model)
    adapters.add("a", FourierFT(coefficients=5, targets="*"), dtype=torch.bfloat16)
    [module] = adapters.modules("a").values()
    assert module.shared.get_buffer(f"of_{64 * 64}").untyped_storage().nbytes() == 8 * 5  # type: ignore[operator,union-attr]
    model.half()
    assert model(torch.ones(2, 64).half()).dtype == torch.float16


@pytest.mark.parametrize("options", [{"coefficients": 0}, {"scaling": 0.0}, {"location_seed": -1}])
def test_wrong_values(options: dict[str, float]) -> None:
    with pytest.raises(errors.ConfigError, match=next(iter(options))):
        FourierFT(**options)  # type: ignore[arg-type]


def test_places_are_drawn_once_for_all_weights_of_a_size() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 6), nn.Linear(6, 6))
    keys = [point.id for point in ak.points(model)]
    adapters = ak.Adapters(model)
    adapters.add("a", FourierFT(settings={key: {"coefficients": 2 + i} for i, key in enumerate(keys)}))
    first, second, third = adapters.modules("a").values()
    assert first.shared is second.shared is third.shared
    assert {name: len(places) for name, places in first.shared.named_buffers()} == {"of_24": 3, "of_36": 4}
    assert torch.equal(first.places, second.places[:2])  # type: ignore[arg-type,index]
    assert len(third.places) == 4  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [0, 5])
def test_a_file_of_peft_tells_the_seed(tmp_path: Path, seed: int) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 10)).eval()
    config = peft.FourierFTConfig(n_frequency=30, scaling=40.0, target_modules=["0", "2"], random_loc_seed=seed)
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    x = torch.randn(3, 12)
    with torch.no_grad():
        expected = theirs(x)
    adapters = ak.Adapters(base)
    adapters.load(tmp_path / "theirs", "a")
    adapters.activate("a")
    assert (base(x) - expected).abs().max() <= 1e-5 * expected.abs().max()
    adapters.save("a", tmp_path / "ours", format="peft")
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["random_loc_seed"] == seed
