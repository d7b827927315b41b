"""What a check works with: a model with an adapter on it, and comparisons that say what they compared."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn
from unittest import SkipTest

import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.testing.models import EXAMPLES, Example
from adapterkit.testing.placements import Placement, chosen, placement_at, placements, points_of

NAME = "mine"
TIGHT, LOOSE = 1e-10, 1e-5
"""Relative tolerances in float64 and float32: of the largest value compared."""

_MOVE, _TRIES = 0.3, 12
_LEAST, _MOST = 0.01, 1.0
"""What moving an adapter's parameters should change an output by, relative to the base's largest value."""


@dataclass
class Subject:
    """A model of one modality with the adapter under test on it, its parameters moved away from their start.

    Attributes:
        label: The modality, and where the adapter acts.
        model, adapters: In evaluation mode.
        config: What was added, as `NAME`.
        example: Makes inputs.
        dtype: Of the model.
        move: Standard deviation of what its parameters were moved by.
        made: Examples of side inputs, by number of rows and seed.
    """

    label: str
    model: nn.Module
    adapters: ak.Adapters
    config: ak.AdapterConfig
    example: Example
    dtype: torch.dtype
    move: float = 0.0
    made: dict[tuple[int, int], dict[str, Tensor]] = dataclasses.field(default_factory=dict)

    def run(self, choice: Any = NAME, batch: int = 3) -> Tensor:
        """The output with this choice active."""
        with self.adapters.activated(choice):
            return self(batch)

    @torch.no_grad()
    def bits(self, choice: Any = NAME) -> Tensor:
        """`run` without grad, to compare bit for bit: torch takes other kernels where something requires grad."""
        return self.run(choice)

    def __call__(self, batch: int = 3) -> Tensor:
        """The output with whatever is active."""
        args, kwargs = self.example.inputs(batch, self.dtype)
        with self.given(batch):
            return self.model(*args, **kwargs)

    def row(self, index: int, choice: Any, batch: int = 3) -> Tensor:
        """The output for one row of the batch alone."""
        args, kwargs = self.example.inputs(batch, self.dtype)
        one = slice(index, index + 1)
        with self.adapters.activated(choice), self.given(batch, one):
            return self.model(*(a[one] for a in args), **{key: value[one] for key, value in kwargs.items()})

    def gradients(self, choice: Any = NAME) -> tuple[Tensor, Tensor]:
        """The output, and the gradients of a scalar of it for all parameters of the adapter, in one vector."""
        y = self.run(choice)
        return y.detach(), flat_gradients(scalar(y), self.trained)

    @property
    def trained(self) -> list[nn.Parameter]:
        """The adapter's parameters, without those that its type holds."""
        return [parameter for parameter in self.adapters.parameters(NAME) if parameter.requires_grad]

    def given(self, batch: int, rows: slice = slice(None)) -> contextlib.AbstractContextManager[None]:
        """A block with the side inputs that the adapter reads, always the same for a batch, or some rows of them."""
        if not any(type(self.adapters.config(name)) is type(self.config) for name in self.adapters):
            return contextlib.nullcontext()
        return self.adapters.context(**{name: value[rows] for name, value in self.side_inputs(batch).items()})

    def side_inputs(self, batch: int, seed: int = 4) -> dict[str, Tensor]:
        """The config's example of what it reads; floating-point tensors in the model's dtype."""
        if (batch, seed) not in self.made:  # threads that run what was run before draw no random numbers
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed)
                self.made[batch, seed] = dict(self.config.example_context(self.points, batch))
        found = self.made[batch, seed].items()
        return {name: value.to(self.dtype) if value.is_floating_point() else value for name, value in found}

    @property
    def points(self) -> list[ak.InjectionPoint]:
        """Where the adapter acts."""
        return chosen(self.config, points_of(self.example))


def randomise(adapters: ak.Adapters, name: str, seed: int = 0, scale: float = _MOVE) -> None:
    """Moves every parameter away from its start: an adapter without an effect would hide errors."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapters.parameters(name):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(scale * noise.to(parameter))


@torch.no_grad()
def move(adapters: ak.Adapters, name: str, run: Callable[[], Tensor], seed: int = 0) -> float:
    """`randomise` by so much that it changes the output by about its own size at most: some types scale by hundreds.

    Args:
        adapters: With the adapter on it.
        name: The adapter.
        run: The model's output.
        seed: Of the noise.

    Returns:
        The standard deviation of what was added to the parameters.
    """
    start = [parameter.clone() for parameter in adapters.parameters(name)]
    with adapters.disabled():
        base = run()
    scale = _MOVE
    for _ in range(_TRIES):
        for parameter, value in zip(adapters.parameters(name), start, strict=True):
            parameter.copy_(value)
        randomise(adapters, name, seed, scale)
        with adapters.activated(name):
            effect = _relative(run(), base)
        if _LEAST <= effect <= _MOST or effect == 0:
            break
        scale *= _factor(effect)
    return scale


def _factor(effect: float) -> float:
    """What to change a move by: norms hide how much too large it is."""
    if not math.isfinite(effect):
        return 1e-3
    return min(0.5 / effect, 10.0) if effect < _LEAST else max(min(0.5 / effect, 0.2), 1e-3)


def _relative(y: Tensor, base: Tensor) -> float:
    """The largest change, over the largest value of the base; of the output itself where its shape is another."""
    change = y - base if y.shape == base.shape else y
    return float(change.abs().max()) / max(float(base.abs().max()), 1e-12)


Prepare = Callable[[ak.Adapters, ak.AdapterConfig], None]


def subjects(
    config: ak.AdapterConfig,
    dtype: torch.dtype = torch.float64,
    *,
    seed: int = 0,
    fresh: bool = False,
    each: bool = False,
    prepare: Prepare | None = None,
) -> Iterator[Subject]:
    """The adapter on every tiny model where it can act, at every point that it accepts; its own targets are among them.

    Args:
        config: Of the type under test.
        dtype: Of the models.
        seed: Of the start values, and of what they are moved by.
        fresh: Leave the start values.
        each: At its own targets alone too, before.
        prepare: Adds what the config needs to be there before.

    Raises:
        AssertionError: It can act on none of them.
    """
    found = False
    for example in EXAMPLES:
        places = placements(config, example)
        for place in places if each else places[-1:]:
            found = True
            yield _subject(example, place, dtype, seed, fresh, prepare)
    assert found, f"{config!r} can act on none of the tiny models ({', '.join(e.name for e in EXAMPLES)})"


def subjects_at(role: str, config: ak.AdapterConfig, prepare: Prepare | None = None) -> Iterator[Subject]:
    """The adapter at the points of one role alone, on every tiny model where it can act there."""
    for example in EXAMPLES:
        place = placement_at(role, config, example)
        if place is not None:
            yield _subject(example, place, torch.float64, 0, False, prepare)


def _subject(
    example: Example,
    place: Placement,
    dtype: torch.dtype,
    seed: int,
    fresh: bool,
    prepare: Prepare | None,
) -> Subject:
    model = example.make().to(dtype).eval()
    adapters = ak.Adapters(model)
    if prepare is not None:
        prepare(adapters, place.config)
    adapters.add(NAME, place.config, seed=seed)
    made = Subject(f"{example.name} ({place.where})", model, adapters, place.config, example, dtype)
    if fresh:
        return made
    if seed not in place.moves and dtype != torch.float64:
        _subject(example, place, torch.float64, seed, fresh, prepare)  # finds it
    if seed in place.moves:
        randomise(adapters, NAME, seed, place.moves[seed])
    else:
        place.moves[seed] = move(adapters, NAME, made, seed)
    made.move = place.moves[seed]
    return made


def scalar(y: Tensor) -> Tensor:
    """A weighted sum of an output, whose weights are always the same."""
    generator = torch.Generator().manual_seed(3)
    return (y * torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y)).sum()


def flat_gradients(value: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    """The gradients of a scalar, in one vector; zeros for what it does not depend on."""
    grads = torch.autograd.grad(value, parameters, allow_unused=True)
    pairs = zip(grads, parameters, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).detach().flatten() for g, p in pairs])


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    """Raises AssertionError where they differ by more than `tolerance` times the largest value."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    scale = max(float(expected.detach().abs().max()) if expected.numel() else 0.0, 1.0)
    difference = float((actual.detach() - expected.detach()).abs().max()) if expected.numel() else 0.0
    assert difference <= tolerance * scale, (  # a NaN is not less, and fails too
        f"{what}: they differ by {difference:.3g}, and {tolerance:g} x {scale:.3g} is allowed"
    )


def assert_same(actual: Tensor, expected: Tensor, what: str) -> None:
    """Raises AssertionError where any bit differs."""
    if not torch.equal(actual, expected):
        same = actual.shape == expected.shape
        by = f"by up to {float((actual - expected).abs().max()):.3g}" if same else f"in shape, {tuple(actual.shape)}"
        raise AssertionError(f"{what}: they must be the same bit for bit, and differ {by}")


@contextlib.contextmanager
def expecting(error: type[Exception], mention: str, otherwise: str) -> Iterator[None]:
    """Raises AssertionError where the block raises no such error, or one that does not mention a word."""
    try:
        yield
    except error as raised:
        if mention not in str(raised):
            raise AssertionError(f"the error does not mention {mention!r}: {raised}") from raised
    else:
        raise AssertionError(otherwise)


def skip(reason: str) -> NoReturn:
    """Ends a check that does not apply. pytest knows this exception too."""
    raise SkipTest(reason)
