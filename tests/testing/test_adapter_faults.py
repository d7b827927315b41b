"""Each check of an adapter type finds a type that is broken in what the check is about."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import adapterkit as ak
from adapterkit.specs import AdapterSpec
from adapterkit.testing.adapters import AdapterConformance
from tests.testing import faulty, shift
from tests.testing.shift import Shift, broken
from tests.zoo import installer


def _choose_anything(config: Any, points: Sequence[ak.InjectionPoint], label: str) -> list[ak.InjectionPoint]:
    return [point for point in points if config.accepts(point) is None]


SIDED: dict[str, Any] = {"example_context": shift.side}
ATTENDING: dict[str, Any] = {"kinds": frozenset({"attention"}), "targets": "attn.kv"}


FAULTS: list[tuple[str, dict[str, Any], str]] = [
    ("zero_effect", {"module": faulty.EffectAtStart}, "a new adapter's output: they differ by"),
    ("effect", {"module": faulty.NoEffect}, "changed the output by 0 only"),
    ("gradients_reach_every_parameter", {"module": faulty.IdleParameter}, "idle has no gradient"),
    ("gradients_are_right", {"module": faulty.WrongGradient}, "the gradient says"),
    ("training_is_evaluation", {"module": faulty.OtherInTraining}, r"the output in train\(\): they differ by"),
    ("merged_equals_unmerged", {"module": faulty.WrongMerge}, "merged, torch.float64: they differ by"),
    (
        "unmerging_is_exact",
        {"module": faulty.ChangedByMerging},
        "after merging and unmerging: they must be the same",
    ),
    ("routed_equals_one_by_one", {"module": faulty.MixesRows}, "row 0, mine: they differ by"),
    (
        "routed_gradients_are_those_one_by_one",
        {"module": faulty.MixesGradients},
        "the gradients of a routed batch",
    ),
    ("two_are_routed_together", {"module": faulty.FirstComeFirstServed}, r"row \d, \w+: they differ by"),
    ("factors_are_the_update", {"module": faulty.WrongFactors}, "its factors and delta: they differ by"),
    ("additive_is_a_sum", {"module": faulty.NotASum}, r"its forward and base\(x\) \+ delta\(x\)"),
    ("an_average_with_itself_is_itself", {"module": faulty.ForgetsState}, r"Average\(a, a\): they differ by"),
    ("the_order_of_adding_does_not_matter", {"build": faulty.build_last}, "the output, added after another"),
    ("the_order_of_adding_does_not_matter", {"module": faulty.NumberedStart}, "shift, added after another"),
    ("evaluation_is_deterministic", {"module": faulty.Random}, "the second forward: they must be the same"),
    ("evaluation_is_deterministic", {"module": faulty.ForgetsState}, "the second forward: they must be the same"),
    (
        "attaching_and_detaching_is_exact",
        {"module": faulty.ChangesBase},
        "weight: they must be the same bit for bit",
    ),
    (
        "disabled_is_the_base",
        {"module": faulty.ChangesBase},
        "the disabled model's output: they must be the same",
    ),
    (
        "saved_equals_loaded",
        {"module": faulty.Unsaved},
        "the output of the loaded adapter: they must be the same",
    ),
    ("observed_is_the_base", {"module": faulty.ChangesInputs}, "the output that is observed: they must be the same"),
    ("the_same_trains_again", {"module": faulty.HeldOnMeta}, "shift requires grad otherwise after loading"),
    ("an_incomplete_file_is_refused", {"module": faulty.Lenient}, "a file without a tensor of .* was loaded"),
    ("config_round_trip", {"to_dict": lambda config: {"targets": "mlp.up"}}, "came back instead of"),
    ("wrong_values_are_errors", {"__post_init__": lambda config: None}, "targets=3 was accepted"),
    ("wrong_targets_are_errors", {"choose": _choose_anything}, "targets that match nothing were accepted"),
    ("copies", {"module": faulty.Unpicklable}, "<lambda>"),
    ("copies", {"module": faulty.NotCopied}, "after deepcopy the copy has .* tensors of the original"),
    ("seeds", {"module": faulty.NumberedStart}, "from the same seed: they must be the same"),
    ("repr", {"module": faulty.Hidden}, "does not show Hidden"),
    ("spec", {}, "the spec of broken has no summary"),
    ("dtypes", {"module": faulty.Upcasts}, "must have the same dtype"),
    ("half_precision_parameters", {"module": faulty.NoHalf}, "not implemented for 'BFloat16'"),
    ("half_precision_is_near", {"module": faulty.LosesDigits}, "bfloat16 against float64: they differ by"),
    ("autocast", {"module": faulty.NoAutocast}, "index_add"),
    ("meta", {"module": faulty.Allocates}, "a tensor was allocated"),
    ("built_on_meta_and_loaded", {"module": faulty.NoBuffer}, "meta"),
    ("moves_with_the_model", {"module": faulty.KeepsDtype}, "same dtype"),
    ("tied_weights_stay_tied", {"module": faulty.ChangesBase}, "embed beside the adapter: they must be the same"),
    ("shared_modules", {"module": faulty.EveryOtherCall}, "one of two calls"),
    ("compiled", {"module": faulty.GraphBreak}, "graph_break"),
    ("checkpointed", {"module": faulty.ForgetsState}, "a gradient with reentrant checkpointing: they differ by"),
    ("side_inputs_are_read", {"module": faulty.NeverReads, **SIDED}, "changed the output by 0 only"),
    ("side_inputs_are_read", {"module": faulty.KeepsTheFirst, **SIDED}, "changed the output by 0 only"),
    ("side_inputs_are_by_row", {"module": faulty.MixesSides, **SIDED}, "row 0: they differ by"),
    ("side_inputs_for_all_rows", {"module": faulty.WritesSides, **SIDED}, "single memory location"),
    (
        "side_inputs_of_a_recomputed_forward",
        {"module": faulty.MoreEachTime, **SIDED},
        "recomputed outside of the block: they differ by",
    ),
    ("routed_equals_one_by_one", {"module": faulty.AttendsToOtherRows, **ATTENDING}, "row 0, mine: they differ by"),
    ("effect", {"module": faulty.AttendsInOneShape, **ATTENDING}, r"AttendsInOneShape\.attend at attn\.kv"),
    ("threads", {"module": faulty.KeepsInput}, "KeepsInput.delta at .* gave|beside other threads"),
    ("threads", {"module": faulty.FailsInThreads}, "in a thread"),
]
ELSEWHERE = {"the_entry_module_is_light"}


@pytest.fixture(scope="module", autouse=True)
def _registered() -> Iterator[None]:
    """`Shift`, and whatever is `Broken` now, under names for files."""

    @ak.hookimpl
    def adapterkit_register_adapters() -> list[AdapterSpec]:
        return [
            AdapterSpec("kit_shift", f"{shift.__name__}:Shift", kinds={"weight"}, summary="shifts"),
            AdapterSpec("broken", f"{shift.__name__}:Broken", kinds={"weight"}),
        ]

    plugin = type("Plugin", (), {"adapterkit_register_adapters": staticmethod(adapterkit_register_adapters)})()
    ak.get_plugin_manager().register(plugin, name="kit_faults")
    yield
    ak.get_plugin_manager().unregister(name="kit_faults")


def only(check: str, config: ak.AdapterConfig) -> Callable[[], None]:
    """One check on a type."""
    return getattr(type("Case", (AdapterConformance,), {"config": config})(), f"test_{check}")


@pytest.mark.parametrize(("check", "members", "message"), FAULTS)
def test_each_fault_is_found(
    check: str, members: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = broken(**members)
    monkeypatch.setattr(sys.modules[shift.__name__], "Broken", type(config), raising=False)
    with pytest.raises(Exception, match=message):
        only(check, config)()


def test_every_check_has_a_fault() -> None:
    checks = {name.removeprefix("test_") for name in dir(AdapterConformance) if name.startswith("test_")}
    assert {check for check, _, _ in FAULTS} | ELSEWHERE == checks


@pytest.mark.parametrize("check", sorted({check for check, _, _ in FAULTS}))
def test_a_right_type_passes_each_of_them(check: str) -> None:
    only(check, Shift())()


def _right_types() -> Iterator[Any]:
    """Right types, and every check: what a fault of such a type is found by, and the rest with the slow tests."""
    for module, members in ((shift.Sided, SIDED), (shift.Attends, ATTENDING)):
        found = {check for check, faulty_members, _ in FAULTS if faulty_members.items() >= members.items()}
        for check in sorted({check for check, _, _ in FAULTS}):
            marks = [pytest.mark.slow] * (check not in found)
            yield pytest.param(check, {"module": module, **members}, marks=marks, id=f"{module.__name__}-{check}")


@pytest.mark.parametrize(("check", "members"), list(_right_types()))
def test_right_types_that_read_or_attend_pass_each_of_them(
    check: str, members: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = broken(**members, amount=1)
    monkeypatch.setattr(sys.modules[shift.__name__], "Broken", type(config), raising=False)
    if check not in ("spec", "wrong_values_are_errors", "merged_equals_unmerged"):
        only(check, config)()


HEAVY = f"""
import torch

@hookimpl
def adapterkit_register_adapters():
    return [AdapterSpec("heavy", "{__name__}:Heavy", kinds={{"weight"}}, summary="imports torch at once")]
"""


@dataclass(frozen=True)
class Heavy(Shift):
    pass


def test_a_heavy_entry_module_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = installer(tmp_path, monkeypatch)("heavy", HEAVY)
    manager = ak.get_plugin_manager.__wrapped__()
    monkeypatch.setattr(ak, "get_plugin_manager", lambda: manager)
    monkeypatch.setenv("PYTHONPATH", str(home))
    with pytest.raises(AssertionError, match="importing zoo_heavy: it imports torch"):
        only("the_entry_module_is_light", Heavy())()
