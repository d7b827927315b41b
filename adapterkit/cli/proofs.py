"""`adapterkit points --prove`: what the numbers say of each role of a model, on a small random copy of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

import click

from adapterkit.errors import AdapterKitError, printable

if TYPE_CHECKING:
    from torch import nn

    from adapterkit.testing.proofs.verdicts import Proof
    from adapterkit.training.skeleton import Skeleton


def show_proofs(found: nn.Module | Skeleton, *, as_json: bool) -> bool:
    """Proves a model, or each part of a pipeline that has points, and prints the verdicts.

    Args:
        found: On the meta device; a copy with few small layers is made of it.
        as_json: One object with a proof, or the reason why there is none, for each part.

    Returns:
        Whether no point is false.

    Raises:
        NoSpecimen: No part of it can be copied and run.
    """
    from adapterkit.testing.proofs.verdicts import Proof
    from adapterkit.testing.specimens import NoSpecimen

    results = {name: _proof(part) for name, part in _parts(found).items()}
    proofs = [result for result in results.values() if isinstance(result, Proof)]
    if not proofs:
        raise NoSpecimen("; ".join(f"{name}: {told}" for name, told in results.items()))
    if as_json:
        told = {name: r.to_dict() if isinstance(r, Proof) else {"unproven": r} for name, r in results.items()}
        click.echo(json.dumps(told, indent=2))
    else:
        for name, result in results.items():
            click.echo(printable(f"{name}\n{result}" if isinstance(result, Proof) else f"{name}: no proof: {result}"))
    return not any(proof.false for proof in proofs)


def _parts(found: nn.Module | Skeleton) -> Mapping[str, nn.Module]:
    """Component -> module. Of a pipeline, those that have points."""
    from adapterkit.handle.listing import points
    from adapterkit.training.skeleton import Skeleton

    components = sorted({point.component for point in points(found)})
    if isinstance(found, Skeleton):
        return {name: part for name, part in found.components.items() if name in components}
    return {"+".join(components): found}


def _proof(part: nn.Module) -> Proof | str:
    from adapterkit.testing.proof import prove
    from adapterkit.testing.specimens import specimen

    click.echo(f"proving a small copy of {type(part).__name__}", file=sys.stderr)
    try:
        made = specimen(part)
        return prove(made.model, made.calls)
    except AdapterKitError as error:
        return str(error)
