"""`adapterkit plugins check` on what has no conformance suite, and on a distribution of which a part is broken."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import adapterkit as ak
from adapterkit.cli.main import main
from tests.zoo import Install, installer

OTHERS = """
import click

class Task: pass

@click.command()
def wave(): pass

@hookimpl
def adapterkit_register_tasks():
    return [TaskSpec("waving", "zoo_others:Task", summary="waves")]

@hookimpl
def adapterkit_register_commands():
    return [CommandSpec("wave", "zoo_others:wave", help="Wave.")]
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    found: Install = installer(tmp_path, monkeypatch)
    monkeypatch.setattr("adapterkit.cli.plugins.check.get_plugin_manager", ak.get_plugin_manager.__wrapped__)
    return found


def check(*args: str) -> Result:
    return CliRunner().invoke(main, ["plugins", "check", *args])


def test_what_has_no_conformance_suite_is_loaded_and_said_to_be_skipped(install: Install) -> None:
    install("others", OTHERS)
    result = check("adapterkit-others")
    assert result.exit_code == 0, result.output
    assert "passed  loads        zoo_others:Task was loaded" in result.stdout
    assert "skipped conformance  there is no conformance suite for tasks" in result.stdout
    assert "skipped conformance  there is no conformance suite for commands" in result.stdout
    assert check("waving").exit_code == 0
    assert check("wave").exit_code == 0


def test_a_target_that_is_not_there_fails(install: Install) -> None:
    install("others", OTHERS.replace("others:Task", "others:Tusk"))
    result = check("adapterkit-others")
    assert result.exit_code == 1
    assert "no attribute 'Tusk'" in result.stdout


def test_a_plugin_without_names_passes_and_a_broken_part_fails(install: Install) -> None:
    install("others", "@hookimpl\ndef adapterkit_resolve_backend(model):\n    return None\n")
    result = check("adapterkit-others")
    assert (result.exit_code, "it registers nothing to check" in result.stdout) == (0, True)
    entries = "[adapterkit]\nboth = zoo_both\nbroken = zoo_absent\n"
    install("both", OTHERS.replace("zoo_others", "zoo_both"), entry_points=entries)
    result = check("adapterkit-both")
    assert result.exit_code == 1
    assert "error   loads" in result.stdout
    assert "waving: " in result.stdout
