"""Weight and norm points: what an adapter does there is what a change of the weight's own rows does, and it arrives."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.errors import AdapterKitError
from adapterkit.points import InjectionPoint, NormPoint, ParameterPoint, Span, WeightPoint
from adapterkit.testing.proofs.attentions import Calls
from adapterkit.testing.proofs.bench import NAME, Bench, convicted, judged
from adapterkit.testing.proofs.verdicts import Verdict
from adapterkit.testing.subject import randomise

_SPREAD = 0.1
_LORA = ak.LoRA(rank=2)
_HEARD, _USED = 1e-12, 1e-9
"""Of the sum of the outputs' sizes, what a weight's share must be to be no rounding: an adapter's, the base's own.

A router that chooses one expert and gives it all of the weight has a gradient of rounding alone.
"""

_UNDIFFERENTIABLE = (RuntimeError, NotImplementedError, AssertionError)
"""What a backward ends in where there is none, or where a model, such as Reformer, has one in training alone."""


def prove_weights(bench: Bench, points: Sequence[InjectionPoint]) -> list[Verdict]:
    """Verdicts on weight points."""
    found = [point for point in points if isinstance(point, WeightPoint)]
    low = [point for point in found if _LORA.accepts(point) is None]
    high = [point for point in found if _LORA.accepts(point) is not None]
    return [*_proven(bench, low, _LORA), *_proven(bench, high, ak.Trainable(part="weight"))]


def prove_norms(bench: Bench, points: Sequence[InjectionPoint]) -> list[Verdict]:
    """Verdicts on norm points."""
    return _proven(bench, [point for point in points if isinstance(point, NormPoint)], ak.Trainable())


def _proven(bench: Bench, points: Sequence[ParameterPoint], config: ak.AdapterConfig) -> list[Verdict]:
    if not points:
        return []
    wrong = _misshapen(bench, points)
    sound = [point for point in points if point.id not in wrong]
    wrong |= convicted(sound, lambda some: _as_rows(bench, some, config))
    sound = [point for point in sound if point.id not in wrong]
    idle = dict(_idle(bench, sound, config))
    wrong |= {key: told for key, told in idle.items() if told == _PASSED_BY}
    wrong |= _roles(bench, [point for point in sound if point.id not in idle], config)
    return judged(points, wrong, idle, lambda point: "")


_PASSED_BY = "the output depends on this weight, and an adapter there changes nothing: is it read, and not called?"


def _misshapen(bench: Bench, points: Sequence[ParameterPoint]) -> dict[str, str]:
    found: dict[str, str] = {}
    for point in points:
        weight = _parameter(bench.model, point, point.layout.parameter)
        if weight is None:
            continue  # a layer that keeps its weight otherwise, such as with weight norm
        shape = tuple(_rows(weight.detach(), point).shape)
        if shape != point.shape:
            found[point.id] = f"says the shape {point.shape}, and its rows of the weight are {shape}"
    return found


def _parameter(model: nn.Module, point: ParameterPoint, name: str) -> nn.Parameter | None:
    return model.get_submodule(point.path)._parameters.get(name)


def _as_rows(bench: Bench, points: Sequence[InjectionPoint], config: ak.AdapterConfig) -> None:
    """Adapters at these points give what the base gives with its weights changed alike, by hand and merged."""
    with bench.adapted(config, points) as adapters:
        randomise(adapters, NAME, scale=_SPREAD)
        acting = bench.outputs()
        single = _single(bench.model, points)
        with adapters.activated(_only(single)):
            expected = bench.outputs()
        with adapters.disabled(), _changed(bench.model, single, adapters):
            bench.same(expected, "not what a change of the weight's rows does")
        with contextlib.suppress(AdapterKitError), adapters.merged(NAME):  # tied weights may refuse
            bench.same(acting, "merged, not what it is unmerged")
    bench.same(bench.base, "after detaching, not the base", 0.0)


def _only(points: Sequence[InjectionPoint]) -> Any:
    ids = {point.id for point in points}
    return {NAME: lambda point, step: float(point.id in ids)}


def _single(model: nn.Module, points: Sequence[InjectionPoint]) -> list[ParameterPoint]:
    """The points whose weight is a parameter of their own, and not another module's too."""
    owners = Counter(id(held) for module in model.modules() for held in module._parameters.values() if held is not None)
    found = [point for point in points if isinstance(point, ParameterPoint)]
    held = [(point, _parameter(model, point, point.layout.parameter)) for point in found]
    return [point for point, parameter in held if parameter is not None and owners[id(parameter)] == 1]


@contextlib.contextmanager
def _changed(model: nn.Module, points: Sequence[ParameterPoint], adapters: ak.Adapters) -> Iterator[None]:
    """The base's own parameters with what the adapters add, written here by rows and columns."""
    modules = adapters.modules(NAME)
    kept: dict[int, tuple[nn.Parameter, Tensor]] = {}
    try:
        with torch.no_grad():
            for point in points:
                held = [
                    _parameter(model, point, name) for name in (point.layout.parameter, point.layout.bias_parameter)
                ]
                for parameter in held:
                    if parameter is not None:
                        kept.setdefault(id(parameter), (parameter, parameter.detach().clone()))
                _write(point, modules[point.id], held)
        yield
    finally:
        with torch.no_grad():
            for parameter, value in kept.values():
                parameter.copy_(value)


def _write(point: ParameterPoint, module: ak.AdapterModule, held: Sequence[nn.Parameter | None]) -> None:
    weight, bias = held
    if weight is None:
        return
    rows = _rows(weight.detach(), point)
    own = None if bias is None else _biases(bias.detach(), point)
    merged, shifted = module.merged(rows.clone(), None if own is None else own.clone())
    _put(weight, point, merged)
    if bias is not None and own is not None and shifted is not None:
        entry = bias[point.layout.index] if point.layout.index is not None else bias
        entry[_numbers(point.span, len(entry))] = shifted.to(bias)


def _seen(weight: Tensor, point: ParameterPoint) -> Tensor:
    """A view of one weight as [out, in, ...]."""
    one = weight if point.layout.index is None else weight[point.layout.index]
    return one.mT if point.form in ("linear_t", "embedding") else one


def _rows(weight: Tensor, point: ParameterPoint) -> Tensor:
    """A copy of what is the point's of a module's weight: its rows and columns."""
    seen = _seen(weight, point)
    rows = seen[_numbers(point.span, seen.shape[0])]
    return rows if point.in_span is None else rows[:, _numbers(point.in_span, seen.shape[1])]


def _biases(bias: Tensor, point: ParameterPoint) -> Tensor:
    entry = bias if point.layout.index is None else bias[point.layout.index]
    return entry[_numbers(point.span, len(entry))]


def _put(weight: Tensor, point: ParameterPoint, values: Tensor) -> None:
    seen, values = _seen(weight, point), values.to(weight)
    rows = _numbers(point.span, seen.shape[0])
    if point.in_span is None:
        seen[rows] = values
    else:
        seen[rows[:, None], _numbers(point.in_span, seen.shape[1])[None]] = values


def _numbers(span: Span | None, count: int) -> Tensor:
    """The numbers of a span's rows, as its definition says them: `size` from `start` of each group of `step`."""
    if span is None:
        return torch.arange(count)
    step = span.step or 0
    return torch.tensor([group * step + span.start + i for group in range(span.count) for i in range(span.size)])


def _idle(bench: Bench, points: Sequence[ParameterPoint], config: ak.AdapterConfig) -> Iterator[tuple[str, str]]:
    """The points that change no output, with the reason."""
    if not points:
        return
    with bench.adapted(config, points) as adapters:
        randomise(adapters, NAME, scale=_SPREAD)
        felt, used = _felt(bench, adapters, points)
        silent = set(_silent(bench, adapters, [point for point in points if point.id not in felt]))
        for point in points:
            if point.id not in silent:
                continue
            twin = _twin(bench, point) if point.id in used else ""
            if point.id in used and not twin:
                yield point.id, _PASSED_BY
                continue
            ran = point.path in bench.ran
            told = "what it makes arrives in no output of these calls" if ran else "no call runs this module"
            yield point.id, f"{told}, and its weight is that of {twin}" if twin else told


def _twin(bench: Bench, point: ParameterPoint) -> str:
    """Path of a module that runs and has the very weight of the point's; "" where there is none."""
    own = _parameter(bench.model, point, point.layout.parameter)
    modules = ((path, module) for path, module in bench.model.named_modules() if path in bench.ran - {point.path})
    return next(
        (path for path, one in modules if any(held is own for held in one._parameters.values() if held is not None)), ""
    )


def _silent(bench: Bench, adapters: ak.Adapters, points: Sequence[ParameterPoint]) -> Iterator[str]:
    """Ids of the points whose adapters change no output, found by halves."""
    if not points:
        return
    with adapters.activated(_only(points)):
        changes = bench.changes()
    if not changes:
        yield from (point.id for point in points)
    elif len(points) > 1:
        middle = len(points) // 2
        yield from _silent(bench, adapters, points[:middle])
        yield from _silent(bench, adapters, points[middle:])


def _felt(bench: Bench, adapters: ak.Adapters, points: Sequence[ParameterPoint]) -> tuple[set[str], set[str]]:
    """Ids of the points whose adapters, and of those whose own weights, have a gradient of the outputs."""
    felt, used = set[str](), set[str]()
    modules = adapters.modules(NAME)
    bench.model.requires_grad_(True)
    try:
        for run in bench.calls.values():
            with contextlib.suppress(*_UNDIFFERENTIABLE):  # is tried one by one
                output = run()
                if not output.requires_grad:
                    continue
                tensors = {point.id: list(modules[point.id].parameters()) for point in points}
                felt |= _with_gradient(output, tensors)
                used |= _used(bench.model, points, output)
    finally:
        bench.model.requires_grad_(False)
    return felt, used


def _used(model: nn.Module, points: Sequence[ParameterPoint], output: Tensor) -> set[str]:
    held = [(point, _parameter(model, point, point.layout.parameter)) for point in points]
    own = [(point, parameter) for point, parameter in held if parameter is not None]
    grads = _gradients(_score(output), [parameter for _, parameter in own])
    least = _USED * float(_score(output.detach().abs()))
    shares = ((point, _share(grad, held, point)) for (point, held), grad in zip(own, grads, strict=True))
    return {point.id for point, share in shares if share > least}


def _share(grad: Tensor | None, held: Tensor, point: ParameterPoint | None = None) -> float:
    """How much of a sum a tensor, or a point's rows of it, makes: the sizes of its entries, each times its gradient."""
    if grad is None:
        return 0.0
    product = (grad * held.detach()).abs()
    return float((product if point is None else _rows(product, point)).sum())


def _with_gradient(output: Tensor, tensors: Mapping[str, Sequence[Tensor]]) -> set[str]:
    flat = [(key, tensor) for key, some in tensors.items() for tensor in some]
    grads = _gradients(_score(output), [tensor for _, tensor in flat])
    least = _HEARD * float(_score(output.detach().abs()))
    return {key for (key, tensor), grad in zip(flat, grads, strict=True) if _share(grad, tensor) > least}


def _gradients(score: Tensor, tensors: Sequence[Tensor]) -> Sequence[Tensor | None]:
    unique = list({id(tensor): tensor for tensor in tensors}.values())
    found = torch.autograd.grad(score, unique, retain_graph=True, allow_unused=True) if unique else ()
    by_id = {id(tensor): grad for tensor, grad in zip(unique, found, strict=True)}
    return [by_id[id(tensor)] for tensor in tensors]


def _score(output: Tensor) -> Tensor:
    """A number of all entries, whose gradients cancel nowhere."""
    weights = torch.linspace(1, 2, output.numel(), dtype=output.dtype).view(output.shape)
    return (output * weights).sum()


_PARTS = ("q", "k", "v")


def _roles(bench: Bench, points: Sequence[ParameterPoint], config: ak.AdapterConfig) -> dict[str, str]:
    """What is wrong with roles of queries, keys and values, as torch's attention is given them in their module."""
    groups = _attentions(bench.model, points)
    if not groups:
        return {}
    found: dict[str, str] = {}
    with bench.adapted(config, [point for group in groups.values() for point in group]) as adapters:
        randomise(adapters, NAME, scale=_SPREAD)
        bench.model.requires_grad_(True)
        try:
            for run in bench.calls.values():
                with contextlib.suppress(*_UNDIFFERENTIABLE):
                    found |= _mistaken(bench, groups, adapters.modules(NAME), run)
        finally:
            bench.model.requires_grad_(False)
    return found


def _attentions(model: nn.Module, points: Sequence[ParameterPoint]) -> dict[str, list[ParameterPoint]]:
    """Path of the module around -> its points of queries, keys and values."""
    found: dict[str, list[ParameterPoint]] = {}
    for point in points:
        first, _, part = point.role.partition(".")
        if first in ("attn", "cross") and part in _PARTS:
            found.setdefault(point.path.rpartition(".")[0], []).append(point)
    return {path: group for path, group in found.items() if path}


def _mistaken(
    bench: Bench, groups: Mapping[str, Sequence[ParameterPoint]], modules: Mapping[str, Any], run: Callable[[], Tensor]
) -> dict[str, str]:
    calls = Calls(bench.model, list(groups))
    with calls.watching():
        run()
    found: dict[str, str] = {}
    for path, given in calls.arguments.items():
        if calls.seen[path] != [1]:
            continue
        tensors = {point.id: list(modules[point.id].parameters()) for point in groups[path]}
        reaches = {part: _reached(tensor, tensors) for part, tensor in zip(_PARTS, given, strict=True)}
        for point in groups[path]:
            part = point.role.rpartition(".")[2]
            into = [name for name in _PARTS if point.id in reaches[name]]
            if into and part not in into:
                found[point.id] = f"its output is the {_WORDS[into[0]]} of the attention"
    return found


_WORDS = {"q": "queries", "k": "keys", "v": "values"}


def _reached(tensor: Tensor, tensors: Mapping[str, Sequence[Tensor]]) -> set[str]:
    return _with_gradient(tensor, tensors) if tensor.requires_grad else set()
