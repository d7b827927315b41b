"""`inspect` of a file as large as they come: at most twice its size in memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

_MODULES, _WIDTH, _RANK = 960, 1280, 64
_SCRIPT = """
import sys
from pathlib import Path
from click.testing import CliRunner
from adapterkit.cli.main import main
result = CliRunner().invoke(main, ["inspect", sys.argv[1], "--json"])
assert result.exit_code == 0, result.output
[peak] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
print(peak.split()[1])
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read from /proc")
def test_memory_is_at_most_twice_the_file(tmp_path: Path):
    path, tensors = tmp_path / "large.safetensors", {}
    for number in range(_MODULES):
        name = f"lora_unet_blocks_{number // 8}_layer_{number % 8}"
        tensors[f"{name}.lora_down.weight"] = torch.randn(_RANK, _WIDTH).half()
        tensors[f"{name}.lora_up.weight"] = torch.randn(_WIDTH, _RANK).half()
        tensors[f"{name}.alpha"] = torch.tensor(16.0)
    save_file(tensors, path)
    del tensors
    size = path.stat().st_size
    assert size > 300e6
    # The first compiles the modules, which takes memory too; and huge pages are the kernel's to give.
    peaks = [_peak(path, tmp_path) for _ in range(3)]
    assert min(peaks) <= 2 * size, peaks


def _peak(path: Path, cache: Path) -> int:
    """Bytes, of a process of its own."""
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(cache)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    command = [sys.executable, "-c", _SCRIPT, str(path)]
    run = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return int(run.stdout.split()[-1]) * 1024
