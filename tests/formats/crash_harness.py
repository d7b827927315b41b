"""Kills saves: run as `python crash_harness.py FOLDER KILLS`, prints a JSON report.

A child saves version after version without a pause until it is killed with SIGKILL at a random moment; then the file
must be readable, hold one version's tensors only, and no older version than before.
"""

from __future__ import annotations

import collections
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from adapterkit.checkpoint import Checkpoint, ReadOptions, WriteOptions
from adapterkit.errors import AdapterKitError
from adapterkit.formats.native import NativeFormat
from adapterkit.formats.source import Source
from adapterkit.points import Points

VALUES = 1 << 16
NONE = Points([])


def save(path: Path, version: int) -> None:
    tensors = {"attn.q@toy.0": {"A": torch.full((VALUES,), float(version)), "B": torch.full((8,), float(version))}}
    whole = Checkpoint.of("lora", {}, tensors, metadata={"version": str(version)})
    NativeFormat().write({"": whole}, path, NONE, WriteOptions())


def version_of(path: Path) -> int:
    """The version that the file holds; an error where it holds parts of several."""
    [found] = NativeFormat().read(Source.of(path), NONE, ReadOptions())[0].values()
    version = int(found.metadata["version"])
    for tensor in found.tensors["attn.q@toy.0"].values():
        if not torch.equal(tensor, torch.full_like(tensor, float(version))):
            raise ValueError("torn")
    return version


def save_forever(path: Path, version: int, done: int) -> None:
    """Writes a byte to the descriptor after each save."""
    while True:
        version += 1
        save(path, version)
        os.write(done, b".")


def kill_one(path: Path, version: int, saves: int, delay: float) -> None:
    """Kills a child so many seconds after so many of its saves, however busy the machine is."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            save_forever(path, version, writer)
        finally:
            os._exit(1)
    os.close(writer)
    for _ in range(saves):
        os.read(reader, 1)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    os.close(reader)
    if os.waitstatus_to_exitcode(status) != -signal.SIGKILL:
        raise RuntimeError(f"the child ended by itself: {status}")


def main(folder: Path, kills: int) -> dict[str, int]:
    torch.set_num_threads(1)
    path, chance = folder / "x.safetensors", random.Random(5)
    save(path, 1)
    version = 1
    seen: collections.Counter[str] = collections.Counter()
    for _ in range(kills):
        kill_one(path, version, chance.randrange(3), chance.uniform(0, 0.02))
        try:
            now = version_of(path)
        except (AdapterKitError, ValueError):
            seen["corrupt"] += 1
            continue
        seen["backwards"] += now < version
        seen["advanced"] += now > version
        version = now
        left = len(list(folder.iterdir())) - 1
        seen["interrupted"] += left > 0
        seen["most_left"] = max(seen["most_left"], left)
    save(path, version + 1)
    seen["left_after_a_save"] = len(list(folder.iterdir())) - 1
    return {"kills": kills, "versions": version, "corrupt": 0, **seen}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]))))
