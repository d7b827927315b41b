"""PEFT's files of types that are in plug-ins of this repository: read with PEFT's outputs, and written as they were."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import adapterkit as ak
from adapterkit import errors
from adapterkit.plugins.manager import get_plugin_manager
from adapterkit.torchvision_ops import ensure_torchvision_ops
from tests.values import randomize

X = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))

pytestmark = pytest.mark.filterwarnings(
    "ignore:fan_in_fan_out",
    "ignore:.is_gradient_checkpointing",
    "ignore:Specified to not",
    "ignore:.*config.ia3_feedforward",
    "ignore:Failed to load the CUDA extension",
    "ignore:Setting boft_n_butterfly_factor",
    "ignore:Could not find a config file",
)


class Toy(nn.Module):
    """Linear layers with and without a bias, and convolutions of one and two axes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(12, 16), nn.Linear(16, 12, bias=False)
        self.conv, self.point = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 1)
        self.short, self.last = nn.Conv1d(4, 6, 3, padding=1), nn.Linear(6, 12)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.second(self.first(x).relu()).relu().unflatten(-1, (3, 2, 2))
        return self.last(self.short(self.point(self.conv(hidden)).flatten(-2)).mean(-1))


def close(ours: Tensor, theirs: Tensor) -> bool:
    return (ours - theirs).abs().max().item() <= 1e-5 * theirs.abs().max().item()


LINEAR, ALL = ["first", "second", "last"], ["first", "second", "conv", "point", "short"]
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("ia3", "IA3", {"target_modules": LINEAR, "feedforward_modules": ["second"]}),
    ("ia3", "IA3", {"target_modules": [*LINEAR, "conv"], "feedforward_modules": ["conv"]}),
    ("vera", "Vera", {"target_modules": LINEAR, "r": 5, "projection_prng_key": 3}),
    ("fourierft", "FourierFT", {"target_modules": LINEAR, "n_frequency": 20, "scaling": 90.0, "random_loc_seed": 5}),
    ("fourierft", "FourierFT", {"target_modules": LINEAR, "n_frequency": 20, "n_frequency_pattern": {"last": 7}}),
    ("loha", "LoHa", {"target_modules": ALL, "r": 3, "alpha": 5}),
    ("loha", "LoHa", {"target_modules": ALL, "r": 3, "rank_pattern": {"first": 2}, "use_effective_conv2d": True}),
    ("lokr", "LoKr", {"target_modules": ALL, "r": 1, "alpha": 3}),
    ("lokr", "LoKr", {"target_modules": ALL[:4], "r": 1, "decompose_both": True, "decompose_factor": 4}),
    ("lokr", "LoKr", {"target_modules": ALL[:4], "r": 1, "alpha": 2, "use_effective_conv2d": True}),
    ("lokr", "LoKr", {"target_modules": LINEAR, "r": 9, "alpha": 2, "alpha_pattern": {"last": 4}}),
    ("boft", "BOFT", {"target_modules": LINEAR, "boft_block_size": 2}),
    ("boft", "BOFT", {"target_modules": ["first", "point"], "boft_block_num": 3, "boft_block_size": 0}),
]


def saved_by_peft(folder: Path, name: str, options: dict[str, Any], base: nn.Module) -> Tensor:
    """Saves an adapter of PEFT that has moved, and gives its output."""
    ensure_torchvision_ops()
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(copy.deepcopy(base), getattr(peft, f"{name}Config")(**options)).eval()
    generator = torch.Generator().manual_seed(2)
    for key, parameter in model.named_parameters():
        if "default" in key:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    with torch.no_grad():
        return model(X)


@pytest.mark.parametrize(("type_", "name", "options"), CASES)
def test_files_go_there_and_back(tmp_path: Path, type_: str, name: str, options: dict[str, Any]) -> None:
    if type_ not in get_plugin_manager().adapters():
        pytest.skip("its plug-in is not installed")
    base = Toy().eval().requires_grad_(False)
    expected = saved_by_peft(tmp_path / "theirs", name, options, base)
    model = copy.deepcopy(base)
    adapters = ak.Adapters(model)
    adapters.load(tmp_path / "theirs", "a")
    adapters.activate("a")
    with torch.no_grad():
        assert not close(base(X), expected)
        assert close(model(X), expected)
        with adapters.merged():
            assert close(model(X), expected)
        adapters.save("a", tmp_path / "ours", format="peft")
        peft = pytest.importorskip("peft")
        assert close(peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()(X), expected)
    first, second = (load_file(tmp_path / where / "adapter_model.safetensors") for where in ("theirs", "ours"))
    assert first.keys() == second.keys()
    if type_ not in ("boft", "lokr"):  # halves and scales can be said in several ways
        assert all((first[key] - second[key]).abs().max() <= 1e-6 for key in first)


@pytest.mark.skipif("lokr" not in get_plugin_manager().adapters(), reason="its plug-in is not installed")
def test_peft_mixes_up_the_axes_of_a_whole_factor_of_conv1d(tmp_path: Path) -> None:
    base = Toy().eval().requires_grad_(False)
    options = {"target_modules": ["first", "short"], "r": 4, "alpha": 3}
    expected = saved_by_peft(tmp_path / "theirs", "LoKr", options, base)
    adapters = ak.Adapters(base)
    assert "whose axes PEFT mixes up" in str(adapters.load(tmp_path / "theirs", "a"))
    adapters.activate("a")
    with torch.no_grad():
        assert close(base(X), expected)
    with pytest.raises(errors.CheckpointError, match="full_diff"):
        adapters.save("a", tmp_path / "ours", format="peft")


OURS: list[tuple[str, dict[str, Any]]] = [
    ("ia3", {"targets": "linear", "scale_input": "linear"}),
    ("vera", {"targets": "linear", "rank": 4, "projection_seed": 9, "save_projection": False}),
    ("fourierft", {"targets": "linear", "coefficients": 11, "scaling": 30.0}),
    ("loha", {"targets": "linear conv", "rank": 2, "alpha": 3.0}),
    ("lokr", {"targets": "linear", "rank": 1, "alpha": 3.0, "factor": 4, "decompose_both": True}),
    ("boft", {"targets": "linear", "block": 2, "butterfly": 1, "side": "input", "rescale": True}),
]


@pytest.mark.parametrize(("type_", "options"), OURS)
def test_what_was_made_here_is_computed_by_peft(tmp_path: Path, type_: str, options: dict[str, Any]) -> None:
    manager = get_plugin_manager()
    if type_ not in manager.adapters():
        pytest.skip("its plug-in is not installed")
    base = Toy().eval().requires_grad_(False)
    model = copy.deepcopy(base)
    adapters = ak.Adapters(model)
    adapters.add("a", manager.adapters()[type_].load()(**options))
    randomize(adapters, "a")
    adapters.activate("a")
    adapters.save("a", tmp_path / "ours", format="peft")
    peft = pytest.importorskip("peft")
    with torch.no_grad():
        expected = model(X)
        assert not close(base(X), expected)
        assert close(peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()(X), expected)
    again = ak.Adapters(other := copy.deepcopy(base))
    again.load(tmp_path / "ours", "b")
    again.activate("b")
    with torch.no_grad():
        assert close(other(X), expected)
