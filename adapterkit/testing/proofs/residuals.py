"""Output points: the residual equation, `x + y` or `x + c y`, seen where the model computes it."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import adapterkit as ak
from adapterkit.points import InjectionPoint, Kind, OutputPoint
from adapterkit.testing import sublayers
from adapterkit.testing.proofs.bench import NAME, Bench, brief, convicted, judged
from adapterkit.testing.proofs.verdicts import Verdict

_aten: Any = torch.ops.aten
_SUMS = frozenset({_aten.add.Tensor, _aten.add_.Tensor, _aten.addcmul.default, _aten.addcmul_.default})
_SCALING = frozenset({_aten.mul.Tensor, _aten.mul_.Tensor, _aten.div.Tensor, _aten.div_.Tensor})
_KEEPING = _SCALING | frozenset(
    {
        _aten.mul.Scalar, _aten.div.Scalar,
        _aten.view.default, _aten._unsafe_view.default, _aten.reshape.default, _aten._reshape_alias.default,
        _aten.transpose.int, _aten.permute.default, _aten.t.default, _aten.clone.default, _aten.expand.default,
        _aten.unsqueeze.default, _aten.squeeze.dim, _aten.squeeze.default, _aten.slice.Tensor, _aten.select.int,
        _aten.alias.default, _aten.detach.default, _aten._to_copy.default, _aten.split.Tensor, _aten.cat.default,
        _aten.split_with_sizes.default, _aten.unbind.int, _aten.index.Tensor, _aten.roll.default, _aten.copy_.default,
        _aten.constant_pad_nd.default, _aten.index_add_.default, _aten.index_copy_.default, _aten.movedim.intlist,
        _aten.chunk.default, _aten.unflatten.int, _aten.native_dropout.default, _aten.lift_fresh.default,
    }
)  # fmt: skip
"""Operations that only scale, move or cut: what comes out of them is still that output, or that stream."""


@dataclass
class Claim:
    """What a point says in the forward under way: y is added to x."""

    x: Tensor
    y: Tensor
    value: Tensor
    found: str = ""


_DEPTH = 6
"""So many operations may be between x and what the output is added to."""


class Sums(TorchDispatchMode):
    """Watches a forward for the sums of each point's residual stream and output, whatever they are scaled by."""

    supports_higher_order_operators = True  # they are operations as others are, such as an attention with a function

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """What is compiled, as flex attention compiles itself, is one operation: no sum is looked for inside."""
        return True

    def __init__(self) -> None:
        super().__init__()
        self.claims: dict[str, list[Claim]] = {}
        self._open: list[Claim] = []
        self._outputs, self._touched = Marks(), Marks()
        self._origins: dict[int, tuple[Tensor, Sequence[Tensor]]] = {}

    def claim(self, key: str, x: Tensor, y: Tensor) -> None:
        """A point is passed: from here on its sum is looked for."""
        made, place = Claim(x, y, x.detach().clone()), len(self._open)
        self.claims.setdefault(key, []).append(made)
        self._open.append(made)
        self._outputs.put(y, {place})
        self._touched.put(y, {place})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = list(_tensors([*args, *(kwargs or {}).values()]))
        if func in _SUMS and len(given) > 1:
            self._look(given)
        result = func(*args, **(kwargs or {}))
        made = list(_tensors([result]))
        self._touched.pass_on(given, made)
        if func in _KEEPING or func in _SUMS:
            self._origins |= {id(one): (one, given) for one in made}  # an id is its own for as long as it is kept
            # Scaled by something that is made of it, as a norm does, it is no longer that output.
            twice = self._touched.shared(given) if func in _SCALING else set[int]()
            self._outputs.pass_on(given, made, twice)
        return result

    def _look(self, given: Sequence[Tensor]) -> None:
        for first, others in ((given[0], given[1:]), (given[1], given[:1])):
            for place in set[int]().union(*(self._outputs.of(one) for one in others)):
                claim = self._open[place]
                if not claim.found and (told := self._is_stream(first, claim)):
                    plain = any(one is claim.y or _equal(one, claim.y) for one in others)
                    claim.found = "x + y" if told == "x" and plain else "x + c y"

    def _is_stream(self, tensor: Tensor, claim: Claim) -> str:
        """Whether a tensor is x, or x scaled, moved, or with something added to it: parallel sublayers' outputs."""
        told, near = "x", [tensor]
        for _ in range(_DEPTH):
            if any(one is claim.x or _equal(one, claim.value) for one in near):
                return told
            told, near = "c x", [part for one in near for part in self._origins.get(id(one), (one, ()))[1]]
        return ""


class Marks:
    """Which claims a tensor belongs to."""

    def __init__(self) -> None:
        self._places: dict[int, set[int]] = {}
        self._kept: list[Tensor] = []  # an id is a tensor's own for as long as that lives

    def of(self, tensor: Tensor) -> set[int]:
        """The claims of a tensor."""
        return self._places.get(id(tensor), set())

    def put(self, tensor: Tensor, places: set[int]) -> None:
        """Marks a tensor."""
        if places:
            self._places.setdefault(id(tensor), set()).update(places)
            self._kept.append(tensor)

    def pass_on(self, given: Sequence[Tensor], made: Sequence[Tensor], but: Collection[int] = ()) -> None:
        """Marks what was made as what it was made of."""
        places = set[int]().union(*(self.of(one) for one in given)).difference(but)
        for one in made:
            self.put(one, places)

    def shared(self, given: Sequence[Tensor]) -> set[int]:
        """The claims to which several of these belong."""
        counts = Counter(place for one in given for place in self.of(one))
        return {place for place, count in counts.items() if count > 1}


def _tensors(args: Iterable[Any]) -> Iterable[Tensor]:
    for value in args:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether they are the same numbers, in whatever order of dimensions a model adds them up."""
    if one.numel() != other.numel():
        return False
    if one.shape[-1:] == other.shape[-1:] and torch.equal(one.reshape(-1), other.reshape(-1)):
        return True
    moved = one.movedim(1, -1) if one.ndim > 2 and one.shape[1] == other.shape[-1] else None
    return moved is not None and torch.equal(moved.reshape(-1), other.reshape(-1))


class WitnessModule(ak.AdapterModule):
    """Gives back a sublayer's output, and tells who listens what it is added to."""

    def __init__(self) -> None:
        super().__init__()
        self.listener: Sums | None = None

    def forward(self, x: Tensor, base: ak.adapter.Base) -> Tensor:
        """`base(x)`."""
        y = base(x)
        if self.listener is not None:
            self.listener.claim(self.at, x, y)
        return y


@dataclass(frozen=True)
class Witness(ak.AdapterConfig):
    """A witness at sublayers' outputs."""

    kinds: ClassVar[frozenset[Kind]] = frozenset({"output"})
    targets: str = "*"

    def build(self, point: InjectionPoint) -> WitnessModule:
        return WitnessModule()


class EditModule(ak.AdapterModule):
    """Adds noise to what a whole block gives."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = features
        self.said = ""

    def forward(self, x: Tensor, base: ak.adapter.Base) -> Tensor:
        """`base(x)` and the same noise at every position."""
        y = base(x)
        if y.shape[-1] != self.features:
            self.said = f"says {self.features} features, and the block gives {tuple(y.shape)}"
        if x.shape[:1] != y.shape[:1]:
            self.said = f"x is {tuple(x.shape)}, and the block gives {tuple(y.shape)}"
        noise = torch.linspace(-0.5, 1, y.shape[-1], dtype=y.dtype).sin()
        return y + noise


@dataclass(frozen=True)
class Edit(ak.AdapterConfig):
    """Changes the stream behind whole blocks."""

    kinds: ClassVar[frozenset[Kind]] = frozenset({"output"})
    targets: str = "*"

    def build(self, point: InjectionPoint) -> EditModule:
        return EditModule(point.out_features)


def prove_outputs(bench: Bench, points: Sequence[InjectionPoint]) -> list[Verdict]:
    """Verdicts on output points."""
    found = [point for point in points if isinstance(point, OutputPoint)]
    return [
        *_sublayers(bench, [point for point in found if not point.is_block]),
        *_blocks(bench, [point for point in found if point.is_block]),
    ]


@dataclass
class _Seen:
    ways: dict[str, str] = field(default_factory=dict[str, str])
    wrong: dict[str, str] = field(default_factory=dict[str, str])


def _sublayers(bench: Bench, points: Sequence[InjectionPoint]) -> list[Verdict]:
    if not points:
        return []
    seen = _Seen()

    def exact(some: Sequence[InjectionPoint]) -> None:
        with bench.adapted(Witness(), some):
            bench.same(bench.base, "the output where a sublayer's is given back", 0.0)

    seen.wrong |= convicted(points, exact)
    left = [point for point in points if point.id not in seen.wrong]
    for run in bench.calls.values():
        if left:
            _watch_sums(bench, left, run, seen)
    reached = [point for point in left if point.id in seen.ways or point.id in seen.wrong]
    sound = [point for point in reached if point.id not in seen.wrong]
    for call, run in bench.calls.items():
        _streams(bench, call, sound, run, seen)
    idle = {point.id: "no call runs this sublayer" for point in left if point not in reached}
    return judged(points, seen.wrong, idle, lambda point: seen.ways[point.id])


@torch.no_grad()
def _watch_sums(bench: Bench, points: Sequence[InjectionPoint], run: Callable[[], Tensor], seen: _Seen) -> None:
    with bench.adapted(Witness(), points) as adapters:
        modules: Any = adapters.modules(NAME)
        with Sums() as sums:
            for module in modules.values():
                module.listener = sums
            run()
    for key, claims in sums.claims.items():
        if any(not claim.found for claim in claims):
            claim = next(claim for claim in claims if not claim.found)
            seen.wrong[key] = f"its output {tuple(claim.y.shape)} is nowhere added to its x {tuple(claim.x.shape)}"
        else:
            ways = {claim.found for claim in claims} | ({seen.ways[key]} if key in seen.ways else set())
            seen.ways[key] = "x + y" if ways == {"x + y"} else "x + c y"


def _streams(bench: Bench, call: str, points: Sequence[InjectionPoint], run: Callable[[], Tensor], seen: _Seen) -> None:
    """What enters the norms around, and the order of a block's sublayers."""
    points = [point for point in points if point.id not in seen.wrong]
    if not points:
        return
    with bench.adapted(sublayers.Probe(), points) as adapters:
        try:
            probed = sublayers.probe(bench.model, adapters, points, run)
        except Exception as error:  # noqa: BLE001 - a model that cannot be differentiated is no claim's fault
            for point in points:
                seen.ways[point.id] += f"; not differentiated: {brief(error)}"
            return
    here = [point for point in points if point.id in probed.seen]
    for point in here:
        _note(seen, point, lambda point=point: sublayers.check_stream(call, point, probed))
    for first, second in itertools.permutations(here, 2):
        if (first.component, first.site) == (second.component, second.site):
            _note(seen, second, lambda one=first, two=second: sublayers.check_order(call, one, two, probed))


def _note(seen: _Seen, point: InjectionPoint, check: Callable[[], None]) -> None:
    try:
        check()
    except (AssertionError, RuntimeError) as error:
        seen.wrong.setdefault(point.id, brief(error).removeprefix("AssertionError: "))


def _blocks(bench: Bench, points: Sequence[InjectionPoint]) -> list[Verdict]:
    idle: dict[str, str] = {}

    def edited(some: Sequence[InjectionPoint]) -> None:
        with bench.adapted(Edit(), some) as adapters:
            changed = bench.changes()
            modules: Mapping[str, Any] = adapters.modules(NAME)
            for module in modules.values():
                if module.said:
                    raise AssertionError(module.said)
        if not changed and len(some) == 1:
            idle[some[0].id] = "a change of the block's output changes nothing"

    wrong: dict[str, str] = {}
    for point in points:
        wrong |= convicted([point], edited)
    return judged(points, wrong, idle, lambda point: "an edit arrives")
