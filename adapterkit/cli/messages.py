"""How Python's warnings reach the terminal: as plain lines on stderr."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import click


@contextlib.contextmanager
def plain_warnings() -> Iterator[None]:
    """Shows warnings as `warning: ...`, without the place in the code, while a command runs."""
    with warnings.catch_warnings():
        warnings.showwarning = _show
        yield


def _show(message: Warning | str, *_: object, **__: object) -> None:
    click.echo(f"warning: {' '.join(str(message).split())}", err=True)
