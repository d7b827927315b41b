"""plugins/HOOKS.md against the code: everything public is in it, and nothing else."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from pathlib import Path

import pytest

from adapterkit import adapter, backend, checkpoint, hookspecs, specs, testing
from adapterkit.adapters import lora
from adapterkit.contract import codec, layer, naming, view
from adapterkit.formats import source
from adapterkit.kernels import weights
from adapterkit.mapping import entries, family
from adapterkit.plugins import builtin
from adapterkit.testing.backends import BackendConformance
from adapterkit.testing.case import Case
from adapterkit.testing.formats import FormatConformance
from adapterkit.training import events, optimizer, order, run, schedule, task
from adapterkit.training.diffusion import recipe
from adapterkit.training.diffusion.objectives import objective

points = importlib.import_module("adapterkit.points")  # `adapterkit.points` itself is the public function
TEXT = (Path(__file__).parents[1] / "plugins/HOOKS.md").read_text(encoding="utf-8")
CODE = {word for quoted in re.findall(r"`([^`]+)`", TEXT) for word in re.findall(r"[A-Za-z_][A-Za-z_0-9]*", quoted)}


_OTHERS = """
adapterkit package Class True False None lora type entrypoint plugin module attribute extra pip install check NAME help
_
plugins selectors errors kernels toys ToyAttention Adapters observing CheckpointError repr model part linear linear_t
conv embedding norm call read any hidden prompt layer language vision unet hookimpl Selector
sample loop mine load save with ContextError lycoris kohya comfy peft lora_down alpha
adapter_config prompt_embeddings r rank_pattern alpha_pattern peft_type
target_modules feedforward_modules __len__ __getitem__ ConfigError Trainable events record
figures exit_code grad_norm seconds eval lr params block positions Fuse input
"""
"""Words of the page that are no names of the contract: other libraries, values, places."""


def members(cls: type) -> set[str]:
    """What a class defines or annotates itself, in public."""
    own = {*vars(cls), *vars(cls).get("__annotations__", {})}
    return {name for name in own if not name.startswith("_")}


POINT = points.WeightPoint("attn.q", "q", "", 3, 2, points.WeightLayout("linear"))
EXPECTED = {
    "hooks": {name for name in vars(hookspecs) if name.startswith("adapterkit_")},
    "specs": {
        "AdapterSpec",
        "BackendSpec",
        "LayerSpec",
        "FormatSpec",
        "CodecSpec",
        "NamingSpec",
        "TaskSpec",
        "RecipeSpec",
        "OptimizerSpec",
        "ScheduleSpec",
        "CallbackSpec",
        "CommandSpec",
    },
    "module": members(adapter.AdapterModule) | members(adapter.AdditiveModule),
    "config": members(adapter.AdapterConfig),
    "base": {"norm_in", "norm_out"} | members(adapter.WeightBase) | members(adapter.Attention) | members(adapter.Base),
    "point": {f.name for f in dataclasses.fields(points.InjectionPoint)} | members(points.InjectionPoint),
    "points": {cls.__name__ for cls in points.LAYOUTS} | {"ParameterPoint", "parameters"},
    "layouts": {
        name
        for cls in (points.WeightLayout, points.OutputLayout, points.AttentionLayout, points.TokensLayout)
        for name in (cls.__name__, *members(cls))
    },
    "kinds": set(points.KINDS),
    "backend": members(backend.Backend) | {"Backend", "Lengthening"},
    "handler": members(layer.LayerHandler) | {"LayerHandler"},
    "reach": {f.name for f in dataclasses.fields(backend.Reach)},
    "seam": members(backend.AttentionSeam) | members(backend.Extension) | {"AttentionSeam", "extension_of"},
    "entries": {cls.__name__ for cls in entries.Entry.__args__} | {"Group", "resolve"},
    "format": {
        name
        for cls in (checkpoint.Format, checkpoint.Checkpoint, checkpoint.Part)
        for name in (cls.__name__, *members(cls))
    },
    "codec": {
        name
        for cls in (
            codec.Codec,
            codec.Place,
            codec.Said,
            codec.Context,
            naming.Naming,
            naming.Piece,
            view.ComponentView,
        )
        for name in (cls.__name__, *members(cls))
    }
    | {"ModelView", "model", *members(view.ModelView)},
    "source": {"Source", "single"} | members(source.Source),
    "options": {
        name
        for cls in (checkpoint.ReadOptions, checkpoint.WriteOptions, checkpoint.ReadReport, checkpoint.WriteReport)
        for name in (cls.__name__, *members(cls))
    },
    "task": members(task.Task) | {*task.__all__} | {"config", "options", "load_run", "train"},
    "method": {"OptimizerConfig", "ScheduleConfig"}
    | (members(optimizer.OptimizerConfig) | members(schedule.ScheduleConfig)) - {"model_config"},
    "callback": {"Callback", "Training"}
    | members(events.Callback)
    | members(events.Training)
    | {f.name for f in dataclasses.fields(events.Training)},
    "record": members(task.DataRecord),
    "setting": {f.name for f in dataclasses.fields(task.Setting)} | members(task.Setting) | members(task.Draw),
    "recipe": members(recipe.Recipe) | members(objective.Objective) | {"Recipe", "Objective"},
    "lora": {name for name, _ in lora.LoRA(rank=1).build(POINT).named_parameters()} | {"ranks", "alphas"},
    "kit": {*testing.__all__} - {"CheckReport", "CheckResult"},
    "cases": {
        name
        for cls in (Case, BackendConformance, FormatConformance)
        for name in members(cls)
        if not name.startswith("test_") and name not in ("each", "subjects")
    },
}


@pytest.mark.parametrize("what", EXPECTED)
def test_everything_public_is_told(what: str) -> None:
    assert sorted(EXPECTED[what] - CODE) == []


def test_spec_fields_are_those_that_are_told() -> None:
    for name in EXPECTED["specs"]:
        [arguments] = re.findall(rf"`{name}\(([^)]*)\)`", TEXT) or [None]
        fields = [f.name for f in dataclasses.fields(getattr(specs, name)) if f.name != "origin"]
        assert arguments is not None, name
        assert set(arguments.replace(" ", "").split(",")) == set(fields)


def test_nothing_is_told_that_is_not_there() -> None:
    known = {name for names in EXPECTED.values() for name in names}
    modules = (
        adapter,
        backend,
        builtin,
        checkpoint,
        codec,
        layer,
        naming,
        view,
        entries,
        family,
        points,
        specs,
        testing,
        weights,
    )
    modules += (order, run, task, source, recipe, objective)
    known |= {name for module in modules for name in vars(module)} | {*task.RunConfig.model_fields}
    known |= {name for module in modules for name in module.__name__.split(".")}
    everything = [value for module in modules for value in vars(module).values()]
    signatures = [value for value in everything if inspect.isfunction(value) or inspect.isclass(value)]
    signatures = [value for value in signatures if value.__module__.startswith("adapterkit")]
    for value in signatures:
        methods = [m for m in vars(value).values() if inspect.isfunction(m)] if inspect.isclass(value) else [value]
        known |= {name for method in methods for name in inspect.signature(method).parameters}
        if dataclasses.is_dataclass(value):
            known |= {f.name for f in dataclasses.fields(value)}
    words = set(re.findall(r"\w+", _OTHERS))
    strange = {word for word in CODE if word not in known | words and not word.isdigit()}
    assert strange == set()
