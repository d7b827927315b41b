"""Everything in float64: what models compute in float32 on purpose, too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_LOW: Final = (torch.float32, torch.bfloat16, torch.float16)


class InFloat64(TorchFunctionMode):
    """Within it, whatever asks for a lower precision gets float64.

    Models turn routers, norms, softmax and angles to float32; a specimen in float64 then crashes at the first product
    with a weight, or is equal only to seven digits where a proof wants fourteen.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a function of torch with float64 for each lower precision among its arguments."""
        if func is Tensor.float:
            func = Tensor.double
        named = {name: _high(value) for name, value in (kwargs or {}).items()}
        if func is torch.full and any(isinstance(value, float) for value in (*args, *named.values())):
            named.setdefault("dtype", torch.float64)  # the least number of float64 is none of float32
        return func(*map(_high, args), **named)


def _high(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value in _LOW else value
