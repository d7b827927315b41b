"""Checks of where an adapter runs: dtypes, devices, shared modules, compiled, checkpointed, in threads."""

from __future__ import annotations

import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import adapterkit as ak
from adapterkit.errors import NotMergeableError
from adapterkit.testing.case import Case
from adapterkit.testing.models import ToyMixture
from adapterkit.testing.subject import NAME, TIGHT, Subject, assert_close, assert_same, skip
from adapterkit.testing.toys import VOCABULARY, WIDTH, ToyModel

_COMPILED = 2
"""Modalities that are compiled: it takes its time."""


class PlaceChecks(Case):
    """Dtypes, devices, tied and shared modules, torch.compile, activation checkpointing, threads."""

    def test_dtypes(self) -> None:
        """In float32, bfloat16 and float64 the output has the base's dtype; parameters have at least float32."""
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            for subject in self.subjects(dtype):
                y = subject.run()
                assert y.dtype == dtype, f"{subject.label}: the output is {y.dtype} on a model in {dtype}"
                assert bool(torch.isfinite(y).all()), f"{subject.label}: the output in {dtype} is not finite"
                for parameter in subject.adapters.parameters(NAME):
                    wide = torch.promote_types(dtype, torch.float32)
                    assert parameter.dtype == wide, f"{subject.label}: a parameter is {parameter.dtype}, not {wide}"
                y.float().square().mean().backward()

    def test_half_precision_parameters(self) -> None:
        """Cast to bfloat16 with the model, or added in it, an adapter still works and gives finite outputs."""
        for subject in self.subjects(torch.float32):
            subject.model.bfloat16()
            subject.dtype = torch.bfloat16
            assert bool(torch.isfinite(subject.run()).all()), f"{subject.label}: cast to bfloat16: not finite"
            subject.adapters.remove(NAME)
            subject.adapters.add(NAME, subject.config, dtype=torch.bfloat16)
            subject.run().float().square().mean().backward()

    def test_half_precision_is_near(self) -> None:
        """In bfloat16 the output is the float64 one within 10 %: nothing is lost by casting back and forth."""
        for exact, rough in zip(self.subjects(), self.subjects(torch.bfloat16), strict=True):
            pairs = zip(rough.adapters.state_dict(NAME).values(), exact.adapters.state_dict(NAME).values(), strict=True)
            for one, other in pairs:  # a start from rounded weights may be another, such as of the other sign
                one.detach().copy_(other)
            assert_close(rough.run().double(), exact.run(), 0.1, f"{exact.label}: bfloat16 against float64")

    def test_autocast(self) -> None:
        """Under autocast to bfloat16 a forward and backward work, and the output is finite."""
        for subject in self.subjects(torch.float32):
            with torch.autocast("cpu", torch.bfloat16):
                y = subject.run()
            assert bool(torch.isfinite(y).all()), f"{subject.label}: the output under autocast is not finite"
            y.float().square().mean().backward()

    def test_meta(self) -> None:
        """On the meta device an adapter is built and added without allocating anything."""
        for subject in self.subjects():
            with torch.device("meta"):
                adapters = ak.Adapters(subject.example.make())
                built = [subject.config.shared(subject.points), *map(subject.config.build, subject.points)]
            self.prepare(adapters, subject.config)
            adapters.add(NAME, subject.config)
            tensors = [tensor for one in built if one is not None for tensor in (*one.parameters(), *one.buffers())]
            assert all(tensor.is_meta for tensor in [*tensors, *adapters.state_dict(NAME).values()]), (
                f"{subject.label}: a tensor was allocated; create tensors on the default device"
            )

    def test_moves_with_the_model(self) -> None:
        """`model.to` takes the adapter along: to another dtype, and to a GPU where there is one."""
        for subject in self.subjects():
            expected = subject.run()
            subject.model.float()
            subject.dtype = torch.float32
            assert_close(subject.run().double(), expected, 1e-4, f"{subject.label}: moved to float32")
            if torch.cuda.is_available():
                args, kwargs = subject.example.inputs(3, torch.float32)
                subject.model.cuda()
                with subject.given(3):
                    moved = subject.model(*(a.cuda() for a in args), **{k: v.cuda() for k, v in kwargs.items()})
                assert_close(moved.cpu().double(), expected, 1e-3, f"{subject.label}: moved to the GPU")

    def test_built_on_meta_and_loaded(self) -> None:
        """Built on the meta device, given memory by `to_empty` and loaded, a model gives the same bits."""
        for subject in self.subjects():
            checkpoint = self._require_checkpoint(subject)
            with torch.device("meta"):
                model = subject.example.make().to(subject.dtype).eval()
                adapters = ak.Adapters(model)
                self.prepare(adapters, subject.config)
                adapters.add(NAME, subject.config)
            model.to_empty(device="cpu")
            model.load_state_dict(subject.model.state_dict())
            adapters.remove(NAME)  # `to_empty` gives no values to what no file holds: loading builds it again
            adapters.install(NAME, checkpoint)
            loaded = dataclasses.replace(subject, model=model, adapters=adapters)
            for one in (model, subject.model):
                one.requires_grad_(False)  # torch rounds another way where a weight requires grad
            assert_same(loaded.bits(), subject.bits(), f"{subject.label}: the output of a model built on meta")

    def test_tied_weights_stay_tied(self) -> None:
        """Where a weight is tied, an adapter at the one module leaves the other's output alone, merged or not."""
        done = 0
        for role, other in (("head", "embed"), ("embed.tokens", "head")):
            for subject in self._subjects_at(role):
                model: Any = subject.model
                if not isinstance(model, ToyModel):
                    continue
                done += 1
                label, beside = subject.label, model.get_submodule(other)
                x: Any = torch.arange(VOCABULARY) if other == "embed" else torch.eye(WIDTH, dtype=subject.dtype)
                with torch.no_grad(), subject.adapters.disabled():
                    base = beside(x)
                adapted = subject.bits()
                with torch.no_grad(), subject.adapters.activated(NAME):
                    assert_same(beside(x), base, f"{label}: {other} beside the adapter")
                try:
                    subject.adapters.merge(NAME)
                except NotMergeableError:
                    continue
                with torch.no_grad():
                    assert_same(beside(x), base, f"{label}: {other} beside the merged weight")
                    assert_close(subject(), adapted, TIGHT, f"{label}: the output, merged")
                subject.adapters.unmerge()
                assert model.head.weight is model.embed.weight, f"{label}: unmerged, the weights are not tied again"
        if not done:
            skip("the type acts on neither of two tied weights")

    def test_shared_modules(self) -> None:
        """A module that a forward calls twice has the adapter in both calls, each as if it were alone: within 1e-10."""
        done = 0
        for subject, alone in zip(self._subjects_at("mlp.up"), self._subjects_at("mlp.up"), strict=True):
            model, other = subject.model, alone.model
            if not isinstance(model, ToyMixture) or not isinstance(other, ToyMixture):
                continue
            done += 1
            calls: list[tuple[Tensor, Tensor]] = []
            handle = model.twice.register_forward_hook(lambda module, args, y, calls=calls: calls.append((args[0], y)))
            subject.bits()
            handle.remove()
            assert len(calls) == 2, f"{subject.label}: {len(calls)} calls of a module that is called twice"
            for x, y in reversed(calls):  # in another order: nothing of the one call may reach the other
                with torch.no_grad(), alone.adapters.activated(NAME):
                    with alone.given(3):
                        again = other.twice(x)
                    assert_close(y, again, TIGHT, f"{subject.label}: one of two calls, and that call alone")
                with torch.no_grad(), alone.adapters.disabled():
                    assert not torch.equal(y, other.twice(x)), f"{subject.label}: one of two calls is the base's"
        if not done:
            skip("the type does not act on a module that is called twice")

    def test_compiled(self) -> None:
        """Under torch.compile, as one graph, the output is the eager one within 1e-10, also at another weight."""
        seen: set[str] = set()
        for subject in self.subjects():
            modality = subject.label.split()[0]
            if modality in seen:
                continue
            if len(seen) == _COMPILED:
                break
            seen.add(modality)
            torch.compiler.reset()
            compiled = torch.compile(subject.model, backend="eager", fullgraph=True)
            args, kwargs = subject.example.inputs(3, subject.dtype)
            scalable = all(module.scalable for module in subject.adapters.modules(NAME).values())
            choices: list[Any] = [{NAME: 0.5}, NAME] if scalable else [NAME]
            for choice in choices:
                subject.adapters.activate(choice)
                with torch.no_grad(), subject.given(3):
                    assert_close(compiled(*args, **kwargs), subject(), TIGHT, f"{subject.label}: compiled, {choice}")
        torch.compiler.reset()

    def test_checkpointed(self) -> None:
        """With activation checkpointing, of either kind, gradients are those without, within 1e-10."""
        for subject in self.subjects():
            grads = []
            for reentrant in (None, True, False):
                subject.model.zero_grad(set_to_none=True)
                _forward(subject, reentrant).square().mean().backward()
                grads.append([p.grad.clone() for p in subject.adapters.parameters(NAME) if p.grad is not None])
            assert len(grads[0]) == len(subject.trained)
            for kind, found in zip(("reentrant", "non-reentrant"), grads[1:], strict=True):
                for one, expected in zip(found, grads[0], strict=True):
                    assert_close(one, expected, TIGHT, f"{subject.label}: a gradient with {kind} checkpointing")

    def test_threads(self) -> None:
        """Threads at once, two with the adapter and other inputs, one without it: the bits are those one by one."""
        for subject in self.subjects():
            work: list[tuple[str | None, int]] = [(NAME, 3), (NAME, 2), (None, 3)]
            expected = [_repeat(subject, threading.Barrier(1), choice, batch)[0] for choice, batch in work]
            together = threading.Barrier(len(work))
            with ThreadPoolExecutor(len(work)) as pool:
                running = [pool.submit(_repeat, subject, together, choice, batch) for choice, batch in work]
            for (choice, batch), one, y in zip(work, running, expected, strict=True):
                for found in one.result():  # raises what the thread has raised
                    assert_same(found, y, f"{subject.label}: {choice}, {batch} rows, beside other threads")


@torch.no_grad()
def _repeat(subject: Subject, together: threading.Barrier, choice: str | None, batch: int) -> list[Tensor]:
    together.wait(timeout=60)
    return [subject.run(choice, batch) for _ in range(3)]


class _Whole(nn.Module):
    """A subject's model as one function of a tensor that requires grad, as reentrant checkpointing wants it."""

    def __init__(self, subject: Subject) -> None:
        super().__init__()
        self.call = subject

    def forward(self, anchor: Tensor) -> Tensor:
        """The output, plus nothing."""
        return self.call() + 0 * anchor


def _forward(subject: Subject, reentrant: bool | None) -> Tensor:
    anchor = torch.zeros((), dtype=subject.dtype, requires_grad=True)
    whole = _Whole(subject)
    if reentrant is None:
        return whole(anchor)
    return cast("Tensor", checkpoint(whole, anchor, use_reentrant=reentrant))
