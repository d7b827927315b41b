"""`adapterkit plugins new` writes packages whose tests pass as they are, and overwrites nothing."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from adapterkit.cli.main import main

tomllib = pytest.importorskip("tomllib")  # of Python 3.11
KINDS = ("adapter", "backend", "format", "task")
ROOT = Path(__file__).parents[2]


def new(*args: str) -> Result:
    return CliRunner().invoke(main, ["plugins", "new", *args])


def install(package: Path) -> None:
    """What pip would write: the metadata that makes the entry point known."""
    project = tomllib.loads((package / "pyproject.toml").read_text())["project"]
    info = package / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    requires = "".join(f"Requires-Dist: {one}\n" for one in project["dependencies"])
    name, version = project["name"], project["version"]
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{requires}")
    [(group, entries)] = project["entry-points"].items()
    lines = [f"{entry} = {module}" for entry, module in entries.items()]
    (info / "entry_points.txt").write_text("\n".join([f"[{group}]", *lines, ""]))


def environment(packages: Sequence[Path]) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [*packages, ROOT])), "OMP_NUM_THREADS": "1"}


@pytest.mark.timeout(400)
@pytest.mark.parametrize("kinds", [KINDS[1:], pytest.param(KINDS[:1], marks=pytest.mark.slow)], ids=",".join)
def test_new_packages_pass_their_tests(tmp_path: Path, kinds: tuple[str, ...]) -> None:
    for kind in kinds:
        assert new(f"tried_{kind}", "--kind", kind, "--into", str(tmp_path)).exit_code == 0
    packages = [tmp_path / f"adapterkit-tried-{kind}" for kind in kinds]
    for package in packages:
        install(package)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-W",
        "error",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(tmp_path),
    ]
    done = subprocess.run(
        [*command, *map(str, packages)],
        check=False, cwd=tmp_path, env=environment(packages), capture_output=True, text=True, timeout=380,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "failed" not in done.stdout
    listed = subprocess.run(
        [sys.executable, "-m", "adapterkit", "plugins", "--json"],
        check=True, cwd=tmp_path, env=environment(packages), capture_output=True, text=True,
    )  # fmt: skip
    rows = {row["name"]: row for row in json.loads(listed.stdout)}
    for kind in kinds:
        row = rows[f"tried_{kind}"]
        assert row["status"] == "active", row
        assert row["imports"] == []
        assert row["provides"] == [f"{kind} {'tried-task' if kind == 'task' else f'tried_{kind}'}"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_package_imports_what_is_public(tmp_path: Path, kind: str) -> None:
    assert new("tried", "--kind", kind, "--into", str(tmp_path)).exit_code == 0
    told = "".join((ROOT / "plugins" / page).read_text(encoding="utf-8") for page in ("README.md", "HOOKS.md"))
    public = {f"adapterkit{name}" for name in re.findall(r"`(?:adapterkit)?(\.[a-z][a-z_.]*)`", told)}
    texts = [path.read_text() for path in tmp_path.rglob("*.py")]
    imported = {
        name for text in texts for name in re.findall(r"^from (adapterkit\.[a-z_.]+) import", text, re.MULTILINE)
    }
    assert imported
    public |= {name.rpartition(".")[0] for name in public}  # from adapterkit.formats import container
    assert imported <= public


def test_it_requires_this_release_of_adapterkit(tmp_path: Path) -> None:
    assert new("tried", "--kind", "task", "--into", str(tmp_path)).exit_code == 0
    project = tomllib.loads((tmp_path / "adapterkit-tried/pyproject.toml").read_text())["project"]
    tutorial = (ROOT / "plugins/README.md").read_text(encoding="utf-8")
    [requirement] = project["dependencies"]
    assert f'dependencies = ["{requirement}"]' in tutorial


def test_it_says_what_to_do_next(tmp_path: Path) -> None:
    result = new("gate", "--kind", "adapter", "--into", str(tmp_path))
    folder = tmp_path / "adapterkit-gate"
    assert f"pip install -e '{folder}[dev]'" in result.stdout
    assert "adapterkit plugins check adapterkit-gate" in result.stdout
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == {
        "pyproject.toml", "README.md", "adapterkit_gate/__init__.py", "adapterkit_gate/gate.py", "tests/test_gate.py",
    }  # fmt: skip


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    folder = tmp_path / "adapterkit-gate"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    result = new("gate", "--kind", "adapter", "--into", str(tmp_path))
    assert result.exit_code == 1
    assert "exists already" in result.stderr
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    "name", ["Gate", "1gate", "my-gate", "gate__x", "_gate", "class", "a" * 41, "../gate", "gäte", ""]
)
def test_names_that_cannot_be(tmp_path: Path, name: str) -> None:
    result = new(name, "--kind", "adapter", "--into", str(tmp_path))
    assert result.exit_code == 1
    assert "cannot name a plug-in" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "kind"), [("lora", "adapter"), ("native", "format"), ("generic", "backend"), ("causal_lm", "task")]
)
def test_names_that_are_taken(tmp_path: Path, name: str, kind: str) -> None:
    result = new(name, "--kind", kind, "--into", str(tmp_path))
    assert result.exit_code == 1
    assert "exists already, provided by adapterkit" in result.stderr
    assert not list(tmp_path.iterdir())


def test_the_kind_must_be_known(tmp_path: Path) -> None:
    assert new("gate", "--kind", "adaptor", "--into", str(tmp_path)).exit_code == 2
    assert new("gate", "--into", str(tmp_path)).exit_code == 2
