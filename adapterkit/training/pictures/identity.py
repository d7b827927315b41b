"""Which model it was that computed something: a name that changes with any of its weights."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from adapterkit.training.pictures.store import key_of

_AT_ONCE = 1 << 22  # numbers that are summed
_WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PLACES = 65521


def identity_of(*modules: nn.Module) -> str:
    """The same for modules of the same classes, settings and weights, whatever device they are on.

    Weights are summed as whole numbers, times and without their places, where they lie: quickly, and in any order of
    adding alike.
    """
    return key_of(*((type(module).__qualname__, _settings(module), *_sums(module)) for module in modules))


def _settings(module: nn.Module) -> str:
    """What its config says, but for where it came from."""
    config: Any = getattr(module, "config", None) or {}
    values = dict(config.to_dict() if hasattr(config, "to_dict") else config)
    return json.dumps({k: v for k, v in values.items() if not k.startswith("_")}, sort_keys=True, default=repr)


@torch.no_grad()
def _sums(module: nn.Module) -> Iterator[tuple[str, str, tuple[int, ...], int, int]]:
    for name, tensor in itertools.chain(module.named_parameters(), module.named_buffers()):
        plain, weighted = _sum(tensor.detach())
        yield name, str(tensor.dtype), tuple(tensor.shape), plain, weighted


def _sum(tensor: Tensor) -> tuple[int, int]:
    if not tensor.numel():
        return 0, 0
    plain, weighted = tensor.new_zeros((), dtype=torch.int64), tensor.new_zeros((), dtype=torch.int64)
    whole = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    for part in whole.contiguous().view(_WHOLE[whole.element_size()]).flatten().split(_AT_ONCE):
        numbers = part.long()
        plain += numbers.sum()
        weighted += (numbers * (torch.arange(len(numbers), device=numbers.device) % _PLACES + 1)).sum()
        weighted *= 31  # so that parts cannot change places
    return int(plain), int(weighted)
