"""`adapterkit adapters | backends | plugins` and the group itself, as a user calls them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from adapterkit import __version__
from adapterkit.cli.main import main
from adapterkit.plugins import builtin, get_plugin_manager
from tests.zoo import GOOD, Install, installer

COMMAND = """
@hookimpl
def adapterkit_register_commands():
    return [CommandSpec("greet", "zoo_good:greet", help="Say hello."), CommandSpec("bad", "zoo_good:not_a_command"),
            CommandSpec("crash", "zoo_crash:greet", help="Never imported by --help.")]

import click
not_a_command = 3

@click.command
def greet():
    click.echo("hello")
"""

GATE = """
from dataclasses import dataclass

from adapterkit.adapter import AdapterConfig

@dataclass(frozen=True)
class Gate(AdapterConfig):
    sharpness: float = 1.0
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Installs fake distributions for one test, which gets a manager of its own."""
    monkeypatch.setattr("adapterkit.cli.main.get_plugin_manager", get_plugin_manager.__wrapped__)
    for name in ("adapters", "backends", "plugins"):
        monkeypatch.setattr(f"adapterkit.cli.{name}.get_plugin_manager", get_plugin_manager.__wrapped__)
    return installer(tmp_path, monkeypatch)


def run(*args: str) -> Result:
    return CliRunner().invoke(main, args)


def rows(*args: str) -> dict[str, dict[str, object]]:
    result = run(*args, "--json")
    assert result.exit_code == 0, result.output
    return {row["name"]: row for row in json.loads(result.stdout)}


def test_adapters_as_json_and_as_a_table(install: Install) -> None:
    install("good", GOOD, version="2.5")
    listed = rows("adapters")
    assert list(listed) == [*(spec.name for spec in builtin.adapterkit_register_adapters()), "gate"]
    assert listed["gate"] == {
        "name": "gate",
        "kinds": ["output"],
        "summary": "one gate per feature",
        "provider": "adapterkit-good 2.5",
        "target": "zoo_good:Gate",
    }
    table = run("adapters").stdout.splitlines()
    assert table[0].split() == ["name", "kinds", "summary", "provider"]
    assert table[-1].split() == ["gate", "output", "one", "gate", "per", "feature", "adapterkit-good", "2.5"]


def test_one_of_them_by_name(install: Install) -> None:
    install("good", GOOD + GATE)
    gate = rows("adapters", "good:gate")["gate"]
    assert [field["key"] for field in gate["fields"]] == ["targets", "settings", "sharpness"]  # type: ignore[index,union-attr]
    assert list(rows("backends", "unet")) == ["unet"]
    assert rows("backends")["unet"]["models"] == ["diffusers:UNet2DConditionModel"]
    assert "diffusers:UNet2DConditionModel" in run("backends").stdout


def test_plugins_names_every_plugin_and_what_became_of_it(install: Install) -> None:
    install("good", GOOD)
    install("bad", "raise RuntimeError('boom')", version="3.1")
    install("old", GOOD, requires=("adapterkit>=9",))
    install("clash", GOOD.replace('"gate"', '"lora"'))
    listed = rows("plugins")
    assert {name: row["status"] for name, row in listed.items()} == {
        "adapterkit": "active",
        "bad": "failed",
        "clash": "conflict",
        "good": "active",
        "old": "incompatible",
    }
    assert listed["bad"]["version"] == "3.1"
    assert listed["bad"]["error"] == "plug-in 'bad': RuntimeError: boom"
    assert listed["good"]["provides"] == ["adapter gate"]
    result = run("plugins", "--verbose")
    assert result.exit_code == 0
    assert "raise RuntimeError('boom')" in result.stderr  # the traceback
    assert "adapters gate" in result.stdout
    assert "RuntimeError: boom" in result.stdout


def test_a_plugin_that_prints_leaves_the_json_whole(install: Install) -> None:
    install("good", "print('hello from import')\n" + GOOD)
    result = run("plugins", "--json")
    assert [row["status"] for row in json.loads(result.stdout)] == ["active", "active"]
    assert result.stderr == "hello from import\n"


def test_a_wrong_name_is_one_line_and_exit_code_1(install: Install) -> None:
    result = run("adapters", "bottlenecks")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "error: unknown adapter 'bottlenecks'. Did you mean 'bottleneck'?\n"


def test_debug_adds_the_traceback(install: Install) -> None:
    result = run("--debug", "adapters", "bottlenecks")
    assert result.exit_code == 1
    assert "Traceback (most recent call last)" in result.stderr
    assert result.stderr.endswith("error: unknown adapter 'bottlenecks'. Did you mean 'bottleneck'?\n")


@pytest.mark.parametrize("args", [("plugns",), ("plugins", "--jsn"), ("--nope",), ("adapters", "lora", "prefix")])
def test_wrong_usage_is_exit_code_2(args: tuple[str, ...], install: Install) -> None:
    result = run(*args)
    assert result.exit_code == 2
    assert result.stderr.startswith("Usage: ")
    if args == ("plugns",):
        assert "no such command 'plugns'. Did you mean 'plugins'" in result.stderr


def test_an_unknown_command_mentions_what_could_not_be_loaded(install: Install) -> None:
    install("bad", "raise RuntimeError('boom')")
    assert "Not loaded: bad (adapterkit-bad: failed)" in run("greet").stderr


def test_a_plugin_adds_commands_that_help_lists_without_importing_them(install: Install) -> None:
    install("good", COMMAND)
    result = run("--help")
    assert result.exit_code == 0
    told = [line.split(maxsplit=1) for line in result.stdout.splitlines()]
    assert ["greet", "Say hello."] in told
    assert ["crash", "Never imported by --help."] in told
    assert run("greet").stdout == "hello\n"
    assert run("good:greet").stdout == "hello\n"
    assert "greet" in run("--help").stdout


def test_a_broken_command_is_an_error_without_a_traceback(install: Install) -> None:
    install("good", COMMAND)
    assert "is 3, not a click command" in run("bad").stderr
    crash = run("crash")
    assert crash.exit_code == 1
    assert crash.stderr.startswith("error: plug-in 'good': command 'crash' (zoo_crash:greet)")


def test_strict_mode_is_an_error_even_for_help(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("bad", "raise RuntimeError('boom')")
    monkeypatch.setenv("ADAPTERKIT_STRICT_PLUGINS", "1")
    for args in (("--help",), ("plugins",)):
        result = run(*args)
        assert (result.exit_code, result.stderr) == (1, "error: plug-in 'bad': RuntimeError: boom\n")


def test_version(install: Install) -> None:
    assert run("--version").stdout == f"adapterkit, version {__version__}\n"


def test_as_a_process_every_broken_plugin_is_one_line_on_stderr(install: Install, tmp_path: Path) -> None:
    homes = [install("bad", "raise RuntimeError('boom')"), install("worse", "import sys; sys.exit(1)")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, homes)),
        "ADAPTERKIT_LOAD_PLUGINS": "adapterkit-bad,adapterkit-worse",
    }
    result = subprocess.run(
        [sys.executable, "-c", "from adapterkit.cli.main import main; main()", "plugins", "--json"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
        check=True,
    )
    assert [line.split(" is skipped")[0] for line in result.stderr.splitlines()] == [
        "plug-in 'bad': RuntimeError: boom (adapterkit-bad 1.0)",
        "plug-in 'worse': SystemExit: 1 (adapterkit-worse 1.0)",
    ]
    statuses = {row["name"]: row["status"] for row in json.loads(result.stdout)}
    assert statuses["bad"] == statuses["worse"] == "failed"
