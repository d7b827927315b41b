"""The order of the data as a function of the seed and the step, so that a run resumes without remembering anything.

Examples are drawn from one permutation after the other, without a break between them: every example is seen once
before any is seen again, whatever the batch size. Where examples are in groups (pictures of one size), a batch of all
processes together is of one group: each group has permutations of its own, and gets as many batches as its share of the
examples says.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch


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


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The global generators, which models and transforms of others draw from, with a seed; put back after."""
    python, numbers = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.default_generator.manual_seed(seed)
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numbers)


@dataclass(frozen=True)
class Order:
    """The batches of one process.

    Attributes:
        size: Examples in the dataset.
        batch_size: Examples per batch and process.
        seed: The run's.
        first, last: The batches of the run that are wanted, last exclusive.
        rank, world: This process among all.
        groups: Of every example the number of its group; None where any may be in one batch.
        together: Examples behind each other that are of one group, a multiple of `batch_size`; by default one batch of
            all processes.
    """

    size: int
    batch_size: int
    seed: int
    first: int
    last: int
    rank: int = 0
    world: int = 1
    groups: Sequence[int] | None = None
    together: int | None = None

    def __len__(self) -> int:
        return self.last - self.first

    def __iter__(self) -> Iterator[list[Draw]]:
        for number in range(self.first, self.last):
            start = (number * self.world + self.rank) * self.batch_size
            yield [self.draw(position) for position in range(start, start + self.batch_size)]

    def draw(self, position: int) -> Draw:
        """The example at a place of the endless sequence."""
        seed = derive_seed(self.seed, "draw", position)
        if self._grouped is None:
            return Draw(self._example(position, self.size), seed)
        number, place = divmod(position, self._grouped.batch_size)
        group, count = self._grouped.batch(number)
        members = self._grouped.members[group]
        position = count * self._grouped.batch_size + place
        return Draw(members[self._example(position, len(members), group)], seed)

    def _example(self, position: int, size: int, *group: int) -> int:
        epoch, place = divmod(position, size)
        key = (epoch, *group)
        if self._permutations.get(group, (None,))[0] != key:  # batches go forward: earlier epochs are not asked for
            self._permutations[group] = key, permutation(size, derive_seed(self.seed, "order", *key))
        return int(self._permutations[group][1][place])

    @functools.cached_property
    def _permutations(self) -> dict[tuple[int, ...], tuple[tuple[int, ...], np.ndarray]]:
        """Of each group that of the epoch which it is in."""
        return {}

    @functools.cached_property
    def _grouped(self) -> _Grouped | None:
        """None where all examples are of one group, so that the order is that of no groups."""
        if self.groups is None or len(set(self.groups)) < 2:
            return None
        return _Grouped(self.groups, self.together or self.batch_size * self.world, self.seed)


class _Grouped:
    """Which group a batch is of.

    In an epoch, group g of n examples gets floor(((epoch + 1) n + o) / batch) - floor((epoch n + o) / batch) batches,
    so that after any number of epochs it has had its share to less than one batch; o, which the seed decides, keeps
    small groups from having theirs all in the same epoch.

    Args:
        groups: Of every example the number of its group.
        batch: Examples in a batch.
        seed: The run's.
    """

    def __init__(self, groups: Sequence[int], batch: int, seed: int) -> None:
        self.size, self.batch_size, self.seed = len(groups), batch, seed
        self.members: dict[int, list[int]] = {group: [] for group in sorted(set(groups))}
        for example, group in enumerate(groups):
            self.members[group].append(example)
        self.offsets = {group: derive_seed(seed, "offset", group) % batch for group in self.members}
        self.epoch = functools.lru_cache(maxsize=4)(self._epoch)

    def before(self, epoch: int) -> Counter[int]:
        """How many batches each group has had when an epoch begins."""
        return Counter(
            {group: (epoch * len(m) + self.offsets[group]) // self.batch_size for group, m in self.members.items()}
        )

    def batch(self, number: int) -> tuple[int, int]:
        """The group of a batch of the run, and how many batches of that group were before it."""
        epoch = max(0, (number - len(self.members)) * self.batch_size // self.size)  # when surely no more had begun
        while self.before(epoch + 1).total() <= number:
            epoch += 1
        return self.epoch(epoch)[number - self.before(epoch).total()]

    def _epoch(self, epoch: int) -> list[tuple[int, int]]:
        """The batches of an epoch: which group, and the how manieth of it."""
        had, then = self.before(epoch), self.before(epoch + 1)
        groups = [group for group in self.members for _ in range(then[group] - had[group])]
        found = []
        for place in permutation(len(groups), derive_seed(self.seed, "groups", epoch)).tolist():
            found.append((groups[place], had[groups[place]]))
            had[groups[place]] += 1
        return found


def permutation(size: int, seed: int) -> np.ndarray:
    """The numbers below `size` in an order that the seed decides: int64, [size]."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed)).numpy()
