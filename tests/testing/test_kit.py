"""The kit finds what is wrong: each broken type fails the check that is about its fault."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.backend import Backend
from adapterkit.backends.family import Group, Weight, resolve
from adapterkit.checkpoint import Checkpoint
from adapterkit.errors import CorruptFileError
from adapterkit.formats.native import NativeFormat
from adapterkit.testing import check_adapter, check_backend, check_format, families, models, toys
from adapterkit.testing.adapters import AdapterConformance
from adapterkit.testing.backends import BackendConformance, Sample
from adapterkit.testing.formats import FormatConformance
from adapterkit.testing.reports import run_checks


class Good(ak.AdditiveModule):
    def __init__(self, point: ak.InjectionPoint) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(point.out_features))

    def delta(self, x: Tensor) -> Tensor:
        return self.shift.expand(*x.shape[:-1], -1)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        shift = self.shift.to(weight.dtype)
        return weight, shift if bias is None else bias + shift


@dataclass(frozen=True)
class Shift(ak.AdapterConfig):
    kinds = frozenset({"weight"})
    targets: str = "attn.* mlp.up"
    amount: int = 1

    module = Good

    def accepts(self, point: ak.InjectionPoint) -> str | None:
        layout: Any = point.layout
        linear = layout.form == "linear" and layout.access == "call" and point.in_span is None
        return super().accepts(point) if linear else "only linear layers"

    def build(self, point: ak.InjectionPoint) -> ak.AdapterModule:
        return self.module(point)


def only(check: str, config: ak.AdapterConfig) -> Any:
    return getattr(type("Case", (AdapterConformance,), {"config": config})(), f"test_{check}")


def broken(module: type[ak.AdapterModule], **fields: Any) -> ak.AdapterConfig:
    cls = dataclass(frozen=True)(type("Broken", (Shift,), {"module": module, **fields}))
    return cls()


def test_a_right_type_passes() -> None:
    report = check_adapter(Shift())
    assert report, str(report)
    assert "0 failed" not in str(report)
    assert str(report).splitlines()[-1].startswith("Shift: ")
    assert report.to_dict()["ok"] is True


class EffectAtStart(Good):
    def delta(self, x: Tensor) -> Tensor:
        return super().delta(x) + 1


class NoEffect(Good):
    def delta(self, x: Tensor) -> Tensor:
        return super().delta(x) * 0


class IdleParameter(Good):
    def __init__(self, point: ak.InjectionPoint) -> None:
        super().__init__(point)
        self.idle = nn.Parameter(torch.zeros(2))


class WrongGradient(Good):
    def delta(self, x: Tensor) -> Tensor:
        y = super().delta(x)
        return y + y.detach().square()


class WrongMerge(Good):
    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight, bias


class MixesRows(Good):
    def forward(self, x: Tensor, base: Any) -> Tensor:
        y = base(x)
        return y + self.delta(x) + 0.1 * self.shift.sum() * y.mean(0, keepdim=True)


class NotASum(Good):
    def forward(self, x: Tensor, base: Any) -> Tensor:
        y = base(x)
        return y + y * self.delta(x)


class Random(Good):
    def delta(self, x: Tensor) -> Tensor:
        return super().delta(x) * torch.rand(())


class Upcasts(Good):
    def forward(self, x: Tensor, base: Any) -> Tensor:
        return base(x) + self.delta(x)


class ForgetsState(Good):
    def __init__(self, point: ak.InjectionPoint) -> None:
        super().__init__(point)
        self.scale = [1.0]

    def delta(self, x: Tensor) -> Tensor:
        self.scale[0] += 1.0
        return super().delta(x) * self.scale[0]


class Unpicklable(Good):
    def __init__(self, point: ak.InjectionPoint) -> None:
        super().__init__(point)
        self.function = lambda y: y


class GraphBreak(Good):
    def delta(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return super().delta(x)


class GlobalRandom(Good):
    def __init__(self, point: ak.InjectionPoint) -> None:
        super().__init__(point)
        self.shift.data.fill_(next(_COUNTER) * 1e-9)


_COUNTER = itertools.count()


FAULTS = [
    ("zero_effect", EffectAtStart, "a new adapter's output: they differ by"),
    ("effect", NoEffect, "changed the output by 0 only"),
    ("gradients_reach_every_parameter", IdleParameter, "idle has no gradient"),
    ("gradients_are_right", WrongGradient, "the gradient says"),
    ("merged_equals_unmerged", WrongMerge, "merged, torch.float64: they differ by"),
    ("routed_equals_one_by_one", MixesRows, "row 0, mine: they differ by"),
    ("additive_is_a_sum", NotASum, "half of it and half of a copy"),
    ("evaluation_is_deterministic", Random, "the second forward: they must be the same"),
    ("evaluation_is_deterministic", ForgetsState, "the second forward: they must be the same"),
    ("dtypes", Upcasts, "must have the same dtype"),
    ("copies", Unpicklable, "<lambda>"),
    ("compiled", GraphBreak, "graph_break"),
    ("seeds", GlobalRandom, "from the same seed: they must be the same"),
]


@pytest.mark.parametrize(("check", "module", "message"), FAULTS)
def test_each_fault_is_found(check: str, module: type[ak.AdapterModule], message: str) -> None:
    only(check, Shift())()
    with pytest.raises(Exception, match=message):
        only(check, broken(module))()


def test_faults_of_configs_are_found() -> None:
    @dataclass(frozen=True)
    class Loose(Shift):
        factor: Any = 1.0
        hidden: float = field(default=1.0, repr=False)

        def to_dict(self) -> dict[str, Any]:
            return {**super().to_dict(), "hidden": 2.0}

    with pytest.raises(AssertionError, match="came back instead of"):
        only("config_round_trip", Loose())()

    @dataclass(frozen=True)
    class Trusting(Shift):
        def __post_init__(self) -> None:
            pass

    with pytest.raises(AssertionError, match="targets=3 was accepted"):
        only("wrong_values_are_errors", Trusting())()


def test_a_report_shows_failures_and_errors() -> None:
    report = check_adapter(broken(EffectAtStart))
    assert not report
    assert {"merged_equals_unmerged", "zero_effect"} <= {result.name for result in report.failures}
    assert "failed  zero_effect" in str(report)
    report = check_adapter(broken(Unpicklable))
    assert "error" in {result.status for result in report.failures}
    with pytest.raises(ak.errors.ConfigError, match="call check_adapter with one"):
        check_adapter("fuse")
    with pytest.raises(ak.errors.UnknownNameError, match="Did you mean 'lora'"):
        check_adapter("lorra")


# -- backends -------------------------------------------------------------------------------------------------------


class Missing(toys.ToyBackend):
    groups = toys.ToyBackend.groups[1:]


class Twice(toys.ToyBackend):
    def points(self, model: nn.Module, component: str) -> list[ak.InjectionPoint]:
        return super().points(model, component)[:3] * 2


class WrongShape(toys.ToyBackend):
    def points(self, model: nn.Module, component: str) -> list[ak.InjectionPoint]:
        points = super().points(model, component)
        return [dataclasses.replace(p, in_features=p.in_features + 4) if p.role == "mlp.up" else p for p in points]


class Unused(nn.Module):
    """Like the toy, with a layer that nobody calls."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


class UnusedBackend(Backend):
    component = "toy"

    def points(self, model: nn.Module, component: str) -> list[ak.InjectionPoint]:
        return resolve(model, (Group("", "", (Weight("mlp.up", "used"), Weight("mlp.down", "unused"))),), component)


TOY = {"toy": Sample(models.EXAMPLES[0].make, (toys.ids(),))}


@pytest.mark.parametrize(
    ("check", "backend", "samples", "message"),
    [
        ("every_layer_is_mapped", Missing, TOY, "no point at embed, head"),
        ("points_exist", Twice, TOY, "is there twice"),
        ("shapes_are_right", WrongShape, TOY, r"mlp.up@toy.0 says \(16, 12\), the weight is \(16, 8\)"),
        ("it_is_found", Missing, TOY, "ToyModel is mapped by toy"),
        ("every_point_has_an_effect", UnusedBackend, {"u": Sample(Unused, (torch.ones(2, 4),))}, "mlp.down@toy"),
    ],
)
def test_faults_of_backends_are_found(check: str, backend: type, samples: Any, message: str) -> None:
    families.register()
    case = type("Case", (BackendConformance,), {"backend": backend, "samples": samples, "_name": lambda s, m: None})()
    if backend is UnusedBackend:
        manager = ak.get_plugin_manager()
        plugin = type("Plugin", (), {"adapterkit_register_backends": staticmethod(ak.hookimpl(_unused))})()
        manager.register(plugin, name="unused")
    try:
        with pytest.raises(AssertionError, match=message):
            getattr(case, f"test_{check}")()
    finally:
        if backend is UnusedBackend:
            ak.get_plugin_manager().unregister(name="unused")


def _unused() -> list[Any]:
    root = __name__.partition(".")[0]
    return [ak.specs.BackendSpec("unused", f"{__name__}:UnusedBackend", models=(f"{root}:Unused",), summary="x")]


# -- formats --------------------------------------------------------------------------------------------------------


class Loses(NativeFormat):
    def read(self, path: Any, points: Any) -> Checkpoint:
        checkpoint = super().read(path, points)
        for own in checkpoint.tensors.values():
            for tensor in own.values():
                tensor.mul_(0.99)
        return checkpoint


class ByName(NativeFormat):
    def recognises(self, path: Any) -> bool:
        return path.suffix == ".safetensors"


class Crashes(NativeFormat):
    def read(self, path: Any, points: Any) -> Checkpoint:
        try:
            return super().read(path, points)
        except CorruptFileError as error:
            raise KeyError("header") from error


class Mutates(NativeFormat):
    def write(self, checkpoint: Checkpoint, path: Any, points: Any) -> None:
        super().write(checkpoint, path, points)
        next(iter(next(iter(checkpoint.tensors.values())).values())).zero_()


class Litters(NativeFormat):
    def write(self, checkpoint: Checkpoint, path: Any, points: Any) -> None:
        super().write(checkpoint, path, points)
        path.with_suffix(".tmp").touch()


@pytest.mark.parametrize(
    ("check", "format", "message"),
    [
        ("round_trip", Loses, "they must be the same bit for bit"),
        ("content_tells_the_format", ByName, "is not recognised|is taken for"),
        ("damaged_files_are_errors", Crashes, "gives KeyError|header"),
        ("the_caller_keeps_its_tensors", Mutates, "they must be the same bit for bit"),
        ("writing_is_atomic", Litters, "writing left more than its file"),
    ],
)
def test_faults_of_formats_are_found(check: str, format: type, message: str) -> None:
    case = type("Case", (FormatConformance,), {"format": format})()
    with pytest.raises((AssertionError, KeyError), match=message):
        getattr(case, f"test_{check}")()


def test_without_pytest() -> None:
    assert check_format(NativeFormat)
    assert check_backend(toys.ToyBackend, TOY)
    assert not run_checks("nothing", type("Case", (), {"test_it": lambda self: 1 / 0})())
