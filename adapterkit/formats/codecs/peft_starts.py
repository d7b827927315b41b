"""Starts of LoRA that PEFT takes out of the base again whenever it loads a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from adapterkit.codec import Context, Place
from adapterkit.errors import UnsupportedFileError

_FROM_DATA = {"corda", "lora_ga", "loftq"}


def started(
    config: dict[str, Any], tensors: dict[str, Tensor], place: Place, context: Context
) -> tuple[dict[str, Any], Mapping[str, Tensor]]:
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
    if not name.startswith("pissa") and name != "olora":
        return config, tensors
    if place.model is None:
        context.note(f"init_lora_weights={init!r}: the base's own part is not known without a model")
        return config, tensors
    a, b = _principal(place, config, name, context)
    own = {**tensors, "A0": place.of_columns(a).contiguous(), "B0": place.of_rows(b).contiguous()}
    return {**config, "init": "olora" if name == "olora" else "pissa"}, own


def _principal(place: Place, config: Mapping[str, Any], name: str, context: Context) -> tuple[Tensor, Tensor]:
    raise UnsupportedFileError(f"init_lora_weights={name!r} is not read yet", context.where, "init_lora_weights")
