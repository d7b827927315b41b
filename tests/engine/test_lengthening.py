"""What stands behind a sequence, and which rows see it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from adapterkit.contract.abilities import Abilities
from adapterkit.engine.context import no_side
from adapterkit.engine.lengthening import gathered, with_behind
from adapterkit.engine.switch import Switch
from adapterkit.errors import AttachError
from adapterkit.kernels.batches import Batch, Share

TOKENS = torch.randn(2, 3, 4)


def prompt(length: int) -> Any:
    values = torch.randn(length, 4)
    return SimpleNamespace(abilities=Abilities(), lengthen=lambda tokens: values)


def share(*values: float) -> Share:
    return Share(torch.tensor(values, dtype=torch.float64), Batch(len(values)))


def test_each_row_sees_its_own() -> None:
    one, other = prompt(2), prompt(1)
    added, visible = gathered([(one, share(1, 0)), (other, share(0, 0.5)), (one, share(0, 0))], no_side, TOKENS)
    expected = torch.cat([one.lengthen(TOKENS), other.lengthen(TOKENS)]).expand(2, -1, -1)
    assert torch.equal(added, expected)
    assert visible is not None
    assert visible.tolist() == [[True, True, False], [False, False, True]]


def test_what_all_rows_have_needs_no_mask() -> None:
    added, visible = gathered([(prompt(2), 1.0), (prompt(1), 0.5)], no_side, TOKENS)
    assert added.shape == (2, 3, 4)
    assert visible is None


@pytest.mark.parametrize("given", [torch.ones(2, 3), (TOKENS,)])
def test_what_is_no_sequence_is_told(given: Any) -> None:
    with pytest.raises(AttachError, match=r"expected to be made longer, but there is (a tensor \(2, 3\)|tuple)"):
        with_behind(lambda: given, lambda tokens: (tokens, None), (), {})


def test_what_was_never_made_longer_has_no_length() -> None:
    assert Switch().lengths("p") == (0, 0)
