"""What the codecs of this package share: fields of PEFT's config, and modules that are a point or a part of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from adapterkit.contract.codec import Codec, Context, Place, Said
from adapterkit.contract.factors import Factors
from adapterkit.errors import CheckpointError, InvalidHeaderError, MissingKeysError, ShapeMismatchError, shown

_Value = TypeVar("_Value", bool, int, float, str)


class ModuleCodec(Codec):
    """One type of PEFT whose tensors lie at the modules that they act in.

    Attributes:
        peft_type: What the config calls it.
        required: The names without which a module's tensors are not of the type.
        forms: The forms of layers that PEFT can give the type to.
    """

    peft_type: ClassVar[str]
    required: ClassVar[frozenset[str]]
    forms: ClassVar[frozenset[str]] = frozenset({"linear"})

    def takes(self, names: Set[str], context: Context) -> Set[str]:
        return self.names & names if self.required <= names else frozenset()

    def for_all(self, tensors: Mapping[str, Tensor]) -> bool:
        """See `Codec.for_all`: what is trained for all rows together is one thing."""
        return True

    def write(self, said: Sequence[tuple[Place, Said]], context: Context) -> Mapping[str, Tensor]:
        place, one = said[0]
        if not place.whole:
            told = f"{one.type} acts on a part of {place.point.path}, and PEFT's {self.peft_type} on whole modules"
            raise CheckpointError(f"{told}; native holds any", context.where, place.point.id)
        if place.point.form not in self.forms:
            told = f"{one.type} acts on a layer of the form {place.point.form}, and PEFT's {self.peft_type} on"
            known = "/".join(sorted(self.forms))
            raise CheckpointError(f"{told} {known}; native holds any", context.where, place.point.id)
        context.config |= {"peft_type": self.peft_type, **self.fields(one, place, context)}
        return self.tensors(one, place, context)

    def fields(self, said: Said, place: Place, context: Context) -> Mapping[str, Any]:
        """What the config is to say of a module."""
        raise NotImplementedError

    def tensors(self, said: Said, place: Place, context: Context) -> Mapping[str, Tensor]:
        """A module's tensors by name."""
        raise NotImplementedError


def field(context: Context, name: str, default: _Value | None) -> _Value:
    """A field of the file's config.

    Args:
        context: The file.
        name: The field.
        default: PEFT's own, which counts where a config does not say. None where it has to say.

    Raises:
        MissingKeysError: There is no config, or it does not say.
        InvalidHeaderError: The value is of another type than the default.
    """
    value = context.config.get(name)
    if value is None and default is not None and context.config:
        return default
    if value is None:
        told = "the config beside it must say it" if context.config else "there is no adapter_config.json beside it"
        raise MissingKeysError(f"{name} is needed, and {told}", context.where, name)
    if default is not None and not _fits(value, default):
        raise InvalidHeaderError(f"must be like {default!r}, not {shown(value)}", context.where, name)
    return value


def _fits(value: object, default: object) -> bool:
    if isinstance(default, float):
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return type(value) is type(default)


def dropout(context: Context, name: str) -> dict[str, float]:
    """The dropout of training, where the config tells one."""
    value = context.config.get(name)
    return {"dropout": float(value)} if isinstance(value, (int, float)) and value else {}


def number(value: float) -> int | float:
    """A number as PEFT annotates most of them: whole where it is."""
    return int(value) if float(value).is_integer() else value


def as_lora(factors: Factors, place: Place, context: Context, name: str) -> Said:
    """A low-rank update of a whole module, as the LoRA that it is at one of the module's points.

    Args:
        factors: Of the whole module.
        place: The point.
        context: Notes that the type's own parameters are lost there.
        name: The type's.
    """
    context.note(f"{name} of fused projections is read as LoRA, which computes the same")
    a, b = place.of_columns(factors.A).contiguous(), place.of_rows(factors.B).contiguous()
    return Said("lora", {"rank": len(a), "alpha": float(factors.scale * len(a))}, {"A": a, "B": b})


def check_shapes(place: Place, context: Context, **expected: tuple[Tensor, tuple[int, ...]]) -> None:
    """Raises ShapeMismatchError where a tensor has another shape than the module asks for.

    Args:
        place: The module.
        context: The file.
        expected: Tensor name -> the tensor and the shape that it should have.
    """
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != tuple(shape):
            told = f"{name} is {tuple(tensor.shape)}, and {tuple(shape)} is expected for a weight of {place.shape}"
            raise ShapeMismatchError(told, context.where, place.point.path)
