"""Lily in files of PEFT, which hold what layers share once for each of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adapterkit.contract.codec import Context, Place, Said
from adapterkit.errors import CheckpointError, MissingKeysError
from adapterkit_peft_types.codecs.modules import ModuleCodec, check_shapes, field
from adapterkit_peft_types.lily import Lily, key_of

_A, _B, _ROUTER = "lily_A.weight", "lily_B.weight", "lily_router.weight"


class LilyCodec(ModuleCodec):
    """A [r, in], experts B [n r, out] and router [n, r]; layers of equal shape and end of name have the same B."""

    names = frozenset({_A, _B, _ROUTER})
    types = frozenset({"lily"})
    peft_type, required = "LILY", names
    axes = dict.fromkeys(names, 2)

    def shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
        return (tensors[_B].shape[1], tensors[_A].shape[1])

    def read(self, tensors: Mapping[str, Tensor], place: Place, context: Context) -> Said:
        a, b, router = tensors[_A], tensors[_B], tensors[_ROUTER]
        (out, width), (experts, rank) = place.shape[:2], router.shape
        check_shapes(place, context, A=(a, (rank, width)), B=(b, (experts * rank, out)))
        shared = context.shared.setdefault("lily", {})
        first = place.of_columns(a).contiguous()
        second = place.of_rows(b.view(experts, rank, out), 2).contiguous()
        group = _group(place, context, second, shared)
        name_a = _same(shared, f"A.{key_of(group, place.point.shape)}-", first)
        config = {
            "rank": rank,
            "experts": experts,
            "stride": field(context, "stride_A", 1),
            "scale": float(field(context, "scaling", 1.0)),
            "over": "batch",
            "a": name_a,
            "b": group,
        }
        return Said("lily", config, {"router": router})

    def fields(self, said: Said, place: Place, context: Context) -> Mapping[str, Any]:
        own = Lily.from_dict(said.config)
        if own.over != "batch":
            told = "PEFT's router takes the mean over the whole batch, and over='sample' is one for each row"
            raise CheckpointError(f"{told}: equal for batches of one row alone; native holds it", context.where)
        return {"r": own.rank, "num_B": own.experts, "stride_A": own.stride, "scaling": own.scale}

    def tensors(self, said: Said, place: Place, context: Context) -> Mapping[str, Tensor]:
        own, shared = Lily.from_dict(said.config), context.shared.get("lily", {})
        a, b = (f"{which}.{name}" for which, name in zip("AB", own.names(place.point), strict=True))
        if {a, b} - shared.keys():
            raise MissingKeysError(f"the factors that layers share ({a}, {b}) are not there", context.where, b)
        return {_A: shared[a], _B: shared[b].flatten(0, 1), _ROUTER: said.tensors["router"]}


def _group(place: Place, context: Context, second: Tensor, shared: dict[str, Tensor]) -> str:
    """The name of a module's group: all that PEFT found by one target, and that have the same B, which is put there."""
    targets, path = context.config.get("target_modules"), place.point.path
    found = [
        name for name in (targets if isinstance(targets, list) else ()) if isinstance(name, str) and path.endswith(name)
    ]
    first = "all" if isinstance(targets, str) else max(found, key=len) if found else path.rpartition(".")[2]
    first = first if place.whole else f"{first}-{place.point.role}"
    for group in (first, *(f"{first}-{i}" for i in range(1, len(shared) + 1))):
        name = f"B.{key_of(group, place.point.shape)}"
        there = shared.setdefault(name, second)
        if there is second or torch.equal(there, second):
            return group
    raise AssertionError("there are more groups than names")


def _same(shared: dict[str, Tensor], prefix: str, tensor: Tensor) -> str:
    """The name of an equal tensor, or a new one."""
    known = [name for name in shared if name.startswith(prefix)]
    found = next((name for name in known if torch.equal(shared[name], tensor)), f"{prefix}{len(known)}")
    shared[found] = tensor
    return found.removeprefix("A.")
