"""What was meant by a key that a run does not have."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapterkit.adapters.lora import LoRA
from adapterkit.errors import ConfigError
from adapterkit.training.config import RunConfig, Section
from adapterkit.training.hints import hint, paths_of
from adapterkit.training.run import load_run


class Concept(Section):
    folder: str


class Options(Section):
    resolution: int = 1
    prompts: list[str] = []
    concepts: list[Concept] = []


KNOWN = [*paths_of(RunConfig), *paths_of(LoRA, "adapter."), *paths_of(Options, "options.")]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("lr", "learning_rate"),
        ("LR", "learning_rate"),
        ("rank", "adapter.rank"),
        ("network-dim", "adapter.rank"),
        ("options.rank", "adapter.rank"),
        ("resolution", "options.resolution"),
        ("image_size", "options.resolution"),
        ("resolutoin", "options.resolution"),
        ("adapter.learning_rate", "learning_rate"),
        ("adapter.lora_alpha", "adapter.alpha"),
        ("max_train_steps", "steps"),
        ("folder", "options.concepts.folder"),
    ],
)
def test_what_people_type_leads_to_the_key(typed: str, meant: str):
    assert f"'{meant}'" in hint(typed, KNOWN)


def test_a_key_of_the_run_is_meant_before_that_of_an_entry_in_a_list():
    assert hint("options.learning_rate", KNOWN) == " Did you mean 'learning_rate'?"


def test_a_slip_is_looked_for_in_its_own_section_first():
    assert hint("adapter.alfa", KNOWN) == " Did you mean 'alpha' or 'alphas'?"


def test_a_word_of_other_tools_whose_key_is_not_there_is_no_hint():
    assert "guidance_scale" not in hint("cfg_scale", KNOWN)


def test_nonsense_has_no_hint():
    assert hint("zzzzqqq", KNOWN) == ""


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("lr=1e-3", "learning_rate"),
        ("rank=4", "adapter.rank"),
        ("resolution=512", "options.resolution"),
        ("options.lora_rank=4", "adapter.rank"),
        ("adapter.learning_rate=1e-3", "learning_rate"),
    ],
)
def test_a_run_with_it_says_what_was_meant(override: str, meant: str):
    config = Path(__file__).parents[2] / "examples" / "configs" / "digits-style.yaml"
    with pytest.raises(ConfigError, match=f"unknown key '.*Did you mean '{meant}'"):
        load_run(config, [override])
