"""The checks of a backend."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.backend import Backend
from adapterkit.errors import AdapterKitError
from adapterkit.kernels.weights import base_weight
from adapterkit.mapping.layouts import weight_layout
from adapterkit.mapping.parts import checked_parts, is_inside
from adapterkit.points import AttentionPoint, OutputPoint, ParameterPoint, Points, WeightPoint
from adapterkit.specs import BackendSpec
from adapterkit.testing import tables
from adapterkit.testing.proof import prove
from adapterkit.testing.reports import CheckReport, run_checks
from adapterkit.testing.subject import assert_same, randomise, skip

_SHOWN = 3


@dataclass(frozen=True)
class Sample:
    """A tiny model of the family.

    Attributes:
        make: A new model; it is moved to float64 and evaluation mode.
        args, kwargs: One batch. Floating-point tensors are moved to float64.
        output: Takes the tensor to compare out of what the model returns.
    """

    make: Callable[[], nn.Module]
    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] = None  # type: ignore[assignment]
    output: Callable[[Any], Tensor] = lambda returned: returned

    def model(self) -> nn.Module:
        """A new model, always with the same weights."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            return self.make().double().eval().requires_grad_(False)

    @torch.no_grad()
    def run(self, model: nn.Module) -> Tensor:
        """The output for the batch, without grad."""
        return self.call(model)

    def call(self, model: nn.Module) -> Tensor:
        """The output for the batch."""
        args = [_wide(value) for value in self.args]
        kwargs = {key: _wide(value) for key, value in (self.kwargs or {}).items()}
        return self.output(model(*args, **kwargs))


def _wide(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


class BackendConformance:
    """Every check of a backend. Derive from it and say what it maps.

        class TestMine(BackendConformance):
            backend = MyBackend
            samples = {"plain": Sample(lambda: MyModel(width=8), args=(torch.zeros(2, 5).long(),))}

    Attributes:
        backend: The class.
        samples: Tiny models of the family by name, of every variant that it maps.
        ignored: Paths of layers that are left out on purpose, such as a loss's.
        idle: Points (their ids) without an effect on these outputs on purpose, such as an expert that no token takes.
    """

    backend: ClassVar[type[Backend]]
    samples: ClassVar[Mapping[str, Sample]]
    ignored: ClassVar[frozenset[str]] = frozenset()
    idle: ClassVar[frozenset[str]] = frozenset()

    def each(self) -> Iterator[tuple[str, Sample, nn.Module, Points]]:
        """Every sample, a new model of it and its points."""
        for name, sample in self.samples.items():
            model = sample.model()
            yield name, sample, model, Points(self._points(model))

    def _points(self, model: nn.Module) -> list[ak.InjectionPoint]:
        backend = self.backend()
        parts = backend.parts(model).values()
        return [point for point in backend.points(model, backend.component) if not is_inside(point.path, parts)]

    def test_points_exist(self) -> None:
        """Every point's path leads to a module, its id is unique, and it bears its component's tag."""
        for name, _, model, points in self.each():
            assert len(points), f"{name}: the backend finds no points"
            ids = points.ids
            assert len(set(ids)) == len(ids), f"{name}: {next(i for i in ids if ids.count(i) > 1)} is there twice"
            for point in points:
                assert point.component == self.backend.component, f"{name}: {point.id} is tagged {point.component}"
                assert point.path in dict(model.named_modules()), f"{name}: {point.id}: no module at {point.path}"

    def test_parts_are_models_of_their_own(self) -> None:
        """Every part is a module with layers, inside no other part, and of a class that a backend claims."""
        for name, _, model, _ in self.each():
            for part, path in checked_parts(self.backend().parts(model), model).items():
                module = model.get_submodule(path)
                layers = any(weight_layout(one) is not None for one in module.modules())
                assert layers, f"{name}: {part} at {path} has no layer; leave it out of parts()"
                ak.get_plugin_manager().backend_for(module)

    def test_shapes_are_right(self) -> None:
        """At every weight point the module's canonical weight has the point's shape, its bias the point's width."""
        for name, _, model, points in self.each():
            for point in points:
                if not isinstance(point, ParameterPoint):
                    continue
                weight, bias = base_weight(model.get_submodule(point.path), point)
                found = None if weight is None else tuple(weight.shape)
                expected = point.shape
                assert found == expected, f"{name}: {point.id} says {expected}, the weight is {found}"
                width = point.out_features
                assert bias is None or len(bias) == width, f"{name}: {point.id}: the bias does not have {width} entries"

    def test_every_layer_is_mapped(self) -> None:
        """Every Linear, convolution and embedding is a point's module, or among `ignored`, and nothing else is."""
        for name, _, model, points in self.each():
            mapped = {point.path for point in points}
            parts = self.backend().parts(model).values()
            layers = {path for path, module in model.named_modules() if weight_layout(module) is not None}
            layers = {path for path in layers if not is_inside(path, parts)}  # for the parts' own backends
            missing = sorted(layers - mapped - self.ignored)
            assert not missing, f"{name}: no point at {', '.join(missing[:5])}; map it, or put it into `ignored`"

    def test_spans_share_out_their_module(self) -> None:
        """The spans of a fused projection do not overlap, and have every row of its weight (or column) among them."""
        for name, _, model, points in self.each():
            tables.check_spans(name, model, points)

    def test_roles_are_words(self) -> None:
        """A role is lower-case words joined by dots, the first of them one that families share, or no slip of one."""
        for name, _, _, points in self.each():
            for point in points:
                tables.check_role(name, point)

    def test_every_entry_is_found(self) -> None:
        """Every sublayer, attention and weight that is read of the backend's tables is in a sample, with its norms."""
        groups = list(tables.tables(self.backend))
        if not groups:
            skip("the backend has no table of groups in a class attribute")
        tables.check_entries(groups, {name: model for name, _, model, _ in self.each()})

    def test_mapping_needs_no_values(self) -> None:
        """On the meta device the points are the same: nothing is run, no weight is read."""
        for name, sample, _, points in self.each():
            with torch.device("meta"):
                model = sample.make()
            assert Points(self._points(model)) == points, f"{name}: other points on the meta device"

    def test_it_is_found(self) -> None:
        """`Adapters(model)` finds this backend by the model's class, as it was registered."""
        assert self._name() is not None, (
            f"{self.backend.__name__} is registered under no name: return a BackendSpec from "
            "adapterkit_register_backends in a plug-in that is installed, or registered with the plug-in manager"
        )
        for name, _, model, _ in self.each():
            spec = ak.get_plugin_manager().backend_for(model)
            assert spec.load() is self.backend, f"{name}: {type(model).__name__} is mapped by {spec.name}"

    def test_attaching_and_detaching_is_exact(self) -> None:
        """With adapters of every kind attached but nothing active, and after detaching, the output is the base's."""
        for name, sample, model, points in self.each():
            expected = sample.run(model)
            before = [(path, type(module), sorted(module.__dict__)) for path, module in model.named_modules()]
            keys = list(model.state_dict())
            adapters = self._adapters(model)
            for config in _probes(points):
                adapters.add(type(config).__name__, config)
            adapters.activate(None)
            assert_same(sample.run(model), expected, f"{name}: the output with nothing active")
            adapters.detach()
            after = [(path, type(module), sorted(module.__dict__)) for path, module in model.named_modules()]
            assert after == before, f"{name}: detaching left a trace"
            assert list(model.state_dict()) == keys, f"{name}: detaching left keys"
            assert_same(sample.run(model), expected, f"{name}: the output after detaching")

    def test_the_map_is_true(self) -> None:
        """What is said of each point is so in numbers, and each has an effect; see `adapterkit.testing.prove`."""
        for name, sample, model, _ in self.each():
            backend = self._registered()
            proof = prove(model, {name: functools.partial(sample.call, model)}, self.backend.component, backend=backend)
            doubted = [*proof.false, *(one for one in proof.unreached if one.point.id not in self.idle)]
            assert not doubted, f"{name}: " + "; ".join(f"{one.point.id}: {one.why}" for one in doubted[:_SHOWN])

    def test_copies(self) -> None:
        """`copy.deepcopy` and `pickle` of a model with adapters at every point give the same output."""
        for name, sample, model, points in self.each():
            plain = _pickled(model)
            adapters = self._adapters(model)
            for config in _probes(points):
                adapters.add(type(config).__name__, config)
                randomise(adapters, type(config).__name__)
            adapters.activate(list(adapters))
            expected = sample.run(model)
            assert_same(sample.run(copy.deepcopy(model)), expected, f"{name}: a deep copy's output")
            if plain is None:
                skip("the sample itself cannot be pickled")
            assert_same(sample.run(pickle.loads(pickle.dumps(model))), expected, f"{name}: an unpickled model's output")

    def _name(self) -> str | None:
        """The backend's registered name, or None."""
        specs = ak.get_plugin_manager().backends().values()
        return next((spec.name for spec in specs if _target(spec) is self.backend), None)

    def _registered(self) -> str:
        name = self._name()
        if name is None:
            skip("the backend is not registered; see it_is_found")
        return name

    def _adapters(self, model: nn.Module) -> ak.Adapters:
        return ak.Adapters(model, backend=self._registered())


def _pickled(model: nn.Module) -> bytes | None:
    """A model's bytes, or None where it is of a class that cannot be pickled: one of a function."""
    try:
        return pickle.dumps(model)
    except (AttributeError, TypeError, pickle.PicklingError):
        return None


def _target(spec: BackendSpec) -> Any:
    """A registered backend's class; None where its library is not installed."""
    try:
        return spec.load()
    except AdapterKitError:
        return None


def _probes(points: Sequence[ak.InjectionPoint]) -> list[ak.AdapterConfig]:
    """A config of a built-in type for the points of each kind."""
    made: list[ak.AdapterConfig] = []
    lora = ak.LoRA(rank=2)
    weights = [point for point in points if isinstance(point, WeightPoint) and lora.accepts(point) is None]
    if weights:
        made.append(ak.LoRA(rank=2, targets=_targets(weights)))
    if outputs := [point for point in points if isinstance(point, OutputPoint)]:
        made.append(ak.Bottleneck(targets=_targets(outputs), width=4, activation="gelu"))
    if attention := [point for point in points if isinstance(point, AttentionPoint)]:
        made.append(ak.Prefix(targets=_targets(attention), length=2))
    return made


def _targets(points: Sequence[ak.InjectionPoint]) -> str:
    return " ".join(dict.fromkeys(point.role for point in points))


def check_backend(
    backend: type[Backend],
    samples: Mapping[str, Sample],
    ignored: frozenset[str] = frozenset(),
    idle: frozenset[str] = frozenset(),
) -> CheckReport:
    """Runs every check on a backend, without pytest; see `BackendConformance`."""
    said = {"backend": backend, "samples": samples, "ignored": ignored, "idle": idle}
    return run_checks(backend.__name__, type(f"Test{backend.__name__}", (BackendConformance,), said)())
