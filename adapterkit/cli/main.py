"""`adapterkit`: a group whose commands come from the plug-in manager and are imported when they run."""

from __future__ import annotations

import contextlib
import signal
import traceback
from collections.abc import Iterator
from typing import Any

import click

from adapterkit import __version__
from adapterkit.cli.messages import say
from adapterkit.cli.processes import tells_error
from adapterkit.errors import AdapterKitError, PluginLoadError, did_you_mean
from adapterkit.plugins import get_plugin_manager
from adapterkit.specs import CommandSpec


class Failure(click.ClickException):
    """An error of adapterkit's own or of the system, printed as one line; the exit code is 1 (wrong usage: 2)."""

    def show(self, file: Any = None) -> None:
        """Write the message to stderr, of processes that train together once."""
        if tells_error():
            say(f"error: {self.message}", err=True)


class LazyGroup(click.Group):
    """Lists the registered commands with the help of their specs, and imports only the one that is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The registered names; the built-in ones come first."""
        return list(get_plugin_manager().commands())

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command. An unknown name is a usage error that lists the near matches."""
        manager = get_plugin_manager()
        known = manager.commands()
        if cmd_name in known or ":" in cmd_name:
            return _load(manager.command(cmd_name))
        if not ctx.resilient_parsing:
            ctx.fail(f"no such command {cmd_name!r}.{did_you_mean(cmd_name, known)} {manager.hint()}".rstrip())
        return None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands without importing any."""
        rows = [(spec.name, spec.help) for spec in get_plugin_manager().commands().values()]
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        """See click: parses the arguments, and prints the help if asked to."""
        with _plain_errors(debug=False):
            return super().make_context(*args, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        """See click: runs the chosen command."""
        with _plain_errors(debug=ctx.params["debug"]):
            return super().invoke(ctx)


@contextlib.contextmanager
def _plain_errors(*, debug: bool) -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise  # the reader of a pipe has gone, which click ends quietly
    except KeyboardInterrupt as error:
        say("stopped", err=True)
        raise click.exceptions.Exit(128 + signal.SIGINT) from error
    except (AdapterKitError, OSError) as error:
        if debug:
            say(traceback.format_exc(), err=True)
        raise Failure(str(error)) from error
    except Exception as error:
        if isinstance(error, click.ClickException | click.Abort | click.exceptions.Exit) or tells_error():
            raise
        raise click.exceptions.Exit(1) from error  # another process has ended before, and the two can no longer talk


def _load(spec: CommandSpec) -> click.Command:
    command = spec.load()
    if not isinstance(command, click.Command):
        raise PluginLoadError(f"{spec} is {command!r}, not a click command")
    return command


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, prog_name="adapterkit")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Adapt pretrained PyTorch models with small trainable parts."""
