"""Saves the roles that a user gave to a model's layers as a plug-in, so that they come with `pip install`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from adapterkit import __version__
from adapterkit.errors import ConfigError
from adapterkit.mapping.roles import RoleMap
from adapterkit.specs import BackendSpec

_PYPROJECT = """\
[build-system]
requires = ["hatchling>=1.25"]
build-backend = "hatchling.build"

[project]
name = "{distribution}"
version = "0.1.0"
description = "Where adapters can act in {classes}: a backend for adapterkit"
requires-python = ">=3.10"
# The contract is adapterkit's own version: a plug-in that asks for another one is named and skipped.
dependencies = ["adapterkit{versions}"]

[project.entry-points.adapterkit]
{name} = "{package}"

[tool.hatch.build.targets.wheel]
packages = ["{package}"]
"""

_HOOKS = '''\
"""Registers the backend. adapterkit imports this module when it starts, so it imports no torch."""

from __future__ import annotations

from adapterkit import hookimpl
from adapterkit.specs import BackendSpec

MODELS = (
{models}
)


@hookimpl
def adapterkit_register_backends() -> list[BackendSpec]:
    """Adds the backend `{name}`."""
    return [BackendSpec("{name}", "{package}.backend:MappedBackend", models=MODELS)]
'''

_BACKEND = '''\
"""Which layer is what."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from adapterkit.backends.generic import GenericBackend


class MappedBackend(GenericBackend):
    """The roles of this family, by globs of module paths; all other layers keep the roles that can be told for sure."""

    in_pipelines = True
    roles: ClassVar[Mapping[str, str]] = {{
{roles}
    }}
'''


def write_plugin(folder: str | Path, name: str, models: Sequence[str], roles: Mapping[str, str]) -> Path:
    """Writes a distribution `adapterkit-<name>` whose backend maps some classes of models with these roles.

    Args:
        folder: Where to put it; made if it does not exist. Then: `pip install -e FOLDER`.
        name: The backend's name: lower case, digits, underscores.
        models: Their classes as `"package:Class"`, where the package is the first part of the class's module.
        roles: Role -> glob of module paths; see `adapterkit.mapping.roles`.

    Returns:
        The folder.

    Raises:
        ConfigError: A name, class or role is malformed, or the folder already has one of the files.
    """
    folder, package = Path(folder), f"adapterkit_{name}"
    spec = BackendSpec(name, f"{package}.backend:MappedBackend", models=tuple(models))
    checked = RoleMap(roles).roles
    if not checked:
        raise ConfigError(["there are no roles to save"], "roles")
    major, minor = (int(part) for part in __version__.split(".")[:2])
    words = {
        "name": name,
        "package": package,
        "distribution": f"adapterkit-{name.replace('_', '-')}",
        "classes": ", ".join(model.partition(":")[2] for model in spec.models),
        "versions": f">={major}.{minor},<{major}.{minor + 1}",
        "models": "\n".join(f"    {json.dumps(model)}," for model in spec.models),
        "roles": "\n".join(f"        {json.dumps(role)}: {json.dumps(glob)}," for role, glob in checked.items()),
    }
    files = {"pyproject.toml": _PYPROJECT, f"{package}/__init__.py": _HOOKS, f"{package}/backend.py": _BACKEND}
    if taken := [file for file in files if (folder / file).exists()]:
        raise ConfigError([f"{folder / file} exists already; choose another folder" for file in taken], "folder")
    (folder / package).mkdir(parents=True, exist_ok=True)
    for file, text in files.items():
        (folder / file).write_text(text.format_map(words), encoding="utf-8")
    return folder
