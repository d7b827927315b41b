"""Fake distributions: a folder on sys.path with a module, and the metadata that pip would have written beside it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from textwrap import dedent

import pytest

HEADER = """
from adapterkit import hookimpl
from adapterkit.specs import AdapterSpec, BackendSpec, CommandSpec, FormatSpec, TaskSpec
"""
GOOD = """
@hookimpl
def adapterkit_register_adapters():
    return [AdapterSpec("gate", "zoo_good:Gate", kinds={"output"}, summary="one gate per feature")]
"""

Install = Callable[..., Path]


def installer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """A function that installs one fake distribution; each gets a module `zoo_<name>` and a folder of its own.

    What is really installed, and what the environment says of plug-ins, is hidden as long as `monkeypatch` lasts.
    """
    for variable in [name for name in os.environ if name.startswith("ADAPTERKIT_")]:
        monkeypatch.delenv(variable)
    homes: list[str] = []
    real = metadata.distributions
    monkeypatch.setattr(metadata, "distributions", lambda: real(path=homes))

    def install(
        name: str,
        code: str = "",
        *,
        version: str = "1.0",
        requires: tuple[str, ...] = (),
        entry: str | None = None,
        entry_points: str | bytes | None = None,
        header: str = HEADER,
    ) -> Path:
        home = folder / f"{name}-{version}"
        info = home / f"adapterkit_{name}-{version}.dist-info"
        info.mkdir(parents=True)
        (home / f"zoo_{name}.py").write_text(header + dedent(code))
        lines = [f"Metadata-Version: 2.1\nName: adapterkit-{name}\nVersion: {version}"]
        lines += [f"Requires-Dist: {requirement}" for requirement in requires]
        (info / "METADATA").write_text("\n".join(lines) + "\n")
        text = entry_points or f"[adapterkit]\n{entry or name} = zoo_{name}\n"
        (info / "entry_points.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
        homes.insert(0, str(home))
        monkeypatch.syspath_prepend(str(home))
        monkeypatch.delitem(sys.modules, f"zoo_{name}", raising=False)
        return home

    return install
