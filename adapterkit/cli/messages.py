"""How text reaches the terminal: without what would steer it, whoever wrote it; warnings as plain lines on stderr."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator

import click

from adapterkit.errors import printable


def say(text: str, *, err: bool = False) -> None:
    """Prints lines, on stderr where `err` is."""
    click.echo(printable(text), err=err)


@contextlib.contextmanager
def plain_warnings() -> Iterator[None]:
    """Shows warnings as `warning: ...`, without the place in the code, while a command runs."""
    # On a CPU bitsandbytes tells whoever imports it, diffusers among them, of a kernel that nothing here asks for.
    log = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show
            yield
    finally:
        log.setLevel(level)


def _show(message: Warning | str, *_: object, **__: object) -> None:
    say(f"warning: {' '.join(str(message).split())}", err=True)
