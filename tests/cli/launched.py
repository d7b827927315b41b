"""Runs in several processes, as torchrun starts them where there is no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from adapterkit.training.checked import CheckedTask

NOTHING: Mapping[str, str] = MappingProxyType({})
PROGRAM = """
import adapterkit.torchvision_ops as ops; ops.ensure_torchvision_ops()
from tests.training import toy_task; toy_task.register()
{}
from adapterkit.cli.main import main; main(prog_name="adapterkit")
"""


def command(folder: Path, *arguments: object, processes: int = 2, also: str = "") -> list[str]:
    """What starts them; `also` is what the program does before, and `folder` is where it lies."""
    program = folder / "program.py"
    program.write_text(PROGRAM.format(also))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [*launcher, str(program), *map(str, arguments)]


def environment(told: Mapping[str, str] = NOTHING) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd()), **told}


def together(
    folder: Path, *arguments: object, processes: int = 2, also: str = "", told: Mapping[str, str] = NOTHING
) -> subprocess.CompletedProcess[str]:
    """What a command came to."""
    started = command(folder, *arguments, processes=processes, also=also)
    given = environment(told)
    return subprocess.run(started, env=given, capture_output=True, text=True, timeout=200, check=False)


def tell_devices() -> None:
    """Has every process say where the values are of the model that it has read."""
    read = CheckedTask.load_model

    def load_model(self: CheckedTask) -> Any:
        model = read(self)
        devices = sorted({str(parameter.device) for parameter in model.parameters()})
        print(f"rank {os.environ['RANK']} has a model on {', '.join(devices)}", file=sys.stderr)
        return model

    CheckedTask.load_model = load_model
