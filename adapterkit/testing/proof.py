"""A proof by numbers: runs a model, and checks at every point what its map claims."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from adapterkit.errors import ProofError
from adapterkit.handle.listing import points as points_of
from adapterkit.testing.proofs.attentions import prove_attentions
from adapterkit.testing.proofs.bench import Bench
from adapterkit.testing.proofs.residuals import prove_outputs
from adapterkit.testing.proofs.sequences import prove_tokens
from adapterkit.testing.proofs.verdicts import Proof, Verdict
from adapterkit.testing.proofs.weights import prove_norms, prove_weights

__all__ = ["Proof", "ProofError", "Verdict", "prove"]

_PROVERS = (prove_weights, prove_norms, prove_outputs, prove_attentions, prove_tokens)


def prove(
    model: nn.Module,
    calls: Mapping[str, Callable[[], Tensor]],
    component: str | None = None,
    *,
    backend: str | None = None,
) -> Proof:
    """What is true of the points of a model, found by running it. Leaves the model as it was.

    - weights: an adapter gives what the same change of the weight's own rows gives, by hand and merged, and it arrives
      in an output; queries, keys and values are those of torch's attention.
    - outputs: the sublayer's output is added to its x, as it is or scaled; norms around see x, or the sum.
    - attention: with a prefix the module computes softmax(q [P; k]) [P; v], against an explicit softmax in the place of
      torch's call; where there is no such call, what must hold in the limits.
    - tokens: the sequence is [batch, length, features], and a change of it, or further positions, arrive.

    Args:
        model: In float64 and evaluation mode, with values. Random ones prove as much as trained ones.
        calls: Label -> runs it on fixed inputs, and gives one tensor of all that it returns.
        component: Only points of this one.
        backend: A backend's name, to override the match by class.

    Raises:
        ProofError: A call fails on the base, is not finite, or does not give the same twice.
    """
    bench = Bench(model, calls, backend)
    found = points_of(model, backend=backend)
    chosen = [point for point in found if component in (None, point.component)]
    verdicts = {verdict.point.id: verdict for prover in _PROVERS for verdict in prover(bench, chosen)}
    return Proof(verdicts[point.id] for point in chosen)
