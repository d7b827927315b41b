"""Each check of a backend finds a backend that is broken in what the check is about."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.backend import AttentionSeam, Backend, Reach, extension_of
from adapterkit.mapping.family import Entry, Fused, Group, Output, Weight, equal_parts, resolve
from adapterkit.specs import BackendSpec
from adapterkit.testing import check_backend, families, models, toys
from adapterkit.testing.backends import BackendConformance, Sample

TOY = {"toy": Sample(models.EXAMPLES[0].make, (toys.ids(),))}
STEM, BLOCK = toys.ToyBackend.groups
Broken: type[Backend] = toys.ToyBackend
"""The backend under test, where its registered name leads."""


def with_entries(*entries: Entry, instead: str = "") -> type[Backend]:
    """The toy's backend with other entries in its blocks, in the place of those with a role."""
    kept = [entry for entry in BLOCK.entries if instead not in (getattr(entry, "role", None), *_roles(entry))]
    groups = (STEM, dataclasses.replace(BLOCK, entries=(*kept, *entries)))
    return type("Broken", (toys.ToyBackend,), {"groups": groups})


def _roles(entry: Entry) -> tuple[str, ...]:
    return entry.roles if isinstance(entry, Fused) else ()


def with_seam(seam: type[AttentionSeam]) -> type[Backend]:
    return type(
        "Broken", (toys.ToyBackend,), {"reach": lambda self, model, point: Reach(seam=seam()), "__module__": __name__}
    )


class Missing(toys.ToyBackend):
    groups = toys.ToyBackend.groups[1:]


class Twice(toys.ToyBackend):
    def points(self, model: nn.Module, component: str) -> list[ak.InjectionPoint]:
        return super().points(model, component)[:3] * 2


class PartWithoutLayers(toys.ToyBackend):
    def parts(self, model: nn.Module) -> dict[str, str]:
        return {"empty": next(path for path, one in model.named_modules() if isinstance(one, nn.LayerNorm))}


class WrongShape(toys.ToyBackend):
    def points(self, model: nn.Module, component: str) -> list[ak.InjectionPoint]:
        points = super().points(model, component)
        return [dataclasses.replace(p, in_features=p.in_features + 4) if p.role == "mlp.up" else p for p in points]


class WrongScale(toys.ToyBackend):
    def points(self, model: nn.Module, component: str) -> list[ak.InjectionPoint]:
        first, *others = super().points(model, component)
        layout: Any = first.layout
        return [dataclasses.replace(first, layout=dataclasses.replace(layout, scale=2.0)), *others]


class ReadsValues(toys.ToyBackend):
    def points(self, model: nn.Module, component: str) -> list[ak.InjectionPoint]:
        points = super().points(model, component)
        return points[:3] if next(model.parameters()).is_meta else points


class LeavesTraces(AttentionSeam):
    def install(self, module: nn.Module) -> object:
        module.__dict__["trace"] = True
        return None


class KeepsFunctions(AttentionSeam):
    def install(self, module: nn.Module) -> object:
        return lambda: None


def _unmasked(module: Any, x: Tensor) -> tuple[Tensor, None]:
    b, n, d = x.shape
    q, k, v = module.qkv(x).view(b, n, 3, module.heads, d // module.heads).permute(2, 0, 3, 1, 4)
    k, v, _ = extension_of(module).extend(k, v, None, queries=n, causal=True)  # type: ignore[union-attr]
    return module.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d)), None


class Unmasked(AttentionSeam):
    forward = staticmethod(_unmasked)


class Unused(nn.Module):
    """A layer that nobody calls beside one that is used."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


class UnusedBackend(Backend):
    component = "toy"

    def points(self, model: nn.Module, component: str) -> list[ak.InjectionPoint]:
        return resolve(model, (Group("", "", (Weight("mlp.up", "used"), Weight("mlp.down", "unused"))),), component)


def _two_of_three(block: nn.Module, rows: int) -> Any:
    return equal_parts(3, rows)[:2]


def _thirds(block: nn.Module, rows: int) -> Any:
    return equal_parts(3, rows)


UNUSED = {"unused": Sample(Unused, (torch.ones(2, 4),))}
FAULTS: list[tuple[str, type[Backend], Any, str]] = [
    ("every_layer_is_mapped", Missing, TOY, "no point at embed, head"),
    ("points_exist", Twice, TOY, "is there twice"),
    ("parts_are_models_of_their_own", PartWithoutLayers, TOY, "has no layer; leave it out of parts"),
    ("shapes_are_right", WrongShape, TOY, r"mlp.up@toy.0 says \(16, 12\), the weight is \(16, 8\)"),
    (
        "spans_share_out_their_module",
        with_entries(Fused(("attn.q", "attn.k"), "attn.qkv", _two_of_three), instead="attn.q"),
        TOY,
        "no span has 8 of the 24 rows of blocks.0.attn.qkv.weight, such as 16",
    ),
    ("roles_are_words", with_entries(Weight("atn.o", "attn.proj"), instead="attn.o"), TOY, "did you mean 'attn'"),
    ("roles_are_words", with_entries(Weight("attn. o", "attn.proj"), instead="attn.o"), TOY, "lower-case words"),
    ("roles_are_words", with_entries(Weight("", "attn.proj"), instead="attn.o"), TOY, "lower-case words"),
    (
        "every_entry_is_found",
        with_entries(Output("mlp", "mlp", "nrom2"), instead="mlp"),
        TOY,
        "nrom2.* is in none of the samples",
    ),
    (
        "every_entry_is_found",
        with_entries(Output("mlp", "mlp", "norm2", norm_in="nrom2"), instead="mlp"),
        TOY,
        "there is nothing at norm_in 'nrom2'",
    ),
    ("mapping_needs_no_values", ReadsValues, TOY, "other points on the meta device"),
    ("it_is_found", Missing, TOY, "ToyModel is mapped by toy"),
    ("attaching_and_detaching_is_exact", with_seam(LeavesTraces), TOY, "detaching left a trace"),
    ("the_map_is_true", UnusedBackend, UNUSED, "mlp.down@toy: no call runs this module"),
    ("the_map_is_true", WrongScale, TOY, "embed.tokens@toy: merged, not what it is unmerged"),
    (
        "the_map_is_true",
        with_entries(Output("mlp", "mlp", "up", norm_in="norm2"), instead="mlp"),
        TOY,
        r"mlp@toy.0: its output .* is nowhere added to its x",
    ),
    (
        "the_map_is_true",
        with_entries(Output("mlp", "up", "norm2", norm_in="norm2"), instead="mlp"),
        TOY,
        r"mlp@toy.0: RuntimeError: shape .* is invalid",
    ),
    (
        "the_map_is_true",
        with_entries(Output("mlp", "mlp", "norm1"), instead="mlp"),
        TOY,
        "mlp@toy.0 computes with the output of attn@toy.0, and its x is without it",
    ),
    (
        "the_map_is_true",
        with_entries(Output("mlp", "mlp", "norm2", norm_in="norm1"), instead="mlp"),
        TOY,
        "what enters norm_in, and x: they differ by",
    ),
    (
        "the_map_is_true",
        with_entries(Fused(("attn.k", "attn.q", "attn.v"), "attn.qkv", _thirds), instead="attn.q"),
        TOY,
        "attn.q@toy.0: its output is the keys of the attention",
    ),
    ("the_map_is_true", with_seam(Unmasked), TOY, r"attn.kv@toy.0: not softmax\(q \[P; k\]\)"),
    ("copies", with_seam(KeepsFunctions), TOY, "lambda"),
]


@pytest.fixture(scope="module", autouse=True)
def _registered() -> Iterator[None]:
    """Whatever is `Broken` now, under a name."""

    @ak.hookimpl
    def adapterkit_register_backends() -> list[BackendSpec]:
        return [BackendSpec("kit_broken", f"{__name__}:Broken", models=("nowhere:Model",), summary="broken")]

    families.register()
    plugin = type("Plugin", (), {"adapterkit_register_backends": staticmethod(adapterkit_register_backends)})()
    ak.get_plugin_manager().register(plugin, name="kit_broken")
    yield
    ak.get_plugin_manager().unregister(name="kit_broken")


def only(check: str, backend: type[Backend], samples: Any) -> Callable[[], None]:
    """One check on a backend."""
    return getattr(type("Case", (BackendConformance,), {"backend": backend, "samples": samples})(), f"test_{check}")


@pytest.mark.parametrize(("check", "backend", "samples", "message"), FAULTS)
def test_each_fault_is_found(
    check: str, backend: type[Backend], samples: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "Broken", backend)
    with pytest.raises(Exception, match=message):
        only(check, backend, samples)()


def test_every_check_has_a_fault() -> None:
    checks = {name.removeprefix("test_") for name in dir(BackendConformance) if name.startswith("test_")}
    assert {check for check, *_ in FAULTS} == checks


def test_a_right_backend_passes() -> None:
    report = check_backend(toys.ToyBackend, TOY)
    assert report, str(report)
    assert not [result for result in report.results if result.status == "skipped"]


def test_points_without_an_effect_can_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "Broken", UnusedBackend)
    report = check_backend(UnusedBackend, UNUSED, idle=frozenset({"mlp.down@toy"}))
    assert [result.name for result in report.failures] == ["it_is_found"], str(report)  # it is registered for none


def test_an_unregistered_backend_is_one_failure() -> None:
    report = check_backend(UnusedBackend, UNUSED)
    [failure] = report.failures
    assert failure.name == "it_is_found"
    assert "UnusedBackend is registered under no name: return a BackendSpec" in failure.detail
    reasons = {result.detail for result in report.results if result.status == "skipped"}
    assert "the backend is not registered; see it_is_found" in reasons
