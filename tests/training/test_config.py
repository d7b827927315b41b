from __future__ import annotations

import math
import os
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from adapterkit import hookimpl
from adapterkit.errors import ConfigError
from adapterkit.plugins import get_plugin_manager
from adapterkit.specs import TaskSpec
from adapterkit.training import yaml_values
from adapterkit.training.run import load_run
from tests.training import toy_task

BASE = """
task: toy-task
model: toy
data: toy
output: out
adapter: {type: lora, rank: 4}
"""


@pytest.fixture(autouse=True)
def _registered() -> None:
    toy_task.register()


def written(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def problems(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_run(path, overrides)
    assert str(path) in str(caught.value)
    return caught.value.problems


def test_precedence_is_default_file_override(tmp_path: Path):
    path = written(tmp_path, BASE + "steps: 20\nbatch_size: 3\n")
    run = load_run(path, ["batch_size=5", "adapter.rank=16", "options.scale=2.5"])
    assert (run.config.steps, run.config.batch_size, run.config.log_every) == (20, 5, 10)
    assert run.adapter.to_dict()["rank"] == 16
    assert run.options.scale == 2.5  # type: ignore[attr-defined]


def test_every_problem_is_reported_at_once_with_its_path_and_near_matches(tmp_path: Path):
    path = written(
        tmp_path,
        """
task: toy-tsk
model: 3
output: out
stepps: 3
learning_rate: -1
scheduler: cosin
batch_size: true
adapter: {type: lora, rnk: 4, rank: 0, targets: "attn.{q"}
""",
    )
    found = problems(path, "options", "a..b=1", "steps.x=1", "optionz.scale=2")
    text = "\n".join(found)
    for expected in (
        "unknown task 'toy-tsk'. Did you mean 'toy-task'",
        "model: input should be a valid string, not 3",
        "data: this key is required",
        "unknown key 'stepps'. Did you mean 'steps'",
        "learning_rate: input should be greater than 0, not -1",
        "scheduler: unknown schedule 'cosin'. Did you mean 'cosine'?",
        "batch_size: input should be a valid integer, not True",
        "unknown key 'adapter.rnk'. Did you mean 'rank'",
        "adapter.rank must",
        "the override 'options' is not of the form key=value",
        "the override 'a..b=1' is not of the form",
        "unknown key 'optionz'. Did you mean 'options'",
    ):
        assert expected in text, text


def test_a_tasks_own_keys_are_checked_with_their_path(tmp_path: Path):
    path = written(tmp_path, BASE + "options: {scale: 0, poisn: 1}\n")
    assert problems(path) == [
        "options.scale: input should be greater than 0, not 0",
        "unknown key 'options.poisn'. Did you mean 'poison'?",
    ]


def test_unknown_adapter_type_and_missing_type(tmp_path: Path):
    assert "unknown adapter 'lorra'. Did you mean 'lora'" in problems(written(tmp_path, BASE), "adapter.type=lorra")[0]
    assert "adapter.type: name an adapter type" in problems(written(tmp_path, BASE), "adapter={rank: 2}")[0]


def test_a_name_that_no_adapter_may_have(tmp_path: Path):
    assert problems(written(tmp_path, BASE), "adapter_name=../evil")[0].startswith("adapter_name: ")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [1", "expected ',' or ']'"),
        ("steps: 1\nsteps: 2\n", "the key 'steps' stands twice"),
        ("1: 2", "the key 1 is not text"),
        ("- a\n- b\n", "must hold keys and values"),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("\x00", "special characters are not allowed"),
        ("steps:\t1\n\tseed: 2", "found character '\\t' that cannot start any token"),
        ("seed: " + "9" * 5000, "is no int"),
        ("options: !!map x", "'x' is no map"),
        ("options: !!seq x", "expected a sequence node"),
        ("options: !!str [x]", "expected a scalar node"),
        ("steps: !!int abc", "'abc' is no int"),
        ("steps: !!bool abc", "'abc' is no bool"),
        ("steps: !!timestamp 2024-13-45", "could not determine a constructor"),
        ("options: !!binary aGVsbG8=", "could not determine a constructor"),
        ("options: " + "[" * 5000, "nested deeper than 32"),
        ("options: " + "[" * 40 + "]" * 40, "nested deeper than 32"),
        ("options: &a [*a]", "nested deeper than 32"),
        ("a: &a {<<: *a}", "nested deeper than 32"),
        ("--- a\n--- b", "expected a single document"),
        ("", "must hold keys and values"),
        ("a: *b", "undefined alias"),
        ("? [a, b]\n: 1", "the key ['a', 'b'] is not text"),
    ],
)
def test_files_that_are_no_run(tmp_path: Path, text: str, expected: str):
    assert expected in " ".join(problems(written(tmp_path, text)))


def laughing(start: str, each: str, last: str) -> str:
    """Nine lines of which each names the one before ten times."""
    lines = [start, *(f"x{i}: &x{i} {each % ', '.join([f'*x{i - 1}'] * 10)}" for i in range(1, 9))]
    return "\n".join([*lines, last])


@pytest.mark.parametrize(
    "text",
    [
        laughing("x0: &x0 [a, a]", "[%s]", "steps: *x8"),
        laughing("x0: &x0 {a: b}", "{<<: [%s]}", "options: {<<: *x8}"),
    ],
)
def test_aliases_of_aliases_are_refused_before_they_are_made(tmp_path: Path, text: str):
    began = time.process_time()
    assert "aliases make" in problems(written(tmp_path, text))[0]
    assert time.process_time() - began < 1


def test_anchors_and_merged_sections_are_read(tmp_path: Path):
    assert yaml_values.parse("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: *a") == {
        "a": {"x": 1, "y": 2},
        "b": {"x": 1, "y": 3},
        "c": {"x": 1, "y": 2},
    }


@pytest.mark.parametrize("value", ["0o17", "010", "1e5", "0x_", "1_0", "<<", "no", "~", "2024-01-02", "a\x1b[2J"])
def test_text_comes_back_as_text(value: str):
    assert yaml_values.parse(yaml_values.dump({"a": value})) == {"a": value}


def test_values_in_problems_are_short_and_steer_no_terminal(tmp_path: Path):
    found = problems(
        written(tmp_path, BASE + f'steps: "\\e[2J{"x" * 9000}"\nseed: {"9" * 4000}\n'), "batch_size=\x1b[2J"
    )
    assert all(len(problem) < 400 for problem in found)
    assert all(problem.isprintable() for problem in found)


@pytest.mark.parametrize("make", ["folder", "pipe", "dead link", "large", "utf-16", "NUL in its name"])
def test_places_that_hold_no_run(tmp_path: Path, make: str):
    path = tmp_path / ("a\0b" if make.startswith("NUL") else "run.yaml")
    if make == "folder":
        path.mkdir()
    elif make == "pipe":
        os.mkfifo(path)
    elif make == "dead link":
        path.symlink_to(tmp_path / "none")
    elif make == "large":
        path.write_text("# " + "x" * (1 << 20), encoding="utf-8")
    elif make == "utf-16":
        path.write_text(BASE, encoding="utf-16")
    with pytest.raises(ConfigError, match="run"):
        load_run(path)


@pytest.mark.parametrize("path", [3, b"run.yaml", ["run.yaml"], object(), "x" * 5000, ""])
def test_what_is_no_path_of_a_run_file(path: Any):
    with pytest.raises(ConfigError) as caught:
        load_run(path)
    assert len(str(caught.value)) < 3000


@pytest.mark.parametrize("overrides", ["steps=5", None, 3, [3], [b"steps=5"], [["steps=5"]]])
def test_what_is_no_list_of_overrides(overrides: Any):
    with pytest.raises(ConfigError, match="expected a list of overrides such as 'steps=500'"):
        load_run(None, overrides)


def test_a_run_file_may_be_a_link(tmp_path: Path):
    (tmp_path / "here").mkdir()
    (tmp_path / "here/run.yaml").symlink_to(written(tmp_path, BASE))
    assert load_run(tmp_path / "here/run.yaml").config.task == "toy-task"


def test_a_file_that_is_absent_or_binary(tmp_path: Path):
    assert "cannot read" in problems(tmp_path / "none.yaml")[0]
    (tmp_path / "run.yaml").write_bytes(b"\xff\xfe\x00")
    assert problems(tmp_path / "run.yaml")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"), ("off", "off"), ("true", True), ("False", False), ("1e-4", 1e-4), ("5E3", 5000.0),
        ("1", 1), ("1.5", 1.5), ("", None), ("~", None), ("[1, a]", [1, "a"]), ("1_000", 1000), (".inf", math.inf),
        ("010", 10), ("0x1F", 31), ("1:30", "1:30"), ("2024-01-02", "2024-01-02"),
        ("e-4", "e-4"), ("'1'", "1"), ("1e", "1e"), ("-2.5e+3", -2500.0), ("2026-01-01x", "2026-01-01x"),
    ],
)  # fmt: skip
def test_values_mean_what_they_say(text: str, value: Any):
    assert yaml_values.parse(text) == value
    assert type(yaml_values.parse(text)) is type(value)


@pytest.mark.parametrize("key", ["batch_size", "gradient_accumulation"])
def test_more_examples_than_a_step_could_list(tmp_path: Path, key: str):
    with pytest.raises(ConfigError, match=rf"{key}: input should be less than or equal to 1048576, not 10{{19}}"):
        load_run(written(tmp_path, BASE), [f"{key}={10**19}"])


def test_pyyamls_own_loader_is_left_alone():
    assert yaml.safe_load("no") is False
    assert yaml.safe_load("1e-4") == "1e-4"


def test_the_resolved_run_is_a_run_with_the_same_meaning(tmp_path: Path):
    run = load_run(written(tmp_path, BASE), ["adapter.ranks={mlp.*: 2}", "options.scale=3.0", "mixed_precision=no"])
    again = load_run(written(tmp_path, yaml_values.dump(run.resolved())))
    assert again.resolved() == run.resolved()
    assert again.adapter == run.adapter
    assert again.config.versions["torch"].startswith("2.")


def test_the_versions_of_plugins_are_recorded(tmp_path: Path):
    manager, plugin = get_plugin_manager(), ModuleType("zoo")
    plugin.adapterkit_register_tasks = hookimpl(  # type: ignore[attr-defined]
        lambda: [TaskSpec("zoo-task", "zoo:Task")], specname="adapterkit_register_tasks"
    )
    manager.register(plugin, name="zoo", distribution="adapterkit-zoo", version="3.1")
    try:
        versions = load_run(written(tmp_path, BASE)).resolved()["versions"]
    finally:
        manager.unregister(name="zoo")
    assert versions["adapterkit-zoo"] == "3.1"
    assert "" not in versions
