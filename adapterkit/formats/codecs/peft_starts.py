"""Starts of LoRA that PEFT takes out of the base again whenever it loads a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adapterkit.contract.codec import Context, Place
from adapterkit.errors import UnsupportedFileError
from adapterkit.formats.codecs.peft_base import whole_base

_FROM_DATA = ("corda", "loftq")


def started(
    config: dict[str, Any], tensors: dict[str, Tensor], scale: float, place: Place, context: Context
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and the tensors, with the start as A0 and B0 where the file is meant for what it leaves of the base.

    Raises:
        UnsupportedFileError: The start is made of what no file has: data, or a quantized base.
    """
    init = context.config.get("init_lora_weights")
    name = init.lower() if isinstance(init, str) else ""
    if name in _FROM_DATA:
        told = f"init_lora_weights={init!r} has changed the base by what is not in the file"
        mend = "save it with path_initial_model_for_weight_conversion"
        raise UnsupportedFileError(f"{told}; {mend}", context.where, "init_lora_weights")
    if name == "lora_ga":
        context.note(
            "init_lora_weights='lora_ga': read for the base itself, as PEFT does, and not for the one it changed"
        )
    if not name.startswith("pissa") and name != "olora":
        return config, tensors
    if place.model is None:
        context.note(f"init_lora_weights={init!r}: what it leaves of the base is not known without a model")
        return config, tensors
    if "_niter_" in name:
        context.note(f"init_lora_weights={init!r}: PEFT finds its start by chance; the exact one is read")
    a, b = _start(place, config["rank"], scale, name, context)
    own = {**tensors, "A0": place.of_columns(a).contiguous(), "B0": place.of_rows(b).contiguous()}
    if config["rank"] <= min(place.point.shape):
        return {**config, "init": "olora" if name == "olora" else "pissa"}, own
    joined = {"A": torch.cat([own["A"], own["A0"]]), "B": torch.cat([own["B"], -own["B0"]], dim=1)}
    twice = {"rank": 2 * config["rank"], "alpha": 2 * scale * config["rank"], "scaling": "standard", "init": "default"}
    return {**config, **twice}, {**_without(own), **joined}


def _without(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name not in ("A0", "B0")}


def _start(place: Place, rank: int, scale: float, name: str, context: Context) -> tuple[Tensor, Tensor]:
    """A0 and B0 of the whole layer: its principal part, or its first QR factors."""
    if len(place.shape) != 2:
        told = f"init_lora_weights={name!r} is of matrices, and {place.point.path} is none"
        raise UnsupportedFileError(told, context.where, "init_lora_weights")
    weight = whole_base(place, context.where)[0].double()  # near singular values mix in fewer bits
    if name == "olora":
        q, r = torch.linalg.qr(weight)
        return r[:rank].float(), q[:, :rank].float()
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    root = (s[:rank] / scale).sqrt()
    return (root[:, None] * vh[:rank]).float(), (u[:, :rank] * root).float()
