"""What `import adapterkit` costs, and that its public names are there whatever was imported first."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

import adapterkit as ak

HELP = "from adapterkit.cli.main import main; main(['--help'])"
HEAVY = ("torch", "transformers", "diffusers", "timm", "torchvision", "accelerate", "numpy")


def run(code: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *options, "-c", code], capture_output=True, text=True, timeout=100, check=False
    )


def seconds(code: str) -> float:
    """Of the processor: what other processes do is not in them."""
    start = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert run(code).returncode == 0
    end = resource.getrusage(resource.RUSAGE_CHILDREN)
    return end.ru_utime + end.ru_stime - start.ru_utime - start.ru_stime


@pytest.mark.parametrize(
    "code",
    [
        "import adapterkit",
        "import adapterkit.plugins.builtin, adapterkit.plugins.manager, adapterkit.selectors, adapterkit.points",
        "import adapterkit as ak; ak.AdapterKitError, ak.ConfigError, ak.TrainingError",
        "import adapterkit as ak; ak.hookimpl, ak.errors, ak.specs, ak.InjectionPoint, ak.get_plugin_manager()",
        "from adapterkit.cli.main import main; main(['--help'], standalone_mode=False)",
        "from adapterkit.cli.main import main; main(['adapters'], standalone_mode=False)",
        "from adapterkit.cli.main import main; main(['backends', '--json'], standalone_mode=False)",
        "from adapterkit.cli.main import main; main(['plugins'], standalone_mode=False)",
    ],
)
def test_no_heavy_library_is_imported(code: str) -> None:
    result = run(f"{code}\nimport sys\nprint('heavy:', [n for n in {HEAVY} if n in sys.modules])", "-W", "error")
    assert result.stdout.splitlines()[-1:] == ["heavy: []"], result.stdout + result.stderr


def test_help_takes_at_most_a_third_of_importing_torch() -> None:
    torch = seconds("import torch")
    assert seconds("import adapterkit") <= torch / 3
    assert seconds(HELP) <= torch / 3


FIRST = (
    "",
    "import adapterkit.points",
    "from adapterkit.points import InjectionPoint",
    "import adapterkit.handle.adapters",
    "from adapterkit import points",
    "import importlib; importlib.import_module('adapterkit.points')",
    "import adapterkit as ak; ak.points; import adapterkit.points",
)
CHECK = """
import adapterkit
from adapterkit import points
from adapterkit.handle.listing import points as function
from adapterkit.points import InjectionPoint
import sys
assert adapterkit.points is points is function, adapterkit.points
assert adapterkit.InjectionPoint is InjectionPoint is sys.modules["adapterkit.points"].InjectionPoint
import pickle
assert pickle.loads(pickle.dumps(InjectionPoint)) is InjectionPoint
"""
ANEW = """
import sys
for name in [name for name in sys.modules if name.partition(".")[0] == "adapterkit"]:
    del sys.modules[name]
"""


def test_points_is_the_function_whatever_is_imported_first() -> None:
    """Each as if in a process of its own, which would import torch again."""
    result = run("".join(f"print({first!r}){ANEW}{first}{CHECK}" for first in FIRST))
    assert result.returncode == 0, f"after {result.stdout.splitlines()[-1]}: {result.stderr}"
    assert result.stdout.splitlines() == list(FIRST)


def test_numpy_is_declared_without_which_no_file_can_be_written() -> None:
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    assert '"numpy>=' in project.partition("\ndependencies = [")[2].partition("\n]")[0]


def test_every_public_name_resolves_and_is_listed() -> None:
    for name in ak.__all__:
        assert getattr(ak, name) is getattr(ak, name)
    assert set(ak.__all__) <= set(dir(ak))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'adapterkit' has no attribute 'Lora'"):
        _ = ak.Lora
