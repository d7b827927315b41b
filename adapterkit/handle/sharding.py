"""Models whose parameters are spread over processes."""

from __future__ import annotations

from collections.abc import Iterable

import torch.distributed as dist
from torch import Tensor, nn


def put_away(roots: Iterable[nn.Module]) -> None:
    """Lets fully_shard put away what it has gathered for a forward: values that are put there would be lost."""
    if not dist.is_available() or not dist.is_initialized():
        return
    from torch.distributed.fsdp import FSDPModule  # imports much, and there is nothing to do without processes

    for root in roots:
        for module in root.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def gathered(tensor: Tensor) -> Tensor:
    """A tensor as a whole: of one that fully_shard has spread every process has a part, and all of them must ask."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # pyright: ignore
