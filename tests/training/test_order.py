from __future__ import annotations

import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adapterkit.training.order import Draw, Order, derive_seed
from adapterkit.training.rates import factor
from tests.training.toy_task import toy_run


def flat(order: Order) -> list[Draw]:
    return [draw for batch in order for draw in batch]


def test_every_example_is_drawn_once_before_any_is_drawn_again():
    draws = flat(Order(size=7, batch_size=3, seed=1, first=0, last=14))
    indices = [draw.index for draw in draws]
    assert len(indices) == 42
    epochs = [indices[start : start + 7] for start in range(0, 42, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert len({draw.seed for draw in draws}) == 42


@given(st.integers(1, 9), st.integers(1, 4), st.integers(0, 20), st.integers(0, 20))
def test_an_order_that_starts_later_is_the_rest_of_the_whole(size: int, batch: int, first: int, more: int):
    whole = list(Order(size, batch, 5, 0, first + more))
    assert list(Order(size, batch, 5, first, first + more)) == whole[first:]


def test_the_processes_share_the_batches_of_one():
    alone = flat(Order(size=5, batch_size=6, seed=2, first=0, last=4))
    together = [list(Order(5, 3, 2, 0, 4, rank=rank, world=2)) for rank in range(2)]
    assert [draw for pair in zip(*together, strict=True) for batch in pair for draw in batch] == alone


GROUPS = [0] * 7 + [1] * 2 + [2] * 4 + [1]


def test_a_batch_of_all_processes_is_of_one_group_and_every_group_gets_its_share():
    order = Order(size=14, batch_size=4, seed=3, first=0, last=140, groups=GROUPS)
    batches = [[draw.index for draw in batch] for batch in order]
    assert all(len({GROUPS[index] for index in batch}) == 1 for batch in batches)
    counts = Counter(index for batch in batches for index in batch)
    assert all(abs(count - 40) <= 2 for count in counts.values())  # 140 batches of 4 are 40 times 14
    for group in set(GROUPS):
        seen = [index for batch in batches for index in batch if GROUPS[index] == group]
        size = GROUPS.count(group)
        whole = [sorted(seen[start : start + size]) for start in range(0, len(seen) - size + 1, size)]
        assert whole == [[index for index in range(14) if GROUPS[index] == group]] * len(whole)
    assert len({draw.seed for batch in order for draw in batch}) == 560
    kinds = [GROUPS[batch[0]] for batch in batches]
    assert len({tuple(kinds[start : start + 7]) for start in range(0, 140, 7)}) > 4


@given(st.lists(st.integers(0, 4), min_size=1, max_size=12), st.integers(1, 9), st.integers(0, 60), st.integers(0, 9))
def test_an_order_of_groups_that_starts_later_is_the_rest_of_the_whole(
    groups: list[int], batch: int, first: int, more: int
):
    whole = list(Order(len(groups), batch, 5, 0, first + more, groups=groups))
    assert list(Order(len(groups), batch, 5, first, first + more, groups=groups)) == whole[first:]


def test_the_processes_share_the_batches_of_a_group():
    alone = flat(Order(size=14, batch_size=6, seed=2, first=0, last=9, groups=GROUPS))
    together = [list(Order(14, 3, 2, 0, 9, rank=rank, world=2, groups=GROUPS)) for rank in range(2)]
    assert [draw for pair in zip(*together, strict=True) for batch in pair for draw in batch] == alone


def test_one_group_is_as_good_as_none():
    assert flat(Order(5, 2, 1, 0, 9, groups=[3] * 5)) == flat(Order(5, 2, 1, 0, 9))


def test_another_seed_is_another_order():
    one, other = (flat(Order(50, 50, seed, 0, 1)) for seed in (1, 2))
    assert [d.index for d in one] != [d.index for d in other]


def test_seeds_are_the_same_in_every_process_and_on_every_machine():
    assert derive_seed(0, "order", 0) == 4819849257279361181
    assert derive_seed(1, 23) != derive_seed(12, 3)
    assert 0 <= derive_seed("x") < 2**63


def test_a_draws_generator_starts_afresh():
    draw = Draw(0, 123)
    assert torch.equal(torch.rand(3, generator=draw.generator()), torch.rand(3, generator=draw.generator()))


@pytest.mark.parametrize(
    ("scheduler", "share"),
    [
        ("constant", lambda done: 1.0),
        ("linear", lambda done: 1 - done),
        ("cosine", lambda done: (1 + math.cos(math.pi * done)) / 2),
    ],
)
def test_the_rate_rises_and_then_follows_its_schedule(scheduler: str, share):
    run = toy_run(Path("out"), scheduler=scheduler, warmup_steps=4, steps=14)
    factors = [factor(run, step) for step in range(14)]
    assert factors[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert factors[4:] == pytest.approx([share(step / 10) for step in range(10)])
    assert factor(toy_run(Path("out"), scheduler=scheduler, warmup_steps=50, steps=10), 9) > 0


class Refusing:
    def __len__(self) -> int:
        return 4

    def __getitem__(self, draw: Draw) -> int:
        raise ValueError("this one cannot be read")


def test_an_error_in_a_process_that_reads_ends_the_program():
    program = (
        "from adapterkit.training.order import Order\n"
        "from adapterkit.training.reading_processes import read_batches\n"
        "from tests.training.test_order import Refusing\n"
        "order = Order(size=4, batch_size=1, seed=0, first=0, last=4)\n"
        "kept = iter(read_batches(Refusing(), order, list, 1))\n"
        "next(kept)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "this one cannot be read" in done.stderr
