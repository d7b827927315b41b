"""The order of the data as a function of the seed and the step, so that a run resumes without remembering anything.

Examples are drawn from one permutation after the other, without a break between them: every example is seen once
before any is seen again, whatever the batch size.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader

from adapterkit.training.interrupt import ignore_in_worker


@dataclass(frozen=True)
class Draw:
    """One example of one batch.

    Attributes:
        index: Which example.
        seed: What decides about crop, flip, noise: another one each time the example is drawn.
    """

    index: int
    seed: int

    def generator(self) -> torch.Generator:
        """A fresh CPU generator for this draw."""
        return torch.Generator().manual_seed(self.seed)


def derive_seed(*parts: int | str) -> int:
    """A seed of 63 bits from several parts; unlike Python's `hash`, the same in every process."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@dataclass(frozen=True)
class Order:
    """The batches of one process.

    Attributes:
        size: Examples in the dataset.
        batch_size: Examples per batch and process.
        seed: The run's.
        first, last: The batches of the run that are wanted, last exclusive.
        rank, world: This process among all.
    """

    size: int
    batch_size: int
    seed: int
    first: int
    last: int
    rank: int = 0
    world: int = 1

    def __len__(self) -> int:
        return self.last - self.first

    def __iter__(self) -> Iterator[list[Draw]]:
        for number in range(self.first, self.last):
            start = (number * self.world + self.rank) * self.batch_size
            yield [self.draw(position) for position in range(start, start + self.batch_size)]

    def draw(self, position: int) -> Draw:
        """The example at a place of the endless sequence."""
        epoch, place = divmod(position, self.size)
        index = permutation(self.size, derive_seed(self.seed, "order", epoch))[place]
        return Draw(index, derive_seed(self.seed, "draw", position))


@functools.lru_cache(maxsize=4)
def permutation(size: int, seed: int) -> list[int]:
    """The numbers below `size` in an order that the seed decides."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed)).tolist()


def ordered(data: Any, order: Order, collate: Callable[[list[Any]], Any], workers: int) -> DataLoader[Any]:
    """Reads a data set in an order, in that many processes; in this one where there are none."""
    return DataLoader(
        data,
        batch_sampler=order,  # type: ignore[arg-type]
        collate_fn=collate,
        num_workers=workers,
        worker_init_fn=ignore_in_worker,
        generator=torch.Generator(),  # so that no global random number is consumed
    )
