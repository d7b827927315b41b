"""A dialect: the codecs that say, for one family of formats, how each adapter type is written at a module."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from adapterkit.contract.codec import Codec, Context, Place, Said
from adapterkit.errors import AdapterKitError, BrokenFormatError, CheckpointError, ShapeMismatchError, did_you_mean
from adapterkit.formats.low_rank import factors_of
from adapterkit.formats.parts import Collected
from adapterkit.plugins.manager import get_plugin_manager, instance_of, owner
from adapterkit.specs import CodecSpec


@dataclass(frozen=True)
class ForeignModule:
    """What a file has for one module.

    Attributes:
        name: The module as the file calls it, for messages.
        keys: Tensor name behind the module's -> the key in the file: `lora_down.weight` -> the whole.
        places: Where it acts; None where nothing of the model is called so.
    """

    name: str
    keys: Mapping[str, str]
    places: Sequence[Place] | None


class Dialect:
    """The codecs of a name, as they are registered now. Whatever one does wrong is an error that names it.

    Args:
        name: The dialect.
        writes: The adapter types that may be written; by default those of all codecs.
    """

    def __init__(self, name: str, writes: Collection[str] | None = None) -> None:
        self.name, self._writes = name, writes
        self._known: dict[frozenset[str], Sequence[tuple[CodecSpec, Codec]]] = {}
        self._specs = [spec for spec in get_plugin_manager().codecs().values() if spec.dialect == name]

    @functools.cached_property
    def codecs(self) -> Sequence[tuple[CodecSpec, Codec]]:
        """Those that can be had. One that cannot be is as one that is not installed: `missing` tells."""
        return [(spec, codec) for spec, codec in self._loaded if isinstance(codec, Codec)]

    @functools.cached_property
    def missing(self) -> Sequence[AdapterKitError]:
        """Why some cannot be had."""
        return [codec for _, codec in self._loaded if isinstance(codec, AdapterKitError)]

    @functools.cached_property
    def _loaded(self) -> Sequence[tuple[CodecSpec, Codec | AdapterKitError]]:
        return [(spec, _codec(spec)) for spec in self._specs]

    @functools.cached_property
    def names(self) -> frozenset[str]:
        """Every tensor name that any codec knows."""
        return frozenset().union(*(codec.names for _, codec in self.codecs))

    @functools.cached_property
    def _longest(self) -> int:
        return max(map(len, self.names), default=0)

    @functools.cached_property
    def types(self) -> Mapping[str, tuple[CodecSpec, Codec]]:
        """Adapter type -> the codec that writes it: the first to say so."""
        found: dict[str, tuple[CodecSpec, Codec]] = {}
        for spec, codec in self.codecs:
            for name in codec.types:
                if self._writes is None or name in self._writes:
                    found.setdefault(name, (spec, codec))
        return found

    def split(self, key: str) -> tuple[str, str] | None:
        """The module and the tensor's name in a dotted key; None where no codec knows a name at its end.

        Args:
            key: Such as `blocks.0.attn.qkv.lora_A.weight`. The longest known name counts.
        """
        at = max(-1, len(key) - self._longest - 2)  # a key may have millions of dots
        while (at := key.find(".", at + 1)) >= 0:
            if key[at + 1 :] in self.names:
                return key[:at], key[at + 1 :]
        return ("", key) if key in self.names else None

    def shape(self, tensors: Mapping[str, Tensor], context: Context) -> tuple[int, ...] | None:
        """The shape of the weight that a module's tensors are for, as far as they tell; for want of a model."""
        for spec, codec in self.codecs:
            taken = self._taken(spec, codec, tensors.keys(), context)
            if not taken:
                continue
            own = {name: tensors[name] for name in taken}
            _check_axes(codec, own, context)
            with _Blaming(spec, "its tensors", context.where):
                shape = codec.shape(own)
            if shape is not None:
                return shape
        return None

    def check(self, context: Context) -> None:
        """Raises what a codec knows to be wrong with a file; see `Codec.check`."""
        for spec, codec in self.codecs:
            with _Blaming(spec, "the file", context.where):
                codec.check(context)

    def read(
        self, modules: Iterable[ForeignModule], tensors: Mapping[str, Tensor], context: Context, into: Collected
    ) -> Reading:
        """Reads modules.

        Args:
            modules: What the file has.
            tensors: The file's, by key.
            context: What is the same for all.
            into: Receives what they say.

        Returns:
            Which keys were read, belong to no module here, or are of no type that is known.

        Raises:
            CheckpointError: A module's tensors do not fit together, or to the model.
        """
        reading = Reading([], [], [])
        for module in modules:
            if module.places is None:
                reading.unmatched.extend(module.keys.values())
                continue
            own = {name: tensors[key] for name, key in module.keys.items()}
            used = self._read_module(module, own, context, into)
            reading.matched.extend(module.keys[name] for name in module.keys if name in used)
            reading.left_over.extend(module.keys[name] for name in module.keys if name not in used)
        return reading

    def _read_module(
        self, module: ForeignModule, tensors: Mapping[str, Tensor], context: Context, into: Collected
    ) -> set[str]:
        left = dict(tensors)
        for spec, codec in self._knowing(frozenset(left)):
            if codec.names.isdisjoint(left) or not (taken := self._taken(spec, codec, left.keys(), context)):
                continue
            own = {name: left.pop(name) for name in taken}
            _check_axes(codec, own, context, module.name)
            for place in _places(module, codec, own):
                with _Blaming(spec, module.name, context.where):
                    into.add(place.point.id, codec.read(own, place, context))
        return tensors.keys() - left.keys()

    def _knowing(self, names: frozenset[str]) -> Sequence[tuple[CodecSpec, Codec]]:
        """The codecs that know one of these names. Modules have few sets of them."""
        if names not in self._known:
            self._known[names] = [one for one in self.codecs if not one[1].names.isdisjoint(names)]
        return self._known[names]

    def _taken(self, spec: CodecSpec, codec: Codec, names: Iterable[str], context: Context) -> set[str]:
        with _Blaming(spec, "its tensors", context.where):
            present = set(names)
            return set(codec.takes(present, context)) & present

    def write(self, name: str, said: Sequence[tuple[Place, Sequence[Said]]], context: Context) -> dict[str, Tensor]:
        """A module's tensors.

        Args:
            name: The module, for messages.
            said: What is at each of its points, in order of rows.
            context: What is the same for all.

        Raises:
            CheckpointError: No codec writes a type of them, or it cannot be said exactly.
        """
        groups: dict[str, list[tuple[Place, Said]]] = {}
        for place, own in said:
            for one in own:
                groups.setdefault(self._writer(place, one, context)[0].name, []).append((place, one))
        found: dict[str, Tensor] = {}
        for own in groups.values():
            spec, codec = self._writer(*own[0], context)
            with _Blaming(spec, name, context.where):
                made = codec.write(own, context)
            if twice := found.keys() & made.keys():
                raise CheckpointError(f"two types write {sorted(twice)[0]!r}; native holds any", context.where, name)
            found |= made
        return found

    def _writer(self, place: Place, said: Said, context: Context) -> tuple[CodecSpec, Codec]:
        type_name = said.type
        if type_name not in self.types:
            any_factors = next((one for one in self.types.values() if one[1].writes_factors), None)
            if any_factors is not None and factors_of(said, place.point, context.where, context.made) is not None:
                return any_factors
            near = did_you_mean(type_name, self.types)
            others = sorted({spec.dialect for spec in get_plugin_manager().codecs().values()} - {self.name})
            told = f"files of this kind ({self.name}) cannot say {type_name!r}.{near} native holds any"
            raise CheckpointError(f"{told}; other kinds: {', '.join(others)}", context.where)
        return self.types[type_name]


@dataclass(frozen=True)
class Reading:
    """Keys of a file: those that were read, those of no module here, and those that no codec knows."""

    matched: list[str]
    unmatched: list[str]
    left_over: list[str]


def _places(module: ForeignModule, codec: Codec, tensors: Mapping[str, Tensor]) -> Sequence[Place]:
    places = module.places or ()
    whole = places[0].of_all() if places and codec.for_all(tensors) else None
    return places if whole is None else [whole]


def _codec(spec: CodecSpec) -> Codec | AdapterKitError:
    try:
        return instance_of(spec, Codec)
    except AdapterKitError as error:
        return error


def _check_axes(codec: Codec, tensors: Mapping[str, Tensor], context: Context, module: str | None = None) -> None:
    """Raises ShapeMismatchError where a tensor has another number of axes than the codec says, or is empty."""
    for name, tensor in tensors.items():
        axes = codec.axes.get(name)
        if axes is not None and (tensor.ndim != axes or not tensor.numel()):
            told = f"{name} is {tuple(tensor.shape)}; a tensor of {axes} axes is expected, none of them empty"
            raise ShapeMismatchError(told, context.where, module)


class _Blaming:
    """Names the codec where it fails, and the module where a file does."""

    def __init__(self, spec: CodecSpec, module: str, where: object) -> None:
        self._spec, self._module, self._where = spec, module, where

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None or not isinstance(error, Exception) or isinstance(error, AdapterKitError):
            return
        told = f"{type(error).__name__}: {error}"
        if isinstance(error, (RuntimeError, IndexError)):  # torch's, of shapes that do not go together
            raise ShapeMismatchError(f"its tensors do not fit together ({told})", self._where, self._module) from error
        raise BrokenFormatError(f"{self._spec}: {told}", self._where, owner(self._spec)) from error


def written_modules(
    said: Mapping[str, Sequence[Said]], places: Iterable[tuple[str, Sequence[Place]]]
) -> Iterator[tuple[str, list[tuple[Place, Sequence[Said]]]]]:
    """Foreign module -> what an adapter is at its points, for those that it touches.

    Args:
        said: See `parts.said_of`.
        places: Each foreign module with its points.
    """
    for name, own in places:
        whole = own[0].of_all() if own else None
        every = own if whole is None else [whole, *own]
        touched = [(place, said[place.point.id]) for place in every if place.point.id in said]
        if touched:
            yield name, touched
