"""Training beside hooks that cast or move the data of parameters after each call (diffusers' layerwise casting).

What a backward has kept of a weight is the parameter, whose data is other by then. Inside a call of the model here, it
is the tensor that was computed with.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


def keep_data(root: nn.Module) -> None:
    """Called before a forward of a model: until it ends, what is kept for the backward is kept by its data."""
    if not torch.is_grad_enabled():
        return
    kept, thread = saved_tensors_hooks(Tensor.detach, _same), threading.get_ident()

    def leave(*_: Any) -> None:
        if threading.get_ident() == thread:
            handle.remove()
            kept.__exit__(None, None, None)

    handle = root.register_forward_hook(leave, always_call=True)
    kept.__enter__()


def _same(tensor: Tensor) -> Tensor:
    return tensor
