"""Checks of the side inputs that an adapter reads; see `AdapterConfig.example_context`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from adapterkit.testing.case import Case
from adapterkit.testing.placements import reads_side_inputs
from adapterkit.testing.subject import NAME, TIGHT, Subject, assert_close, assert_same, skip

_ROWS = 3


class SideChecks(Case):
    """Side inputs by row and for all rows, read anew in every forward."""

    def test_side_inputs_are_read(self) -> None:
        """Other side inputs give another output, in the forward after as well: what is named is read, and not kept."""
        for subject in self._reading():
            inputs = [subject.side_inputs(_ROWS, seed) for seed in (4, 5)]
            same = [name for name, value in inputs[0].items() if torch.equal(value, inputs[1][name])]
            assert not same, f"{subject.label}: example_context gives {same[0]!r} without chance; draw it at random"
            first, other = (_run(subject, given) for given in inputs)
            change = float((first - other).abs().max())
            assert change > 1e-8, f"{subject.label}: other side inputs changed the output by {change:.3g} only"
            again = _run(subject, subject.side_inputs(_ROWS))
            assert_same(again, first, f"{subject.label}: the output with the first side inputs again")

    def test_side_inputs_are_by_row(self) -> None:
        """A row's output is that of the row alone with its own side inputs, within 1e-10."""
        for subject in self._reading():
            together = subject.run(NAME, _ROWS)
            for index in range(_ROWS):
                alone = subject.row(index, NAME, _ROWS)
                assert_close(together[index : index + 1], alone, TIGHT, f"{subject.label}: row {index}")

    def test_side_inputs_for_all_rows(self) -> None:
        """Side inputs [1, ...] are those of every row: the output is that with copies of them, within 1e-10."""
        for subject in self._reading():
            one = subject.side_inputs(1)
            copies = {name: value.expand(_ROWS, *value.shape[1:]).clone() for name, value in one.items()}
            assert_close(_run(subject, one), _run(subject, copies), TIGHT, f"{subject.label}: one for all rows")

    def test_side_inputs_of_a_recomputed_forward(self) -> None:
        """A checkpointed forward whose backward runs outside of the block has the gradients of one that is not."""
        for subject in self._reading():
            parameters = list(subject.adapters.parameters(NAME))
            with subject.given(_ROWS):
                expected = _gradients(_forward(subject), parameters)
                with subject.adapters.activated(NAME):
                    anchor = torch.zeros((), dtype=subject.dtype, requires_grad=True)
                    y = checkpoint(
                        lambda anchor, subject=subject: _forward(subject) + 0 * anchor,
                        anchor,
                        use_reentrant=False,
                        context_fn=subject.adapters.recompute_context,
                    )
            for found, one in zip(_gradients(y, parameters), expected, strict=True):  # type: ignore[arg-type]
                assert_close(found, one, TIGHT, f"{subject.label}: a gradient, recomputed outside of the block")

    def _reading(self) -> Iterator[Subject]:
        if not reads_side_inputs(self.config):
            skip("the type reads no side inputs")
        for subject in self.subjects():
            if subject.side_inputs(1):
                yield subject


def _forward(subject: Subject) -> Tensor:
    args, kwargs = subject.example.inputs(_ROWS, subject.dtype)
    return subject.model(*args, **kwargs)


@torch.no_grad()
def _run(subject: Subject, given: dict[str, Tensor]) -> Tensor:
    with subject.adapters.activated(NAME), subject.adapters.context(**given):
        return _forward(subject)


def _gradients(y: Tensor, parameters: list[torch.nn.Parameter]) -> list[Tensor]:
    found = torch.autograd.grad(y.square().mean(), parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]
