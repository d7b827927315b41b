"""How the keys and values of an attention that no family describes are reached: by what its forward calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import nn

from adapterkit.backend import AttentionSeam, Reach
from adapterkit.backends.called_attention import CalledAttentionSeam, calls_attention
from adapterkit.backends.called_attention import attend as attend_called
from adapterkit.backends.computed_attention import ComputedAttentionSeam
from adapterkit.backends.computed_attention import attend as attend_computed
from adapterkit.backends.forward_names import asks_attribute_of, mentions
from adapterkit.backends.transformers_attention import TransformersAttentionSeam
from adapterkit.errors import IncompatibleTargetError
from adapterkit.points import AttentionPoint

_INTERFACE = "ALL_ATTENTION_FUNCTIONS"
"""Where transformers' attentions look their function up."""


_FLEX = ("flex", "_native_flex")
"""What diffusers calls torch's flex attention among the backends of its attention."""


def attend(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What `module(*args, **kwargs)` computes, by whatever processor it has now, over extended keys and values."""
    return (attend_called if calls_attention(module) else attend_computed)(module, *args, **kwargs)


class ProcessorSeam(AttentionSeam):
    """Reaches attentions of diffusers, which hand their work to a processor that can be exchanged at any time."""

    forward: ClassVar[Callable[..., Any] | None] = staticmethod(attend)

    def refusal(self, module: nn.Module) -> str | None:
        processor = module.processor
        if getattr(processor, "_parallel_config", None) is not None:
            return "its sequence is split over several devices, and every one of them would put the same keys in front"
        if _is_of_blocks(processor):
            return "it attends by flex attention, to blocks of keys that its mask has counted"
        if calls_attention(module) or ComputedAttentionSeam().refusal(module) is None:
            return None
        name = f"{type(module).__name__} with the processor {type(processor).__name__}"
        return f"{name} has no softmax over keys that more keys could join"

    def attend_refusal(self, module: nn.Module) -> str | None:
        return self.refusal(module)


def _is_of_blocks(processor: Any) -> bool:
    """Whether a processor of diffusers attends by torch's flex attention: by its own choice, or as it was told."""
    told = getattr(processor, "_attention_backend", None)
    call = getattr(type(processor).__call__, "__code__", None)
    return getattr(told, "value", told) in _FLEX or (call is not None and "FLEX" in call.co_names)


def _seams(module: nn.Module) -> tuple[AttentionSeam, ...]:
    """Those that could reach a module that attends."""
    if hasattr(module, "processor"):
        return (ProcessorSeam(),)
    own = (CalledAttentionSeam(), ComputedAttentionSeam())
    looks_up = mentions(module, frozenset({_INTERFACE})) and not asks_attribute_of(module, _INTERFACE)
    return (TransformersAttentionSeam(), *own) if looks_up else own


def reach_of(module: nn.Module, point: AttentionPoint) -> Reach:
    """How adapters act at an attention point.

    Raises:
        IncompatibleTargetError: No seam reaches its keys and values, such as with the attention processor that it has.
    """
    for seam in _seams(module):
        if seam.attend_refusal(module) is None:
            return Reach(seam=seam)
    raise IncompatibleTargetError(f"no adapter can act at {point.id}: {refusal(module)}")


def refusal(module: nn.Module) -> str | None:
    """Why the keys and values of a module cannot be reached, or None: what the last seam says that could have."""
    reasons = [seam.attend_refusal(module) for seam in _seams(module)]
    return None if None in reasons else reasons[-1]
