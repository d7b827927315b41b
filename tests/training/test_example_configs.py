from __future__ import annotations

from pathlib import Path

import pytest

from adapterkit.plugins import builtin
from adapterkit.training.run import load_run

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"


@pytest.mark.parametrize("name", sorted(path.name for path in CONFIGS.glob("*.yaml")))
def test_the_configs_of_the_examples_are_valid(name: str):
    run = load_run(CONFIGS / name)
    assert run.config.steps > 0


def test_there_are_configs_for_all_tasks():
    tasks = {load_run(path).config.task for path in CONFIGS.glob("*.yaml")}
    assert tasks == {spec.name for spec in builtin.adapterkit_register_tasks()}
