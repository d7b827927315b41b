"""T-LoRA's tensors. Its file lacks the state that it started from, which is found again in the base's weight."""

from __future__ import annotations

from collections.abc import Mapping, Set

import torch
from torch import Tensor

from adapterkit.contract.codec import Codec, Context, Place, Said
from adapterkit.errors import CheckpointError, ShapeMismatchError
from adapterkit_lycoris.codecs.updates import ALPHA, require_whole

_Q, _P, _LAMBDA = "q_layer.weight", "p_layer.weight", "lambda_layer"


class TLoRACodec(Codec):
    """`alpha / rank (P diag(l) Q - P0 diag(l0) Q0)`, with P0 l0 Q0 the principal part of the weight it was made for."""

    names = frozenset({_Q, _P, _LAMBDA, ALPHA})

    def takes(self, names: Set[str], context: Context) -> Set[str]:
        return self.names & names if names >= {_Q, _P, _LAMBDA} else frozenset()

    def shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
        return (tensors[_P].shape[0], *tensors[_Q].shape[1:])

    def for_all(self, tensors: Mapping[str, Tensor]) -> bool:
        return True

    def read(self, tensors: Mapping[str, Tensor], place: Place, context: Context) -> Said:
        q, p, values = tensors[_Q], tensors[_P].flatten(1), tensors[_LAMBDA].flatten()
        require_whole(place, "T-LoRA", context)
        rank = len(values)
        if self.shape(tensors) != place.shape or q.shape[0] != rank or p.shape[1] != rank:
            told = f"q {tuple(q.shape)}, p {tuple(p.shape)} and {rank} values are not for {place.shape}"
            raise ShapeMismatchError(told, context.where, place.point.path)
        p0, values0, q0 = _start(place, rank, context)
        context.note(
            "T-LoRA starts from the weight's principal part, which its file does not hold: taken from this base. "
            "It is read with all ranks, as for the last step"
        )
        alpha = float(tensors[ALPHA]) if ALPHA in tensors else None
        own = {"A": q, "B": p * values, "A0": q0.view_as(q).to(q.dtype), "B0": (p0 * values0).to(p.dtype)}
        config = {"rank": rank, "alpha": alpha, "init": "pissa"}
        return Said("lora", config, {name: tensor.contiguous() for name, tensor in own.items()})


def _start(place: Place, rank: int, context: Context) -> tuple[Tensor, Tensor, Tensor]:
    if place.model is None:
        raise CheckpointError("T-LoRA is read together with its base, whose weights tell its start", context.where)
    weight = place.model.values(place.point)[0].double().flatten(1)
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    missing = rank - len(s)
    if missing > 0:  # the tool pads with zeros
        u, s, vh = (
            torch.nn.functional.pad(t, pad)
            for t, pad in ((u, (0, missing)), (s, (0, missing)), (vh, (0, 0, 0, missing)))
        )
    return u[:, :rank], s[:rank], vh[:rank]
