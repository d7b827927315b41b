"""What must hold for every model, whatever its layout: shared by the vision and the diffusion tests."""

from __future__ import annotations

import copy
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.backend import Backend

Run = Callable[[Any], Tensor]


def unmapped(backend: Backend, model: nn.Module) -> list[str]:
    """Layers with a weight that are neither a point nor on the backend's ignore list."""
    mapped = {point.path for point in backend.points(model, "x") if point.kind == "weight"}
    layers = [name for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d, nn.Embedding))]
    ignored = backend.ignored  # type: ignore[attr-defined]
    return [name for name in layers if name not in mapped and not any(fnmatchcase(name, glob) for glob in ignored)]


def randomise(adapters: ak.Adapters, name: str = "a", scale: float = 0.3) -> None:
    """Values under which every parameter has an effect (a fresh adapter has none)."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in adapters.parameters(name):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def with_unlike_norms(model: nn.Module) -> nn.Module:
    """The model with norms that can be told apart; freshly made, all are alike."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.normal_(module.weight, mean=1.0, std=0.5)
            nn.init.normal_(module.bias)
    return model


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that detaching has to restore."""
    return {
        "state": {key: value.clone() for key, value in model.state_dict().items()},
        "modules": [(name, type(module), sorted(module.__dict__)) for name, module in model.named_modules()],
        "grads": [(name, p.requires_grad) for name, p in model.named_parameters()],
        "hooks": [(name, len(module._forward_pre_hooks)) for name, module in model.named_modules()],
        "owned": [id(getattr(m, held, None)) for m in model.modules() for held in ("processor", "config")],
    }


def assert_restored(model: nn.Module, before: dict[str, Any]) -> None:
    after = snapshot(model)
    assert list(after["state"]) == list(before["state"])
    assert all(torch.equal(after["state"][key], value) for key, value in before["state"].items())
    for part in ("modules", "grads", "hooks", "owned"):
        assert after[part] == before[part]


def check_adapter(model: nn.Module, run: Run, config: ak.AdapterConfig, *, silent: tuple[str, ...] = ()) -> None:
    """Acts, trains all its parameters and nothing else, and leaves without a trace.

    Args:
        silent: Endings of parameters that get no gradient from this model's output (an unused pooler).
    """
    before, base = snapshot(model), run(model)
    adapters = ak.Adapters(model)
    adapters.add("a", config)
    randomise(adapters)
    adapted = run(model)
    assert not torch.allclose(adapted, base)
    loss(adapted).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not name.endswith(silent or "\0"):
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name
    assert not any(p.requires_grad for n, p in model.named_parameters() if "adapterkit" not in n.split("."))
    assert list(before["state"]) == [key for key in model.state_dict() if "adapterkit" not in key.split(".")]
    with adapters.disabled():
        assert torch.equal(run(model), base)
    adapters.detach()
    assert torch.equal(run(model), base)
    assert_restored(model, before)


def check_merge(model: nn.Module, run: Run, tolerance: float) -> None:
    """LoRA at every weight: merged equals unmerged, relative to the largest output; unmerged bits come back."""
    adapters = ak.Adapters(model)
    adapters.add("a", ak.LoRA(rank=2, alpha=3.0, targets="*"), dtype=torch.float64 if tolerance < 1e-8 else None)
    randomise(adapters, scale=0.1)
    with torch.no_grad():
        base, adapted = run_base(adapters, model, run), run(model)
        with adapters.merged():
            assert (run(model) - adapted).abs().max() <= tolerance * adapted.abs().max()
        assert torch.equal(run(model), adapted)
        adapters.detach()
        assert torch.equal(run(model), base)


def loss(output: Tensor) -> Tensor:
    """Every element counts differently; a plain sum of squares is blind to what comes out of a norm."""
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(13))
    return (output * weights.to(output.dtype)).sum()


def run_base(adapters: ak.Adapters, model: nn.Module, run: Run) -> Tensor:
    with adapters.disabled():
        return run(model)


def check_checkpointing(
    model: nn.Module, run: Run, switch: Callable[[nn.Module], None], config: ak.AdapterConfig
) -> None:
    """Gradient checkpointing changes no gradient."""
    gradients = []
    for checkpointed in (False, True):
        twin = copy.deepcopy(model).train()
        if checkpointed:
            switch(twin)
        adapters = ak.Adapters(twin)
        adapters.add("a", config)
        randomise(adapters)
        loss(run(twin)).backward()
        gradients.append([p.grad for p in adapters.parameters("a")])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.allclose(plain, recomputed, rtol=1e-5, atol=1e-8)


def soft(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """Attention by its definition; `mask` is additive."""
    scores = query @ key.mT * scale
    return F.softmax(scores if mask is None else scores + mask, dim=-1) @ value


def prefixed(module: Any, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [batch, heads, length, width] behind those of a Prefix module."""
    batch = keys.shape[0]
    front = [p.expand(batch, -1, -1, -1) for p in (module.keys, module.values)]
    return torch.cat([front[0], keys], dim=2), torch.cat([front[1], values], dim=2)
