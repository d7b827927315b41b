"""Data that is read in processes of their own: a few batches ahead, in order, with errors that are their own."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch.utils.data import DataLoader

from adapterkit.errors import DataError, TrainingError
from adapterkit.training.interrupt import held, ignore_in_worker

_Item = TypeVar("_Item")


class Batches(Sized, Protocol):
    """Of each batch what its items are asked for by."""

    def __iter__(self) -> Iterator[Sequence[Any]]: ...


@dataclass(frozen=True)
class _Refused:
    """An error as an answer: raised in a process of its own, torch would make another one of it."""

    error: DataError


@dataclass(frozen=True)
class _Reader:
    """Answers a batch at a time."""

    data: Any
    collate: Callable[[list[Any]], Any]

    def __getitem__(self, batch: Sequence[Any]) -> Any:
        try:
            return self.collate([self.data[each] for each in batch])
        except DataError as error:
            return _Refused(error)


def read_batches(
    data: Any, batches: Batches, collate: Callable[[list[Any]], Any], workers: int
) -> Generator[Any, None, None]:
    """Reads a data set a batch at a time. At most two batches for each process are there at once.

    Whoever may leave before the end closes it (`contextlib.closing`): the processes ignore signals, and end with it.

    Args:
        data: Has `__getitem__` for what the batches hold.
        batches: Which items are in which batch.
        collate: Makes a batch of its items.
        workers: Processes; 0 for this one.

    Raises:
        DataError: What the data set raises, as it is.
        TrainingError: A process was ended from outside.
    """
    data_loader: Any = DataLoader(
        _Reader(data, collate),  # type: ignore[arg-type]
        batch_size=None,
        sampler=batches,  # type: ignore[arg-type]
        collate_fn=_as_it_is,
        num_workers=min(workers, len(batches)),
        worker_init_fn=ignore_in_worker,
        generator=torch.Generator(),  # so that no global random number is consumed
    )
    loader: Any = None
    try:
        with held():
            loader = iter(data_loader)
        while True:
            try:
                found = next(loader)
            except StopIteration:
                return
            except RuntimeError as error:
                raise _ended(loader) or error from error
            if isinstance(found, _Refused):
                raise found.error
            yield found
    finally:
        if (
            data_loader.num_workers and loader is not None
        ):  # an error's traceback keeps them alive, and Python's end would wait for them
            loader._shutdown_workers()


def _as_it_is(batch: Any) -> Any:
    return batch


def _ended(loader: Any) -> TrainingError | None:
    """Where a process is gone that should be there; memory that ends is the usual reason."""
    codes = [process.exitcode for process in getattr(loader, "_workers", ()) if process.exitcode]
    if not codes:
        return None
    return TrainingError(
        f"a process that reads data was ended from outside (exit code {codes[0]}), as systems do where memory ends; "
        "lower num_workers or batch_size, or set num_workers=0"
    )


def in_portions(items: Sequence[_Item], count: int) -> list[Sequence[_Item]]:
    """The items, `count` at a time."""
    return [items[start : start + count] for start in range(0, len(items), count)]
