"""PSOFT and OSF in files of PEFT, which hold what is learnt alone: the rest is made again from the base's weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from adapterkit.contract.codec import Context, Place, Said
from adapterkit.errors import BaseMismatchError, CheckpointError, InvalidHeaderError
from adapterkit.points import WeightLayout
from adapterkit_peft_types.codecs.base import weight_of
from adapterkit_peft_types.codecs.modules import ModuleCodec, as_lora, check_shapes, dropout, field
from adapterkit_peft_types.osf import decomposed, update
from adapterkit_peft_types.psoft import PSOFT

_PSOFT = {"turn": "psoft_R.weight", "after": "psoft_R.vector_b", "before": "psoft_R.vector_a"}
_OSF = {name: f"osf_svd_params.{name}_low" for name in "USV"}
_SPLITS = {"psoft_init": False, "pissa_init": True}
_CLOSE = 1e-4
"""How far what PEFT will make of the weight may be from what the adapter has, relative to the largest number."""


class PSOFTCodec(ModuleCodec):
    """The skew matrix' upper triangle, or R itself, and its two vectors; how A and B come about is in the config."""

    names = frozenset(_PSOFT.values())
    types = frozenset({"psoft"})
    peft_type, required = "PSOFT", frozenset({"psoft_R.weight"})
    axes: ClassVar[Mapping[str, int]] = {"psoft_R.vector_a": 1, "psoft_R.vector_b": 1}

    def read(self, tensors: Mapping[str, Tensor], place: Place, context: Context) -> Said:
        own = {name: tensors[other] for name, other in _PSOFT.items() if other in tensors}
        config = _psoft_config(own, context)
        rank = config.rank
        shapes = {"turn": (rank * (rank - 1) // 2,) if config.orthogonal else (rank, rank)}
        check_shapes(place, context, **{_PSOFT[k]: (t, shapes.get(k, (rank,))) for k, t in own.items()})
        a, b = config.principal(weight_of(place, context))
        own |= {"A": place.of_columns(a).contiguous(), "B": place.of_rows(b).contiguous()}
        values = {name: value for name, value in config.to_dict().items() if name != "targets"}
        return Said("psoft", {**values, **dropout(context, "psoft_dropout")}, own)

    def fields(self, said: Said, place: Place, context: Context) -> Mapping[str, Any]:
        own = PSOFT.from_dict(said.config)
        if own.terms == 3:
            told = "a sum of 3 terms, of which PEFT counts the third twice: it says 1, 2, and 4 or more"
            raise CheckpointError(f"{told}; native holds any", context.where, place.point.id)
        found = {
            "r": own.rank,
            "psoft_alpha": own.rank,
            "psoft_dropout": own.dropout,
            "psoft_orth": own.orthogonal,
            "psoft_mag_a": own.scale_before,
            "psoft_mag_b": own.scale_after,
            "ab_svd_init": "pissa_init" if own.balanced else "psoft_init",
            "use_cayley_neumann": own.terms is not None,
            "psoft_svd": "full" if own.iterations is None else "lowrank",
            "random_seed": own.seed,
        }
        optional = {
            "num_cayley_neumann_terms": own.terms,
            "cayley_neumann_eps": own.bound,
            "psoft_svd_lowrank_niter": own.iterations,
        }
        return {**found, **{name: value for name, value in optional.items() if value is not None}}

    def tensors(self, said: Said, place: Place, context: Context) -> Mapping[str, Tensor]:
        config = PSOFT.from_dict(said.config)
        if place.model is not None:
            made = config.principal(weight_of(place, context))
            _check_made(place, context, "PSOFT", [(made[i], said.tensors["AB"[i]]) for i in (0, 1)])
        return {other: said.tensors[name] for name, other in _PSOFT.items() if name in said.tensors}


def _psoft_config(tensors: Mapping[str, Tensor], context: Context) -> PSOFT:
    turn = tensors["turn"]
    orthogonal, split = turn.ndim == 1, field(context, "ab_svd_init", "psoft_init")
    rank = round((1 + (1 + 8 * turn.numel()) ** 0.5) / 2) if orthogonal else turn.shape[0]
    if split not in _SPLITS:
        raise InvalidHeaderError(f"must be one of {', '.join(_SPLITS)}, not {split!r}", context.where, "ab_svd_init")
    terms = field(context, "num_cayley_neumann_terms", 5) if field(context, "use_cayley_neumann", False) else None
    lowrank = field(context, "psoft_svd", "full") == "lowrank"
    return PSOFT(
        rank=rank,
        balanced=_SPLITS[split],
        orthogonal=orthogonal,
        scale_before="before" in tensors,
        scale_after="after" in tensors,
        terms=4 if terms == 3 else terms,  # PEFT's sum of 3 terms has the fourth, and that of 4 no more
        bound=context.config.get("cayley_neumann_eps") if terms is not None else None,
        iterations=field(context, "psoft_svd_lowrank_niter", 10) if lowrank else None,
        seed=field(context, "random_seed", 0) if lowrank else 0,
    )


class OSFCodec(ModuleCodec):
    """U [out, r], S [r] and V [r, in] of the smaller singular values, as they are now."""

    names = frozenset(_OSF.values())
    types = frozenset({"osf"})
    peft_type, required = "OSF", names
    axes: ClassVar[Mapping[str, int]] = {_OSF["U"]: 2, _OSF["S"]: 1, _OSF["V"]: 2}

    def shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
        return (tensors[_OSF["U"]].shape[0], tensors[_OSF["V"]].shape[1])

    def read(self, tensors: Mapping[str, Tensor], place: Place, context: Context) -> Said:
        own = {name: tensors[other] for name, other in _OSF.items()}
        (out, width), rank = place.shape[:2], len(own["S"])
        check_shapes(place, context, U=(own["U"], (out, rank)), S=(own["S"], (rank,)), V=(own["V"], (rank, width)))
        start = decomposed(weight_of(place, context), min(out, width) - rank)
        if not place.whole:
            (u, s, v), (u0, s0, v0) = ((one["U"], one["S"], one["V"]) for one in (own, start))
            factors = update(u, s, v, u0, s0, v0, WeightLayout("linear"))
            return as_lora(factors, place, context, "OSF")
        own |= {f"{name}0": start[name] for name in "USV"} | ({"K": start["K"]} if out != width else {})
        return Said("osf", {"kept": _kept(context.config.get("effective_rank"), (out, width), rank)}, own)

    def fields(self, said: Said, place: Place, context: Context) -> Mapping[str, Any]:
        return {"effective_rank": said.config.get("kept"), "rank_pattern": {}}

    def tensors(self, said: Said, place: Place, context: Context) -> Mapping[str, Tensor]:
        if place.model is not None:
            made = decomposed(weight_of(place, context), min(place.shape[:2]) - len(said.tensors["S"]))
            parts = [
                [one[name] for name in names] for one, names in ((made, "USV"), (said.tensors, ("U0", "S0", "V0")))
            ]
            products = [(u * s) @ v for u, s, v in parts]
            _check_made(place, context, "OSF", [(products[0], products[1])])
        return {other: said.tensors[name] for name, other in _OSF.items()}


def _kept(asked: object, shape: tuple[int, int], rank: int) -> int | float | None:
    """How the config says the number of singular values that stay, where that is their number; else the number."""
    kept = min(shape) - rank
    if asked is None:
        return None if kept == min(shape) // 2 else kept
    return asked if isinstance(asked, float) and asked < 1 and int(min(shape) * asked) == kept else kept


def _check_made(place: Place, context: Context, name: str, pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Raises BaseMismatchError where PEFT would make other numbers of the base's weight than the adapter has."""
    for made, kept in pairs:
        off = float((made - kept.view_as(made)).abs().max())
        if off > _CLOSE * float(kept.abs().max()):
            told = (
                f"{name} files of PEFT leave to the base what it was at the start, and this base differs by {off:.2g}"
            )
            raise BaseMismatchError(f"{told}; native holds all of it", context.where, place.point.id)
