"""What the tests of bad files share: a model that carries an adapter, and all that must hold when a load is refused."""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import adapterkit as ak
from adapterkit.errors import AdapterKitError, CheckpointError, printable
from adapterkit.formats import registry
from adapterkit.plugins import get_plugin_manager
from adapterkit.testing import toys

SECONDS, BYTES = 2.0, 64 << 20
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")


def with_adapter(model: nn.Module) -> ak.Adapters:
    """A handle on the model, which carries the adapter `good` with numbers of its own."""
    toys.register()
    adapters = ak.Adapters(model)
    adapters.add("good", ak.LoRA(rank=2, targets="attn.{q,k,v,o} mlp.*"))
    with torch.no_grad():
        for number, parameter in enumerate(adapters.parameters("good")):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    return adapters


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that a load could change, comparable with ==. Tensors by identity and as bytes."""
    return {name: (_module(module), _tensors(module)) for name, module in model.named_modules()}


def _module(module: nn.Module) -> list[Any]:
    hooks = [len(getattr(module, hook)) for hook in _HOOKS]
    return [type(module), id(module), module.training, sorted(module.__dict__), hooks]


def _tensors(module: nn.Module) -> list[Any]:
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return [(key, id(t), t.requires_grad, t.dtype, t.detach().numpy().tobytes()) for key, t in own]


class Refusal:
    """Loads bad files into one model.

    Args:
        adapters: A handle on the model, which carries one adapter, `good`.
        model: The model.
    """

    def __init__(self, adapters: ak.Adapters, model: nn.Module) -> None:
        self.adapters, self.model = adapters, model
        for name in get_plugin_manager().formats():  # what they import is not the file's doing
            registry.named_format(name)

    def __call__(self, path: Path, expected: Any, **options: Any) -> Any:
        """The error, after everything else that must hold was checked."""
        before, active, randoms = snapshot(self.model), self.adapters.active, torch.get_rng_state()
        modules, start, memory = set(sys.modules), time.process_time(), _memory(reset=True)
        with pytest.raises(expected) as caught:
            self.adapters.load(path, "new", **options)
        seconds, grown = time.process_time() - start, _memory() - memory  # of work, for the machine may be busy
        assert snapshot(self.model) == before
        assert (list(self.adapters), self.adapters.active) == (["good"], active)
        assert torch.equal(torch.get_rng_state(), randoms)
        assert not {m for m in set(sys.modules) - modules if not m.startswith(("adapterkit", "torch", "safetensors"))}
        _check_message(caught.value, path)
        assert seconds < SECONDS
        assert grown < BYTES
        return caught.value


def _check_message(error: AdapterKitError, path: Path) -> None:
    assert isinstance(error, CheckpointError)
    assert isinstance(error.path, Path)
    assert error.path == path or path in error.path.parents  # of a folder, the file in it
    assert printable(str(error.path)) in str(error)
    assert len(str(error)) < 1500


def _memory(*, reset: bool = False) -> int:
    """Bytes: the peak of the process's memory since the last reset."""
    if reset:
        with contextlib.suppress(OSError):  # without it the peak so far counts, which is less strict
            Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) << 10
