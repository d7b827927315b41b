"""`adapterkit plugins check`, as a user calls it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.cli.main import main
from adapterkit.specs import AdapterSpec
from tests.zoo import Install, installer


class Wrong(ak.AdditiveModule):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.ones(features))

    def delta(self, x: Tensor) -> Tensor:
        return self.shift.expand(*x.shape[:-1], -1).to(x.dtype)


@dataclass(frozen=True)
class WrongConfig(ak.AdapterConfig):
    kinds = frozenset({"output"})
    targets: str = "mlp"

    def build(self, point: ak.InjectionPoint) -> Wrong:
        return Wrong(point.out_features)


@pytest.fixture
def wrong() -> Iterator[None]:
    @ak.hookimpl
    def adapterkit_register_adapters() -> list[AdapterSpec]:
        return [AdapterSpec("wrong", f"{__name__}:WrongConfig", kinds={"output"}, summary="has an effect at once")]

    plugin = type("Plugin", (), {"adapterkit_register_adapters": staticmethod(adapterkit_register_adapters)})()
    ak.get_plugin_manager().register(plugin, name="wrong", distribution="adapterkit-wrong")
    yield
    ak.get_plugin_manager().unregister(name="wrong")


def check(*args: str) -> Result:
    return CliRunner().invoke(main, ["plugins", "check", *args])


def test_a_format_and_a_backend() -> None:
    result = check("native")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1].startswith("NativeFormat: 13 passed")
    assert "its own tests give it models" in check("unet").stdout


def test_a_failing_check_of_what_a_distribution_provides_is_exit_code_1(wrong: None) -> None:
    result = check("adapterkit-wrong", "--json")
    assert result.exit_code == 1
    [report] = json.loads(result.stdout)
    assert report["subject"] == "wrong"
    failed = {one["name"]: one["detail"] for one in report["checks"] if one["status"] == "failed"}
    assert report["ok"] is False
    assert "a new adapter's output" in failed["zero_effect"]
    assert all(one["equation"] for one in report["checks"])


def test_unknown_and_broken_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = check("lorra")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "unknown adapter type, format, backend or plug-in 'lorra'. Did you mean 'lora'" in result.stderr
    install: Install = installer(tmp_path, monkeypatch)
    monkeypatch.setattr("adapterkit.cli.plugins.check.get_plugin_manager", ak.get_plugin_manager.__wrapped__)
    install("bad", "raise RuntimeError('boom')")
    result = check("adapterkit-bad")
    assert result.exit_code == 1
    assert "RuntimeError: boom" in result.stderr


def test_a_type_that_needs_arguments_says_so() -> None:
    result = check("fuse")
    assert result.exit_code == 1
    assert "call check_adapter with one" in result.stdout
