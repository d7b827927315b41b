"""What steps do without is on the device only while something needs it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from adapterkit.training.diffusion.waiting import Waiting

META, CPU = torch.device("meta"), torch.device("cpu")


class Moved(nn.Linear):
    """Notes where it is sent; its numbers stay where they are."""

    def __init__(self) -> None:
        super().__init__(1, 1)
        self.places: list[torch.device] = []

    def to(self, *args: torch.device) -> Moved:
        self.places.extend(args)
        return self


def test_modules_come_while_they_are_needed_and_leave_even_after_an_error():
    module = Moved()
    waiting = Waiting([module], META)
    assert module.places == [CPU]
    with waiting.here(), waiting.here():
        assert module.places == [CPU, META]
    assert module.places == [CPU, META, CPU]
    with pytest.raises(KeyError), waiting.here():
        raise KeyError
    assert module.places[3:] == [META, CPU]
