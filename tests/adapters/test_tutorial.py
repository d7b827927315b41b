"""plugins/README.md, followed to the letter: its files are written, installed beside the others, and run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"```\w+\n# (\S+)\n(.*?)```", re.DOTALL)


OTHERS = """
from adapterkit.testing import AdapterConformance
from adapterkit_gate.careful import Careful
from adapterkit_gate.low_rank import LowRank
from adapterkit_gate.recall import Recall
from adapterkit_gate.scaled import Scaled


class TestLowRank(AdapterConformance):
    config = LowRank(rank=2)


class TestCareful(AdapterConformance):
    config = Careful()


class TestRecall(AdapterConformance):
    config = Recall()


class TestScaled(AdapterConformance):
    config = Scaled()
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    blocks = dict(BLOCK.findall((ROOT / "plugins/README.md").read_text()))
    modules = ("__init__", "gate", "low_rank", "scaled", "careful", "recall", "model", "backend", "format", "hooks")
    tests = ("gate", "backend", "format")
    assert set(blocks) == {
        "pyproject.toml", "try_gate.py", *(f"adapterkit_gate/{name}.py" for name in modules),
        *(f"tests/test_{name}.py" for name in tests),
    }  # fmt: skip
    blocks["tests/test_others.py"] = OTHERS
    for name, text in blocks.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return tmp_path


@pytest.fixture
def environment(package: Path) -> dict[str, str]:
    """What `pip install -e` would leave behind, made by hand: the build backend may be absent where tests run."""
    project = pytest.importorskip("tomllib").loads((package / "pyproject.toml").read_text())["project"]
    info = package / "adapterkit_gate-0.1.0.dist-info"
    info.mkdir()
    entries = [f"{name} = {value}" for name, value in project["entry-points"]["adapterkit"].items()]
    entries.append("gate_more = adapterkit_gate.hooks")
    (info / "entry_points.txt").write_text("\n".join(["[adapterkit]", *entries]))
    requires = "".join(f"Requires-Dist: {line}\n" for line in project["dependencies"])
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n{requires}"
    )
    paths = os.pathsep.join([str(package), str(ROOT)])
    return {**os.environ, "PYTHONPATH": paths, "ADAPTERKIT_STRICT_PLUGINS": "1"}


def test_the_type_is_listed_without_torch(package: Path, environment: dict[str, str]) -> None:
    code = "import sys, adapterkit as ak; print(ak.get_plugin_manager().adapter('gate'), 'torch' in sys.modules)"
    done = _python(["-c", code], package, environment)
    assert "'gate'" in done
    assert "from adapterkit-gate 0.1.0" in done
    assert done.split()[-1] == "False"


def test_the_example_runs(package: Path, environment: dict[str, str]) -> None:
    pytest.importorskip("transformers")
    done = _python(["try_gate.py"], package, environment)
    losses = [float(line.split()[1]) for line in done.splitlines() if re.fullmatch(r"\d+ [\d.]+", line)]
    assert len(losses) == 10
    assert losses[-1] < losses[0]
    assert (package / "mine.safetensors").is_file()


@pytest.mark.timeout(500)
@pytest.mark.slow
def test_everything_conforms(package: Path, environment: dict[str, str]) -> None:
    arguments = ["-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", "--import-mode=importlib", "tests"]
    done = _python(arguments, package, environment)
    assert "failed" not in done
    assert "passed" in done


def _python(arguments: list[str], folder: Path, environment: dict[str, str]) -> str:
    done = subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    return done.stdout
