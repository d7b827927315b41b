"""Activations that are computed twice: the second time, in the backward, with what acted the first time.

`torch.utils.checkpoint` without reentrance keeps a record of each part of a forward that it will run again. It has no
public way to it but `context_fn`, which whoever calls it must give, and libraries' models do not. The record is found
through the hooks that it puts around the tensors that the part saves; where torch keeps it in another way, nothing is
done, and `Adapters.recompute_context` is the way.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
import torch.utils.checkpoint
from torch import nn

from adapterkit.engine.switch import Switch

_RECORD = getattr(torch.utils.checkpoint, "_CheckpointFrame", None)


class _Recalled:
    """What is run again, in a block of what acted."""

    def __init__(self, run: Callable[..., Any], switch: Switch) -> None:
        self._run, self._switch = run, switch
        self._selection, self._context = switch.current, switch.scopes.view.context

    def __call__(self, *args: Any) -> Any:
        with self._switch.scopes.entered(self._selection, self._context):
            return self._run(*args)


def remembered(
    switch: Switch,
    call: Callable[..., Any] | None,
    module: nn.Module,
    forward: Callable[..., Any],
    args: Any,
    kwargs: Any,
) -> Any:
    """A call of an adapted module that may be run again in a backward, when something else acts."""
    if torch.is_grad_enabled():
        remember(switch)
    return forward(*args, **kwargs) if call is None else call(module, forward, args, kwargs)


def remember(switch: Switch) -> None:
    """Lets the part of a forward that runs now, where it is to be run again, find what acts now."""
    hooks = _hooks()
    record = None if hooks is None else _record(hooks[1])
    if record is not None and not isinstance(record.recompute_fn, _Recalled):
        record.recompute_fn = _Recalled(record.recompute_fn, switch)


def keeps_its_own() -> bool:
    """Whether somebody says how tensors are kept for the backward now, such as a part of a forward that runs again."""
    return _hooks() is not None


def _hooks() -> Any:
    return torch._C._autograd._top_saved_tensors_default_hooks(False)  # pyright: ignore[reportAttributeAccessIssue]


def _record(unpack: Any) -> Any:
    """The record that a hook of torch's belongs to."""
    if _RECORD is None or not isinstance(unpack, FunctionType):
        return None
    contents = (cell.cell_contents for cell in unpack.__closure__ or ())
    return next((one for one in contents if isinstance(one, _RECORD)), None)
