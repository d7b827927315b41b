"""Which threads are inside a call of a model."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Iterator
from types import FrameType

from torch import nn

from adapterkit.engine.switch import Switch


def others_inside(roots: Iterable[nn.Module]) -> bool:
    """Whether another thread is inside a call of one of these models, or of a module in it.

    One that waits for weights to be changed (`Switch.held`) in its outermost call is not: it has not begun.
    Costs nothing in a forward: it looks at the stacks of the threads.
    """
    stacks = [stack for stack in map(_Stack, _others()) if stack.called]
    if not stacks:
        return False
    modules = {id(module) for root in roots for module in root.modules()}
    return any(len([one for one in stack.called if id(one) in modules]) > stack.waits for stack in stacks)


class _Stack:
    """The modules that a thread is calling, and whether it waits."""

    def __init__(self, frame: FrameType) -> None:
        self.called: list[nn.Module] = []
        self.waits = False
        for one in _outwards(frame):
            if one.f_code is nn.Module._call_impl.__code__:
                self.called.append(one.f_locals["self"])
            self.waits |= one.f_code is Switch.wait.__code__


def _others() -> list[FrameType]:
    own = threading.get_ident()
    return [frame for thread, frame in sys._current_frames().items() if thread != own]


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back
