"""AdapterHub's tensors as parts of a checkpoint: one function for each of its methods."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from adapterkit.checkpoint import Part
from adapterkit.errors import BaseMismatchError, MissingKeysError, ShapeMismatchError
from adapterkit.formats.adapterhub_config import Fields
from adapterkit.formats.adapterhub_keys import Keys
from adapterkit.formats.adapterhub_names import Places


@dataclass
class Reading:
    """A file that is being read.

    Attributes:
        where: Named in errors.
        keys: What it holds.
        tensors: All that may be asked for, by key.
        places: The model.
        inverts: Whether the tool undoes an invertible adapter before the model's head.
        direct: Whether edits of hidden states without orthonormal rows are DiReFT, which no file says.
        used: Keys that are in a part by now.
        notes: For the report.
    """

    where: object
    keys: Keys
    tensors: Mapping[str, Tensor]
    places: Places
    inverts: bool = False
    direct: bool = False
    used: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def note(self, told: str) -> None:
        """Keeps a sentence for the report, once."""
        if told not in self.notes:
            self.notes.append(told)

    def taken(self, keys: Mapping[str, str]) -> Found:
        """The tensors of these keys, by parameter."""
        return Found(self, keys)


class Found:
    """The tensors at one place, by the tool's names of parameters. What is taken is used."""

    def __init__(self, reading: Reading, keys: Mapping[str, str]) -> None:
        self._reading, self._keys = reading, keys

    def __bool__(self) -> bool:
        return bool(self._keys)

    def __contains__(self, name: str) -> bool:
        return name in self._keys

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def key(self, name: str) -> str:
        """The key of a parameter, for errors."""
        return self._keys.get(name) or f"{self._beside()}.{name}"

    def _beside(self) -> str:
        name, key = next(iter(self._keys.items()), ("", "?"))
        return key.removesuffix(f".{name}")

    def pass_over(self, *names: str) -> None:
        """These are known, and nothing is made of them."""
        self._reading.used += [self._keys[name] for name in names if name in self._keys]

    def __call__(self, name: str, *shape: int | None) -> Tensor:
        """A parameter.

        Args:
            name: The tool's name.
            shape: What it must be; None for any size.

        Raises:
            MissingKeysError: It is not there.
            ShapeMismatchError: It is of another shape.
        """
        if name not in self._keys:
            there = ", ".join(self._keys) or "nothing"
            raise MissingKeysError(f"is missing; there is {there}", self._reading.where, self.key(name))
        key = self._keys[name]
        tensor = self._reading.tensors[key]
        if shape and not fits(tensor.shape, shape):
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            raise ShapeMismatchError(f"shape {tuple(tensor.shape)}, expected ({wanted})", self._reading.where, key)
        self._reading.used.append(key)
        return tensor

    def renamed(self, names: Mapping[str, str]) -> dict[str, Tensor]:
        """All that have a name here, under it; the rest is left over."""
        return {names[name]: self(name) for name in self._keys if name in names}


def fits(shape: Sequence[int], wanted: Sequence[int | None]) -> bool:
    """Whether a shape is as wanted, where None is any size."""
    return len(shape) == len(wanted) and all(w in (None, s) for s, w in zip(shape, wanted, strict=True))


def part(
    type: str,
    config: Mapping[str, Any],
    points: Mapping[str, Mapping[str, Tensor] | None],
    *,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    shared: Mapping[str, Tensor] | None = None,
) -> Part:
    """A part at these points.

    Args:
        type, config: See `Part`.
        points: Point id -> tensors; None where the config asks for some and the file has none.
        settings: Point id -> what is other there.
        shared: What all of them share.
    """
    tensors = {key: own for key, own in points.items() if own is not None}
    own = {key: dict((settings or {}).get(key, {})) for key in points}
    return Part(type, config, {"shared": shared, **tensors} if shared is not None else tensors, own)


def activation(fields: Fields) -> str:
    """The name of the activation here."""
    name = str(fields["non_linearity"]).lower()
    if name not in _ACTIVATIONS:
        raise fields.refused(f"is no activation that is known here ({', '.join(_ACTIVATIONS)})", "non_linearity")
    return _ACTIVATIONS[name]


_ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh", "gelu_python_tanh"), "gelu_new"),
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
    "leakyrelu": "leaky_relu",
    "leaky_relu": "leaky_relu",
    "sigmoid": "sigmoid",
    "mish": "mish",
    "quick_gelu": "quick_gelu",
    "relu2": "relu2",
    "relu6": "relu6",
    "linear": "identity",
}


# -- sequences --------------------------------------------------------------------------------------------------------


def prompt(reading: Reading, fields: Fields) -> list[Part]:
    """Prompt tuning, at `prompt`."""
    found = reading.taken(reading.keys.take_whole("prompt_tunings"))
    if fields.choice("combine", ("prefix", "prefix_after_bos")) != "prefix":
        reading.note(
            "combine='prefix_after_bos' is read as a prompt in front of the sequence: the same for every token, as the "
            "tool's prompts have no position"
        )
    else:
        reading.note(
            "the tool returns a prompt's positions too, and a head that takes the first one takes a prompt's; here it "
            "takes that of the first token. With sdpa, its default, the tool's prompts look at padding, which "
            "nothing here does"
        )
    key = _outside(reading, "prompt", reading.places.family.stacks[0].site)
    length = fields["prompt_length"]
    tensors = {"prompt": found("prompt_embedding.weight", length, None)} if found else None
    return [part("prompt", {"length": length}, {key: tensors})]


def invertible(reading: Reading, fields: Fields) -> list[Part]:
    """The transform of the embedded sequence that a bottleneck's config asks for, if it does."""
    if not fields["inv_adapter"]:
        return []
    if fields["inv_adapter"] != "nice":
        raise fields.refused("cannot be read: the tool's own code for it fails on sequences", "inv_adapter")
    found = reading.taken(reading.keys.take_whole("invertible_adapters"))
    places = reading.places
    tokens = _outside(reading, "tokens", places.family.stacks[0].site if places.family.invertible else "")
    head = places.outside("head") if reading.inverts else None
    points: dict[str, dict[str, Tensor]] = {tokens: {}} if head is None else {tokens: {}, head.id: {}}
    if head is None and places.outside("head") is not None:
        reading.note("the tool does not undo the transform before a head of the model's own, nor is it here")
    reduction = fields["inv_adapter_reduction_factor"]
    config = {
        "coupling": "additive",
        "reduction": float(2 if reduction is None else reduction),
        "activation": activation(fields),
    }
    return [part("invertible", config, points, shared=found.renamed(_COUPLING))]


_COUPLING = {
    f"{net}.{place}.{what}": f"{net}.{layer}.{what}"
    for net in "FG"
    for place, layer in ((0, "down"), (2, "up"))
    for what in ("weight", "bias")
}


def _outside(reading: Reading, role: str, site: str) -> str:
    point = reading.places.outside(role, site) if reading.places.family.embeds else None
    if reading.places.points and point is None:
        raise BaseMismatchError(f"acts at {role!r}, and the model has no such point as the tool has", reading.where)
    return point.id if point else f"{role}@{site}"
