"""What happens in a run, for those who want to know: callbacks, which plug-ins add."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import BaseModel

from adapterkit.errors import AdapterKitError, PluginError
from adapterkit.training.config import Section
from adapterkit.training.result import Result
from adapterkit.training.run import Run

_EVENTS = ("begin", "step", "evaluate", "save", "sample", "end")


@dataclass
class Training:
    """A run as callbacks see it.

    Attributes:
        run: Its keys, with nothing left open.
        folder: The run folder.
        model: The base, with the adapter from the first step on.
        step: Steps that are done.
        history: The records of the metrics that there are from earlier sessions, oldest first.
        tell: Takes a line for the user.
        stopped: Why a callback has asked for the end; empty where none has.
    """

    run: Run
    folder: Path
    model: Any
    step: int
    history: Sequence[Mapping[str, Any]]
    tell: Callable[[str], object]
    stopped: str = field(default="", init=False)

    def stop(self, why: str) -> None:
        """Ends the run after this step, as if it were the last one."""
        self.stopped = why


class Callback:
    """Is told what happens, in the main process alone. Subclasses override what they want to know.

    Args:
        options: An instance of `Options`.

    Attributes:
        Options: Its keys in a run file, beside `type`.
    """

    Options: ClassVar[type[BaseModel]] = Section

    def __init__(self, options: Any = None) -> None:
        self.options = options

    def begin(self, training: Training) -> None:
        """The first step of this session comes next."""

    def step(self, training: Training, record: Mapping[str, Any]) -> None:
        """A step is done; the record is that of the metrics: `loss`, `lr`, `grad_norm`, `seconds`."""

    def evaluate(self, training: Training, figures: Mapping[str, float]) -> None:
        """The task has measured these."""

    def save(self, training: Training, folder: Path) -> None:
        """A checkpoint has been written."""

    def sample(self, training: Training, files: Sequence[Path]) -> None:
        """These samples have been made."""

    def end(self, training: Training, result: Result) -> None:
        """The session is over: finished, or stopped by a signal (`result.exit_code`)."""


class Callbacks:
    """Tells all callbacks; who fails is named, and ends the run.

    Args:
        callbacks: Each with the plug-in that it is from.
        training: The run.
    """

    def __init__(self, callbacks: Sequence[tuple[Callback, str]], training: Training) -> None:
        self._callbacks, self.training = callbacks, training

    def tell(self, event: str, *arguments: Any) -> None:
        """Calls a method of every callback.

        Raises:
            PluginError: One raises what is no error of adapterkit's.
        """
        for callback, plugin in self._callbacks:
            try:
                getattr(callback, event)(self.training, *arguments)
            except (AdapterKitError, torch.OutOfMemoryError):
                raise
            except Exception as error:  # third-party code may raise anything
                told = f"callback {type(callback).__name__}: {event} raised {type(error).__name__}: {error}"
                raise PluginError(told, plugin) from error


def made(run: Run) -> Iterator[tuple[Callback, str]]:
    """The callbacks that a run names, with their plug-ins.

    Raises:
        PluginError: One cannot be made.
    """
    for cls, options, plugin in run.callbacks:
        try:
            yield cls(options), plugin
        except AdapterKitError:
            raise
        except Exception as error:  # third-party code may raise anything
            raise PluginError(
                f"callback {cls.__name__}: __init__ raised {type(error).__name__}: {error}", plugin
            ) from error
