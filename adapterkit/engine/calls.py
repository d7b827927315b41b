"""Which threads are inside a call of a model."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Iterator
from types import FrameType

from torch import nn


def others_inside(roots: Iterable[nn.Module]) -> bool:
    """Whether another thread is inside a call of one of these models, or of a module in it.

    Costs nothing in a forward: it looks at the stacks of the threads.
    """
    called = [module for frame in _other_stacks() for module in _called(frame)]
    return bool(called) and not {id(module) for module in called}.isdisjoint(
        id(module) for root in roots for module in root.modules()
    )


def _other_stacks() -> Iterator[FrameType]:
    own = threading.get_ident()
    return (frame for thread, frame in sys._current_frames().items() if thread != own)


def _called(frame: FrameType | None) -> Iterator[nn.Module]:
    while frame is not None:
        if frame.f_code is nn.Module._call_impl.__code__:
            yield frame.f_locals["self"]
        frame = frame.f_back
