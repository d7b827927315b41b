"""`adapterkit tasks` and `adapters NAME`: every key that is checked is told, with what its class says of it."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, Literal

import pytest
from click.testing import CliRunner
from pydantic import Field

from adapterkit.adapter import AdapterConfig
from adapterkit.cli.keys import keys_of
from adapterkit.cli.main import main
from adapterkit.plugins import get_plugin_manager
from adapterkit.plugins.manager import class_of
from adapterkit.training.config import RunConfig, Section, Seed
from adapterkit.training.task import Task


class Inner(Section):
    """One of several.

    Attributes:
        folder: Where it is.
    """

    folder: str


class Outer(Section):
    """Keys of each kind.

    Attributes:
        size: In pixels,
            on two lines.
        way: How.
        many: Several.
        seeds: Numbers.
    """

    size: int | None = Field(None, gt=0)
    way: Literal["up", "down"] = "up"
    many: list[Inner] = Field([])
    seeds: list[Seed] = Field([1])


def test_types_limits_defaults_and_meanings_are_those_of_the_class():
    rows = {row["key"]: row for row in keys_of(Outer, "options.")}
    assert rows["options.size"] == {
        "key": "options.size", "type": "int | null, > 0", "default": "null", "meaning": "In pixels, on two lines.",
    }  # fmt: skip
    assert rows["options.way"]["type"] == "up | down"
    assert rows["options.many[].folder"] == {
        "key": "options.many[].folder", "type": "str", "default": "(required)", "meaning": "Where it is.",
    }  # fmt: skip
    assert rows["options.seeds"]["type"] == "list[int]"


@pytest.mark.parametrize("name", get_plugin_manager().tasks())
def test_every_key_of_every_task_has_a_meaning(name: str):
    options = class_of(get_plugin_manager().task(name), Task).Options
    rows = [*keys_of(RunConfig), *keys_of(options, "options.")]
    assert {f"options.{key}" for key in options.model_fields} <= {row["key"] for row in rows}
    assert not [row["key"] for row in rows if not row["meaning"]]


@pytest.mark.parametrize("name", get_plugin_manager().adapters())
def test_every_field_of_every_adapter_type_is_told(name: str):
    config = class_of(get_plugin_manager().adapter(name), AdapterConfig)
    rows = keys_of(config)
    assert [row["key"] for row in rows] == [field.name for field in dataclasses.fields(config) if field.init]
    assert not [row["key"] for row in rows if not row["meaning"]]


def invoke(*arguments: str) -> Any:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_task_by_name_lists_the_keys_of_a_run_file_and_its_own():
    rows = {row["key"]: row for row in json.loads(invoke("tasks", "image-classification", "--json"))}
    assert rows["steps"]["default"] == "1000"
    assert "options.train_head" in rows
    assert "causal-lm" in invoke("tasks")


def test_an_adapter_by_name_lists_its_fields_below_what_it_is():
    assert {row["key"] for row in json.loads(invoke("adapters", "lora", "--json"))[0]["fields"]} >= {"rank", "alpha"}
    assert "Rank of the update." in invoke("adapters", "lora")


def test_optimizers_and_schedules_are_listed_with_their_keys():
    rows = {row["name"]: row for row in json.loads(invoke("optimizers", "--json"))}
    assert (rows["adamw"]["key"], rows["cosine"]["key"]) == ("optimizer", "scheduler")
    manager = get_plugin_manager()
    assert rows.keys() == {*manager.optimizers(), *manager.schedules()}
    assert {row["key"] for row in json.loads(invoke("optimizers", "adamw", "--json"))} >= {"optimizer.betas"}
    assert {row["key"] for row in json.loads(invoke("optimizers", "cosine", "--json"))} >= {"scheduler.restarts"}


@pytest.mark.parametrize("name", [*get_plugin_manager().optimizers(), *get_plugin_manager().schedules()])
def test_every_key_of_an_optimizer_has_a_meaning(name: str):
    assert not [row["key"] for row in json.loads(invoke("optimizers", name, "--json")) if not row["meaning"]]


def test_an_optimizer_that_is_not_there_is_an_error():
    result = CliRunner().invoke(main, ["optimizers", "adamv"])
    assert result.exit_code == 1
    assert "Did you mean 'adamw'" in result.output
