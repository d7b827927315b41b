"""Says what an installation takes where that is much, and stops it where the disk has no room.

    python .ci/room.py PLAN FOLDER GOAL

PLAN is what `pip install --dry-run --report` has written. Runs before anything is installed, on Python alone.
"""

from __future__ import annotations

import json
import shutil
import sys
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

GIB = 1 << 30
REST = 3 * GIB
"""Everything but CUDA builds, torch for CPUs included: 1.9 GiB in 2026, and what is unpacked on the way."""
KEPT = 3
"""A wheel of CUDA's is kept in pip's cache and unpacked to twice its size."""
UNKNOWN = {"torch": 900 << 20, "triton": 200 << 20}
OTHER = 250 << 20
CPU_INDEX = '<url of an index with CPU builds: PyTorch\'s page "Get Started" names it>'


def is_cuda(name: str) -> bool:
    """Whether a package is there for CUDA alone."""
    return name == "triton" or name.startswith(("nvidia-", "cuda-"))


def size_of(item: Mapping[str, Any]) -> int:
    """The bytes of one package's wheel: as the index says, or about."""
    name, url = item["metadata"]["name"], item["download_info"]["url"]
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=5) as answer:
            return int(answer.headers["Content-Length"])
    except (OSError, ValueError, TypeError):  # an index that wants a password, or says no length
        return UNKNOWN.get(name, OTHER)


def advice(plan: Mapping[str, Any], free: int, goal: str, *, gpu: bool) -> tuple[bool, str]:
    """Whether there is room, and what to say.

    Args:
        plan: What pip would install.
        free: Bytes of disk.
        goal: What `make` was asked for.
        gpu: Whether the machine shows one that CUDA builds are for.
    """
    items = plan["install"]
    cuda = [item for item in items if is_cuda(item["metadata"]["name"])]
    heavy = [*cuda, *(item for item in items if item["metadata"]["name"] == "torch")] if cuda else []
    download = sum(map(size_of, heavy))
    need = REST + KEPT * download
    smaller = f"make {goal} TORCH_INDEX={CPU_INDEX}" if heavy else ""
    if free < need:
        told = f"error: this needs about {need / GIB:.1f} GiB of disk, and {free / GIB:.1f} GiB are free."
        less = f"\nCPU builds of torch need about {REST / GIB:.0f} GiB in all: {smaller}" if heavy else ""
        return False, f"{told}{less}\nTo install all the same: make {goal} ANY_DISK=1"
    if heavy and not gpu:
        told = (
            "the package index has CUDA builds of torch, and this machine shows no NVIDIA GPU. They work on the CPU too"
        )
        cost = f"about {download / GIB:.1f} GiB are downloaded and {need / GIB:.1f} GiB of disk used"
        return True, f"note: {told}: {cost}. Smaller and quicker: {smaller}"
    return True, ""


if __name__ == "__main__":
    fits, said = advice(
        json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")),
        shutil.disk_usage(sys.argv[2]).free,
        sys.argv[3],
        gpu=shutil.which("nvidia-smi") is not None,
    )
    if said:
        print(said, file=sys.stderr)
    sys.exit(not fits)
