"""Checks of what an adapter computes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from adapterkit.adapter import AdditiveModule, Factors
from adapterkit.errors import NotMergeableError
from adapterkit.kernels import low_rank
from adapterkit.testing.case import Case
from adapterkit.testing.subject import LOOSE, NAME, TIGHT, Subject, assert_close, assert_same, scalar, skip

_STEP = 1e-6


class EffectChecks(Case):
    """Start, gradients, merging, training mode."""

    def test_zero_effect(self) -> None:
        """A new adapter changes nothing: `max |y - base| <= 1e-5 max |base|`, in float32."""
        if not self.config.neutral:
            skip("the type says that it has an effect from the start")
        for subject in self.subjects(torch.float32, fresh=True, each=True):
            assert_close(subject.run(), subject.run(None), LOOSE, f"{subject.label}: a new adapter's output")

    def test_effect(self) -> None:
        """An adapter whose parameters have moved changes the output, by more than rounding."""
        for subject in self.subjects(each=True):
            adapted, base = subject.bits(), subject.bits(None)
            if adapted.shape != base.shape:
                continue
            change = float((adapted - base).abs().max())
            assert change > 1e-8, f"{subject.label}: moving every parameter changed the output by {change:.3g} only"

    def test_gradients_reach_every_parameter(self) -> None:
        """After a backward every parameter of the adapter, and nothing of the base, has a gradient, and not zero."""
        reached: dict[str, bool] = {}
        for subject in self.subjects():
            subject().square().mean().backward()
            mine = {id(parameter) for parameter in subject.adapters.parameters(NAME)}
            for name, parameter in subject.model.named_parameters():
                if id(parameter) not in mine:
                    assert parameter.grad is None, f"{subject.label}: the base's {name} has a gradient"
                    assert not parameter.requires_grad, f"{subject.label}: the base's {name} trains"
            for name, moved in _gradients(subject):
                reached[name] = reached.get(name, False) or moved
        idle = [name for name, moved in reached.items() if not moved]
        assert not idle, f"the gradient of {', '.join(idle)} is zero at every point of every model"

    def test_gradients_are_right(self) -> None:
        """Along a random direction d: `(f(p + e d) - f(p - e d)) / 2 e = grad f . d` within 1e-5, in float64."""
        if not self.config.exact_gradients:
            skip("the type says that its gradients leave something out on purpose")
        for subject in self.subjects():
            parameters = subject.trained
            generator = torch.Generator().manual_seed(7)
            direction = [subject.move * torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
            grads = torch.autograd.grad(scalar(subject()), parameters)
            expected = sum(float((g * d).sum()) for g, d in zip(grads, direction, strict=True))
            sides = [_moved(subject, parameters, direction, sign * _STEP) for sign in (1, -1)]
            found = (sides[0] - sides[1]) / (2 * _STEP)
            scale = max(abs(expected), 1e-3)
            assert abs(found - expected) <= LOOSE * scale, (
                f"{subject.label}: the slope along a direction is {found:.10g}, the gradient says {expected:.10g}"
            )

    def test_merged_equals_unmerged(self) -> None:
        """`model(W merged) = model(W, adapter)` within 1e-10 in float64 and 1e-5 in float32."""
        merged = 0
        for dtype, tolerance in ((torch.float64, TIGHT), (torch.float32, LOOSE)):
            for subject in self.subjects(dtype):
                expected = subject.run()
                try:
                    subject.adapters.merge(NAME)
                except NotMergeableError:
                    continue
                merged += 1
                assert_close(subject(), expected, tolerance, f"{subject.label}: merged, {dtype}")
                subject.adapters.unmerge()
        if not merged:
            skip("the type has no equivalent weight, and says so by a NotMergeableError")

    def test_unmerging_is_exact(self) -> None:
        """Merging and unmerging gives back every bit of the weights and of the output."""
        for subject in self.subjects(torch.bfloat16):
            before = {key: tensor.clone() for key, tensor in subject.model.state_dict().items()}
            expected = subject()
            try:
                subject.adapters.merge(NAME)
            except NotMergeableError:
                pass
            else:
                subject.adapters.unmerge()
            for key, tensor in subject.model.state_dict().items():
                assert_same(tensor, before[key], f"{subject.label}: {key} after merging and unmerging")
            assert_same(subject(), expected, f"{subject.label}: the output after merging and unmerging")

    def test_factors_are_the_update(self) -> None:
        """`factors()`, where there are some, give `delta_weight()` and `delta(x)`, within 1e-10."""
        given = 0
        for subject in self.subjects():
            subject.model.eval()
            for key, module in subject.adapters.modules(NAME).items():
                factors = module.factors() if isinstance(module, AdditiveModule) else None
                if factors is None or not isinstance(module, AdditiveModule):
                    continue
                given += 1
                label = f"{subject.label}: {key}"
                x = _input(factors)
                assert_close(low_rank.update(x, factors), module.delta(x), TIGHT, f"{label}: its factors and delta")
                try:
                    weight = module.delta_weight()
                except NotMergeableError:
                    continue
                assert_close(low_rank.dense(factors), weight, TIGHT, f"{label}: its factors and delta_weight")
        if not given:
            skip("the type gives no factors")

    def test_evaluation_is_deterministic(self) -> None:
        """In evaluation mode the same input gives the same bits twice, whatever random numbers were drawn between."""
        for subject in self.subjects():
            first = subject.bits()
            torch.rand(3)
            assert_same(subject.bits(), first, f"{subject.label}: the second forward")

    def test_training_is_evaluation(self) -> None:
        """`y` and its gradients in train() are those in eval(), within 1e-10, unless training draws random numbers."""
        compared = 0
        for subject in self.subjects():
            expected, grads = subject.gradients()
            subject.model.train()
            before = torch.get_rng_state()
            found, others = subject.gradients()
            if not torch.equal(torch.get_rng_state(), before):
                continue  # a dropout
            compared += 1
            assert_close(found, expected, TIGHT, f"{subject.label}: the output in train()")
            assert_close(others, grads, TIGHT, f"{subject.label}: the gradients in train()")
        if not compared:
            skip("the type draws random numbers in training, so it is another function there")


def _gradients(subject: Subject) -> Iterator[tuple[str, bool]]:
    """Every parameter's name, and whether its gradient is anything but zero."""
    for key, module in subject.adapters.modules(NAME).items():
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            assert parameter.grad is not None, f"{subject.label}: {key}/{name} has no gradient"
            assert bool(torch.isfinite(parameter.grad).all()), f"{subject.label}: {key}/{name}: gradient not finite"
            yield name, not parameter.numel() or bool(parameter.grad.abs().max() > 0)


def _input(factors: Factors) -> Tensor:
    """Something that a layer with such an update can take."""
    generator, layout = torch.Generator().manual_seed(3), factors.layout
    width = factors.A.shape[1] * layout.groups
    if layout.form == "embedding":
        return torch.randint(width, (2, 3), generator=generator)
    shape = (2, width, *(2 * size + 1 for size in layout.kernel)) if layout.form == "conv" else (2, 3, width)
    return torch.randn(shape, generator=generator, dtype=factors.A.dtype)


@torch.no_grad()
def _moved(subject: Subject, parameters: list[torch.nn.Parameter], direction: list[Tensor], step: float) -> float:
    for parameter, way in zip(parameters, direction, strict=True):
        parameter.add_(step * way)
    value = float(scalar(subject()))
    for parameter, way in zip(parameters, direction, strict=True):
        parameter.sub_(step * way)
    return value
