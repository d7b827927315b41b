"""PEANuT in files of PEFT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adapterkit.contract.codec import Context, Place, Said
from adapterkit.errors import CheckpointError, MissingKeysError
from adapterkit_peft_types.codecs.modules import check_shapes, field
from adapterkit_peft_types.codecs.whole import WholeCodec

_A, _B = "peanut_A.weight", "peanut_B.weight"
_MAX_DEPTH = 64
_LAYERS = ("encoders", "decoders")
_THEIRS = {"relu": "relu", "gelu": "gelu", "gelu_new": "gelu_new", "silu": "silu", "swish": "silu", "tanh": "tanh"}
_THEIRS |= {"sigmoid": "sigmoid", "leaky_relu": "leaky_relu", "relu2": "relu2", "relu6": "relu6", "mish": "mish"}
_THEIRS |= {"quick_gelu": "quick_gelu", "linear": "identity"}
"""Their names of activations -> ours."""


class PEANuTCodec(WholeCodec):
    """A [r, out], B [out, r] and the encoders and decoders [r, r] by number."""

    names = frozenset({_A, _B, *(f"peanut_{kind}.{i}.weight" for kind in _LAYERS for i in range(_MAX_DEPTH))})
    types = frozenset({"peanut"})
    peft_type, required = "PEANUT", frozenset({_A, _B})
    axes = dict.fromkeys(names, 2)

    def read(self, tensors: Mapping[str, Tensor], place: Place, context: Context) -> Said:
        a, b = tensors[_A], tensors[_B]
        rank, depth = len(a), (len(tensors) - 2) // 2
        check_shapes(place, context, peanut_A=(a, (rank, place.shape[0])), peanut_B=(b, (place.shape[0], rank)))
        own = {"A": a, "B": b}
        for kind in _LAYERS if depth else ():
            keys = [f"peanut_{kind}.{i}.weight" for i in range(depth)]
            if missing := [key for key in keys if key not in tensors]:
                raise MissingKeysError(f"{missing[0]} is missing", context.where, place.point.path)
            check_shapes(place, context, **{key: (tensors[key], (rank, rank)) for key in keys})
            own[kind] = torch.stack([tensors[key] for key in keys])
        name = field(context, "act_fn", "relu")
        if name not in _THEIRS:
            told = f"is {name!r}, and PEANuT here knows {', '.join(_THEIRS)}"
            raise CheckpointError(told, context.where, "act_fn")
        scale = float(field(context, "scaling", 1.0))
        config = {"rank": rank, "depth": depth, "activation": _THEIRS[name], "scale": scale}
        return self.at(place, Said("peanut", config, own), context)

    def fields(self, said: Said, place: Place, context: Context) -> Mapping[str, Any]:
        config = {"depth": 0, "activation": "relu", "scale": 1.0, **said.config}
        if config["activation"] not in _THEIRS.values():
            told = f"PEFT's PEANuT is not known to have the activation {config['activation']!r}; native holds any"
            raise CheckpointError(told, context.where, place.point.id)
        theirs = next(name for name, own in _THEIRS.items() if own == config["activation"])
        named = {"act_fn": theirs, "scaling": config["scale"]}
        return {"r": len(said.tensors["A"]), "depth": config["depth"], **named}

    def tensors(self, said: Said, place: Place, context: Context) -> Mapping[str, Tensor]:
        found = {_A: said.tensors["A"], _B: said.tensors["B"]}
        for kind in _LAYERS:
            for i, matrix in enumerate(said.tensors.get(kind, ())):
                found[f"peanut_{kind}.{i}.weight"] = matrix.clone()
        return found
