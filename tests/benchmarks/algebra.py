"""Low-rank algebra beside what other tools do: a full SVD of the dense product, and PEFT's `svd` combination.

The bars, on two cores: recompressing 200 times quicker with an error within 1e-5 of the best, combining 50 times
quicker with no larger error, extracting 20 times quicker with an error within 2 % of the best.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import peft
import torch
from torch import Tensor, nn

from adapterkit.checkpoint import Checkpoint
from adapterkit.contract.factors import Factors
from adapterkit.kernels import low_rank, low_rank_algebra
from adapterkit.points import WeightLayout
from adapterkit.tools.combine import Share, combine
from adapterkit.tools.effects import effects
from adapterkit.tools.ranks import RankRule
from tests.benchmarks.measure import Side, Timing, measure

_FEW = 3  # rounds: a full SVD takes seconds
_SIZE, _WIDE, _RANK = 2048, 1024, 16
_WEIGHTS = (0.7, -0.5, 1.0, 0.3)


def recompressing(rounds: int) -> Mapping[str, Timing]:
    """An update of rank 64 at 2048 x 2048 to rank 16; the peers' way is a full SVD. The bar is 1 / 200."""
    torch.manual_seed(0)
    factors = Factors(torch.randn(64, _SIZE), torch.randn(_SIZE, 64), WeightLayout("linear"), 0.5)
    dense = low_rank.dense(factors)
    ours, theirs = low_rank.dense(low_rank_algebra.recompressed(factors, _RANK)), _best(dense)
    norm = float(dense.norm())
    assert float((ours - dense).norm()) / norm <= float((theirs - dense).norm()) / norm + 1e-5
    sides = {
        "adapterkit": Side(lambda _: low_rank_algebra.recompressed(factors, _RANK)),
        "full SVD": Side(lambda _: _best(low_rank.dense(factors))),
    }
    return measure(sides, min(rounds, _FEW), warmup=1)


def _best(matrix: Tensor) -> Tensor:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :_RANK] * s[:_RANK]) @ vh[:_RANK]


def extracting(rounds: int) -> Mapping[str, Timing]:
    """Rank 16 of a dense difference at 2048 x 2048, with a tail; the peers' way is a full SVD. The bar is 1 / 20."""
    torch.manual_seed(0)
    matrix = torch.randn(_SIZE, 48) @ torch.randn(48, _SIZE) / 48 + torch.randn(_SIZE, _SIZE) / 10
    best = float((_best(matrix) - matrix).norm())
    assert low_rank_algebra.residual(matrix, low_rank_algebra.truncated(matrix, _RANK)) <= 1.02 * best
    sides = {
        "adapterkit": Side(lambda _: low_rank_algebra.truncated(matrix, _RANK)),
        "full SVD": Side(lambda _: _best(matrix)),
    }
    return measure(sides, min(rounds, _FEW), warmup=1)


def combining(rounds: int) -> Mapping[str, Timing]:
    """A weighted sum of 4 adapters of rank 16 on two layers of 1024 x 1024, at rank 16. The bar is 1 / 50."""
    torch.manual_seed(0)
    theirs, shares = _four()
    exact = [sum(w * d for w, d in zip(_WEIGHTS, layer, strict=True)) for layer in _dense(shares)]

    def ours(_: object) -> Checkpoint:
        return combine(shares, rule=RankRule(rank=_RANK)).checkpoint

    def add(name: str) -> None:
        theirs.add_weighted_adapter([*"abcd"], [*_WEIGHTS], name, combination_type="svd", svd_rank=_RANK)

    add("both")
    layers = [module for module in theirs.modules() if isinstance(module, peft.tuners.lora.Linear)]
    deltas = [layer.get_delta_weight("both") for layer in layers]
    errors = [
        math.hypot(*(float((one - other).norm()) for one, other in zip(found, exact, strict=True)))
        for found in ([one for [one] in _dense([Share(ours(None))])], deltas)
    ]
    assert errors[0] <= errors[1] * (1 + 1e-5), f"{errors[0]} is more than PEFT's {errors[1]}"
    theirs.delete_adapter("both")
    sides = {
        "adapterkit": Side(ours),
        "peft": Side(lambda _: add("both"), after=lambda _: theirs.delete_adapter("both")),
    }
    return measure(sides, min(rounds, _FEW), warmup=1)


def _four() -> tuple[Any, list[Share]]:
    """The same four adapters in PEFT's model, and as checkpoints."""
    base = nn.Sequential(nn.Linear(_WIDE, _WIDE, bias=False), nn.Linear(_WIDE, _WIDE, bias=False))
    config = peft.LoraConfig(r=_RANK, lora_alpha=8, target_modules=["0", "1"])
    model: Any = None
    shares: list[Share] = []
    for name in "abcd":
        if model is None:
            model = peft.get_peft_model(base, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        tensors: dict[str, dict[str, Tensor]] = {}
        for key, layer in enumerate(model.base_model.model):
            a, b = (getattr(layer, f"lora_{factor}")[name].weight.detach() for factor in "AB")
            tensors[f"linear@model.{key}"] = {"A": a.normal_() / 32, "B": b.normal_() / 32}
            a.copy_(tensors[f"linear@model.{key}"]["A"])
            b.copy_(tensors[f"linear@model.{key}"]["B"])
        shares.append(Share(Checkpoint.of("lora", {"rank": _RANK, "alpha": 8.0}, tensors)))
    return model, [Share(share.checkpoint, w) for share, w in zip(shares, _WEIGHTS, strict=True)]


def _dense(shares: list[Share]) -> list[list[Tensor]]:
    """Layer by layer, what each adapter adds, without its weight."""
    each = [[effect.dense for effect in effects(share.checkpoint)] for share in shares]
    return [[*layer] for layer in zip(*each, strict=True)]
