"""`adapterkit plugins new`: a complete package to begin from."""

from __future__ import annotations

import keyword
import re
from importlib import resources
from pathlib import Path
from string import Template

import click

from adapterkit import __version__
from adapterkit.errors import InvalidNameError, StateError
from adapterkit.plugins.manager import PluginManager, get_plugin_manager

_NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
_LONGEST = 40
_SUMMARIES = {
    "adapter": "The adapter type {}",
    "backend": "The backend {}",
    "format": "The file format {}",
    "task": "The training task {}",
}


@click.command("new")
@click.argument("name")
@click.option("--kind", type=click.Choice(sorted(_SUMMARIES)), required=True, help="What the package provides.")
@click.option(
    "--into",
    type=click.Path(path_type=Path),
    default=Path(),
    show_default="here",
    help="The folder in which the package's folder is made.",
)
def command(name: str, kind: str, into: Path) -> None:
    """Write a complete package, adapterkit-NAME: it installs, and its tests pass as they are.

    NAME is what users will write: lower-case letters, digits and underscores.
    """
    check_name(name, kind, get_plugin_manager())
    values = names(name, kind)
    folder = into / values["distribution"]
    if folder.exists() or folder.is_symlink():
        raise StateError(f"{folder} exists already, and nothing in it was changed; choose another name or --into")
    for path, text in files(kind, values).items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    click.echo(f"{folder} is written. Next:\n")
    click.echo(f"  pip install -e '{folder}[dev]'")
    click.echo(f"  adapterkit plugins check {values['distribution']}")
    click.echo(f"  pytest {folder}")


def check_name(name: str, kind: str, manager: PluginManager) -> None:
    """Raises InvalidNameError for a name that cannot be a module's, or that is taken."""
    if not _NAME.fullmatch(name) or len(name) > _LONGEST or keyword.iskeyword(name):
        raise InvalidNameError(
            f"{name!r} cannot name a plug-in: use lower-case letters, digits and single underscores, beginning with a "
            f"letter, at most {_LONGEST} in all, and no word of Python's own"
        )
    taken = {"adapter": manager.adapters, "backend": manager.backends, "format": manager.formats, "task": manager.tasks}
    registered = names(name, kind)["task" if kind == "task" else "name"]
    if registered in taken[kind]():
        whose, _ = manager.provider(kind, registered)
        raise InvalidNameError(f"{kind} {name!r} exists already, provided by {whose}; choose another name")


def names(name: str, kind: str) -> dict[str, str]:
    """Everything that the templates are filled with."""
    words = name.split("_")
    spoken = words[:-1] if words[-1] == kind and len(words) > 1 else words  # not MyFormatFormat
    cls = "".join(word[:1].upper() + word[1:] for word in spoken)
    major, minor, *_ = __version__.split(".")
    return {
        "name": name,
        "task": "-".join(words),
        "cls": cls,
        "module": f"adapterkit_{name}",
        "distribution": f"adapterkit-{'-'.join(words)}",
        "summary": _SUMMARIES[kind].format(name),
        "versions": f">={major}.{minor},<{major}.{int(minor) + 1}",
    }


def files(kind: str, values: dict[str, str]) -> dict[str, str]:
    """Path -> text of every file of the package."""
    module = values["module"]
    templates = {
        "pyproject.toml": "pyproject.toml",
        "README.md": "README.md",
        f"{module}/__init__.py": f"{kind}_init.py",
        f"{module}/{values['name']}.py": f"{kind}.py",
        f"tests/test_{values['name']}.py": f"{kind}_test.py",
    }
    home = resources.files("adapterkit.cli.plugins") / "templates"
    texts = {path: (home / f"{source}.txt").read_text(encoding="utf-8") for path, source in templates.items()}
    return {path: Template(text).substitute(values) for path, text in texts.items()}
