"""A base that no process holds as a whole: its frozen blocks are spread over the processes, by FSDP2 of torch.

What trains is small, and every process has all of it: gradients, optimizer, checkpoints and files are those of a run
that spreads nothing.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from adapterkit.engine.slots import Slots
from adapterkit.errors import ConfigError
from adapterkit.training.config import RunConfig
from adapterkit.training.needs import told

_UNFIT = {
    "block_swap": "block_swap: a base that is spread over processes is on their devices; set it to 0",
    "torch_compile": "torch_compile: a base that is spread over processes is not compiled; set it to false",
}
"""Keys of a run that do not go with it."""


def asked_by_launcher() -> bool:
    """Whether `accelerate launch`, or its config file, asks for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


class Sharding:
    """Spreads bases.

    Args:
        accelerator: What computes.
        plugin: What accelerate was told.

    Raises:
        ConfigError: That is not done here.
    """

    def __init__(self, accelerator: Accelerator, plugin: FullyShardedDataParallelPlugin) -> None:
        if unfit := list(_unfit(plugin)):
            raise ConfigError(unfit, "accelerate launch")
        self._processes, self._device, self._plugin = accelerator.num_processes, accelerator.device, plugin

    @classmethod
    def of(cls, config: RunConfig, accelerator: Accelerator) -> Sharding | None:
        """What the run or its launcher asks for; None where neither does, or where one process has all."""
        asked = asked_by_launcher()
        if accelerator.num_processes == 1 or not (config.shard or asked):
            return None
        if unfit := [sentence for key, sentence in _UNFIT.items() if getattr(config, key)]:
            raise ConfigError(unfit, "run")
        plugin = FullyShardedDataParallelPlugin() if asked else FullyShardedDataParallelPlugin(fsdp_version=2)
        return cls(accelerator, plugin)

    def spread(self, parts: Mapping[str, nn.Module]) -> str:
        """Spreads the blocks of modules, which stay the modules that they are; tells what this process keeps of them.

        Args:
            parts: By name, on the CPU, with their adapters.

        Raises:
            ConfigError: One has no blocks, or weights that cannot be spread.
        """
        mesh = init_device_mesh(self._device.type, (self._processes,))
        lines = []
        for name, part in parts.items():
            units, whole = list(self._units(part)), sum(p.nbytes for p in part.parameters())
            for unit in units:
                self._send(unit)
                reshard = bool(self._plugin.reshard_after_forward)
                fully_shard(unit, mesh=mesh, reshard_after_forward=reshard, ignored_params=kept_whole(part, unit))
            self._send(part)
            if not any(isinstance(p, DTensor) for p in part.parameters()):
                raise ConfigError([f"shard: {name}, a {type(part).__name__}, has no blocks that can be spread"], "run")
            fully_shard(part, mesh=mesh, ignored_params={*part.parameters()})  # which orders what the units do
            here = sum((p.to_local() if isinstance(p, DTensor) else p).nbytes for p in part.parameters())
            lines.append(f"{name}, in {len(units)} units, {told(here)} of {told(whole)} here")
        return f"spread over {self._processes} processes: {'; '.join(lines)}"

    def _units(self, part: nn.Module) -> Iterator[nn.Module]:
        """What is gathered at a time: the classes that accelerate was told, or what the outermost lists hold."""
        names = self._plugin.transformer_cls_names_to_wrap
        if names:
            return (module for module in part.modules() if type(module).__name__ in names and module is not part)
        return units_of(part)

    @torch.no_grad()
    def _send(self, module: nn.Module) -> None:
        """Gives all processes the values of the first, where the others have not read them from the disk."""
        if not self._plugin.cpu_ram_efficient_loading:
            return
        made: dict[int, torch.Tensor] = {}
        for owner in module.modules():
            for tensors in (owner._parameters, owner._buffers):
                for name, tensor in tensors.items():
                    if tensor is None or hasattr(tensor, "device_mesh"):
                        continue  # a block, which has been sent before
                    if id(tensor) not in made:
                        made[id(tensor)] = self._sent(tensor)
                    setattr(owner, name, made[id(tensor)])

    def _sent(self, tensor: torch.Tensor) -> torch.Tensor:
        there = torch.empty_like(tensor, device=self._device) if tensor.is_meta else tensor.detach().to(self._device)
        dist.broadcast(there, src=0)
        return nn.Parameter(there, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else there


def units_of(module: nn.Module) -> Iterator[nn.Module]:
    """The modules with parameters that the outermost lists of a module hold."""
    for child in module.children():
        if isinstance(child, nn.ModuleList | nn.Sequential):
            for one in child:
                if isinstance(one, nn.ModuleList | nn.Sequential):
                    yield from units_of(nn.ModuleList([one]))
                elif any(True for _ in one.parameters()):
                    yield one
        else:
            yield from units_of(child)


def kept_whole(part: nn.Module, block: nn.Module) -> set[nn.Parameter]:
    """The parameters of a block that every process has: what trains, is an adapter's, or is elsewhere too."""
    uses = Counter(parameter for _, parameter in part.named_parameters(remove_duplicate=False))
    own = Counter(parameter for _, parameter in block.named_parameters(remove_duplicate=False))
    adapters = {p for module in block.modules() if isinstance(module, Slots) for p in module.parameters()}
    return {p for p in own if p.requires_grad or p in adapters or uses[p] > own[p] or not p.ndim}


def _unfit(plugin: FullyShardedDataParallelPlugin) -> Iterator[str]:
    """What accelerate was told and is not done here."""
    if plugin.fsdp_version != 2:
        yield "fsdp_version: version 1 flattens the parameters; say --fsdp_version 2 (fsdp_version: 2 in its file)"
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        yield "fsdp_offload_params: a spread base stays on its devices; set it to false"
    if plugin.activation_checkpointing:
        yield "fsdp_activation_checkpointing: set it to false, and gradient_checkpointing=true in the run"
