"""Data that is read in processes of their own comes as it would from this one."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from adapterkit.errors import DataError, TrainingError
from adapterkit.training.interrupt import held
from adapterkit.training.order import Order
from adapterkit.training.reading_processes import in_portions, read_batches

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")
BATCHES = in_portions(range(11), 2)


class Numbers:
    """Its own numbers; what is `bad` cannot be read."""

    def __init__(self, bad: int | None = None) -> None:
        self.bad, self.read = bad, multiprocessing.Value("i", 0)

    def __getitem__(self, number: int) -> int:
        with self.read.get_lock():
            self.read.value += 1
        if number == self.bad:
            raise DataError("cannot be read", [Path("7.png")])
        return number


class Deadly:
    def __getitem__(self, number: int) -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return number


def total(items: Sequence[Any]) -> int:
    return sum(items)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_batches_come_in_order_and_few_are_read_ahead(workers: int):
    data, found = Numbers(), []
    for batch in read_batches(data, BATCHES, total, workers):
        found.append(batch)
        assert data.read.value <= 2 * (len(found) + 2 * workers)
    assert found == [1, 5, 9, 13, 17, 10]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_is_the_same_whoever_reads(workers: int):
    found = []
    with pytest.raises(DataError) as caught:
        found.extend(read_batches(Numbers(bad=7), BATCHES, total, workers))
    assert type(caught.value) is DataError
    assert str(caught.value) == "cannot be read:\n  7.png"
    assert caught.value.files == [Path("7.png")]
    assert not multiprocessing.active_children()


def test_a_process_that_is_killed_is_told():
    with pytest.raises(TrainingError, match=r"ended from outside \(exit code -9\).* num_workers=0"):
        next(read_batches(Deadly(), BATCHES, total, 1))
    assert not multiprocessing.active_children()


def test_a_reader_that_is_closed_ends_its_processes():
    batches = read_batches(Numbers(), BATCHES, total, 2)
    assert next(batches) == 1
    assert len(multiprocessing.active_children()) == 2
    batches.close()
    assert not multiprocessing.active_children()


def test_an_order_keeps_the_permutation_of_one_epoch():
    order = Order(size=100, batch_size=7, seed=0, first=0, last=150, groups=[0] * 60 + [1] * 40)
    assert len(list(order)) == 150
    assert sum(len(numbers) for _, numbers in order._permutations.values()) == 100


def test_a_signal_waits_until_processes_are_started():
    done = []
    with pytest.raises(KeyboardInterrupt), held():  # noqa: PT012 - what is raised comes at the end
        signal.raise_signal(signal.SIGINT)
        done.append("started")
    assert done == ["started"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
