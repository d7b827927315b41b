"""Blocks whose frozen weights wait on the host, and are on the device only while the block computes.

Neither diffusers' group offloading nor accelerate's hooks train so: the first takes an adapter's parameters along and
leaves a block on the device where a recomputation ends early, the second puts other Parameters in their place. Here a
block that is swapped computes its activations again in the backward, so that nothing keeps its weights in between; the
weights do not change, and so are never copied back.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any

import torch
from accelerate.hooks import ModelHook
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from adapterkit.engine.recomputing import keeps_its_own
from adapterkit.training.blocks import swapped_blocks, weights_of
from adapterkit.training.needs import told
from adapterkit.training.task import Task

_RECOMPUTES = "gradient_checkpointing"
"""With this attribute a layer of transformers computes again inside its own forward, where no weights are by then."""


def placed(task: Task, model: Any, count: int, device: torch.device | None) -> BlockSwap:
    """Has the task bring its model to the device, without so many of its last blocks.

    Args:
        task: The task.
        model: What it has loaded.
        count: How many blocks wait.
        device: Where it computes; None where another brings it there, and no block waits.

    Raises:
        ConfigError: It has fewer.
    """
    if device is None:
        return BlockSwap(nn.Module(), (), torch.device("cpu"))
    if not count:
        task.place(model, device)
        return BlockSwap(nn.Module(), (), device)
    core = task.core(model)
    swap = BlockSwap(core, swapped_blocks(core, count), device)
    with swap.aside():
        task.place(model, device)
    return swap


class BlockSwap:
    """A context, in which blocks are swapped.

    Args:
        model: Computes on the device.
        blocks: Of it; their weights are on the host, as they were loaded.
        device: The device.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module], device: torch.device) -> None:
        weights = weights_of(model, blocks)
        self._guests = [_Guest(block, own, device) for block, own in zip(blocks, weights, strict=True)]

    @property
    def notes(self) -> list[str]:
        """What the user is told of it."""
        if not self._guests:
            return []
        size = told(sum(guest.bytes for guest in self._guests))
        return [f"block_swap: {size} of frozen weights in {len(self._guests)} blocks wait on the host"]

    def __enter__(self) -> BlockSwap:
        for guest in self._guests:
            guest.come()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for guest in self._guests:
            guest.go()

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """In which the model can be moved without the weights of these blocks."""
        for guest in self._guests:
            guest.clear()
        try:
            yield
        finally:
            for guest in self._guests:
                guest.leave()


class _Guest(ModelHook):
    """A block, which is hooked as accelerate does it: adapters know from there where it computes.

    Args:
        block: The block.
        weights: What is brought for each call, and let go.
        device: Where it computes.
    """

    offload = True

    def __init__(self, block: nn.Module, weights: Sequence[nn.Parameter], device: torch.device) -> None:
        self._block: Any = block
        self._read = contextlib.ExitStack()
        self.onload_device = device
        self._hosts = {p: _waiting(p.data, device) for p in weights if _is_plain(p)}
        self.bytes = sum(host.nbytes for host in self._hosts.values())

    def come(self) -> None:
        """Hooks the block."""
        self._before = self._block.__dict__.get("forward")
        self._own = self._block._old_forward = self._block.forward
        self._block._hf_hook, self._block.forward = self, self._forward
        self._recomputes = self._block.__dict__.get(_RECOMPUTES)
        if self._recomputes:
            setattr(self._block, _RECOMPUTES, False)
        self.leave()

    def go(self) -> None:
        """Leaves the block as it was, its weights on the host."""
        now = self._block._old_forward  # that of an adapter which is there by now
        for name in ("_hf_hook", "_old_forward", "forward"):
            delattr(self._block, name)
        if self._before is not None or now is not self._own:
            self._block.forward = now
        if self._recomputes:
            setattr(self._block, _RECOMPUTES, True)
        for parameter, host in self._hosts.items():
            parameter.data = host

    def clear(self) -> None:
        """Nothing stands where the weights were."""
        for parameter, host in self._hosts.items():
            parameter.data = host.new_empty(0)

    def leave(self) -> None:
        """The weights are on the host."""
        for parameter, host in self._hosts.items():
            parameter.data = _away(host)

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Brings the weights for those who read them without calling the block."""
        self._read.enter_context(self._brought())
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        """Lets them go."""
        self._read.close()
        return output

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        run = functools.partial(self._run, **kwargs)
        if torch.is_grad_enabled() and not keeps_its_own():
            return checkpoint(run, *args, use_reentrant=False)
        return run(*args)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            self._keep_what_trains()
        with self._brought():
            return self._block._old_forward(*args, **kwargs)

    def _keep_what_trains(self) -> None:
        """Parameters of the base that learn are on the device from now on."""
        for parameter in [p for p in self._hosts if p.requires_grad]:
            parameter.data = self._copy(self._hosts.pop(parameter))

    @contextlib.contextmanager
    def _brought(self) -> Iterator[None]:
        """In which copies on the device stand for the parameters: a backward keeps those, whatever is there by then."""
        elsewhere = {p: p.data for p in self._block.parameters() if self._is_stranded(p)} | self._hosts
        copies = {p: nn.Parameter(self._copy(data), requires_grad=False) for p, data in elsewhere.items()}
        places = [
            (module._parameters, name, parameter)
            for module in self._block.modules()
            for name, parameter in module._parameters.items()
            if parameter in copies
        ]
        try:
            for holder, name, parameter in places:
                holder[name] = copies[parameter]
            yield
        finally:
            for holder, name, parameter in places:
                holder[name] = parameter

    def _is_stranded(self, parameter: nn.Parameter) -> bool:
        """Whether another library has put it where it has found the weights."""
        trains = parameter.requires_grad and torch.is_grad_enabled()
        return parameter.device.type != self.onload_device.type and not trains

    def _copy(self, host: Tensor) -> Tensor:
        return host.to(self.onload_device, non_blocking=True, copy=True)


def _is_plain(parameter: nn.Parameter) -> bool:
    """Whether it is a tensor whose data can be exchanged, and no quantized one of a class of its own."""
    return type(parameter) is nn.Parameter and type(parameter.data) is Tensor


def _waiting(weight: Tensor, device: torch.device) -> Tensor:
    """A weight as it waits: in memory from which a GPU copies by itself."""
    here = weight.to("cpu")
    return here.pin_memory() if device.type == "cuda" else here


def _away(host: Tensor) -> Tensor:
    """What stands in a parameter while its block does not compute."""
    return host
