"""What an AdapterHub config says, checked: its fields with their defaults, and the methods that it is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from adapterkit.contract.fields import is_number
from adapterkit.errors import InvalidHeaderError, UnsupportedFileError, did_you_mean, shown
from adapterkit.formats.adapterhub_schemas import ARCHITECTURES, FUSION

FILE = "adapter_config.json"
_SCALING_MENDED = (1, 1, 0)  # before it, LoRA was trained without its scale, whatever alpha said
_MAX_PARTS = 16
_LIBRARY = "adapters"

_SEQUENTIAL = {"mh_adapter": False, "output_adapter": True, "reduction_factor": 16, "non_linearity": "relu"}
_NAMED: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "pfeiffer": {**_SEQUENTIAL, "original_ln_before": True},
        "houlsby": {**_SEQUENTIAL, "mh_adapter": True, "non_linearity": "swish"},
        "parallel": {**_SEQUENTIAL, "reduction_factor": 2, "is_parallel": True, "scaling": 4.0},
    }
)
"""Configs that old files say by name."""


@dataclass(frozen=True)
class Fields:
    """The fields of one method, with their defaults: `fields["r"]`. Every value is of its default's type.

    Attributes:
        method: bottleneck, lora, prefix, prompt, reft or fusion.
        values: The fields.
        where: The file, for errors.
    """

    method: str
    values: Mapping[str, Any]
    where: object

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def refused(self, what: str, name: str) -> UnsupportedFileError:
        """The error for a value that is understood, and that no type here computes."""
        return UnsupportedFileError(f"{name}={shown(self[name])} {what}", self.where, f"config.{name}")

    def choice(self, name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
        """A field that must be one of these."""
        if self[name] not in known:
            hint = did_you_mean(str(self[name]), known)
            told = f"must be one of {', '.join(known)}, not {shown(self[name])}.{hint}"
            raise InvalidHeaderError(told, self.where, f"config.{name}")
        return self[name]


@dataclass(frozen=True)
class Description:
    """What `adapter_config.json` says.

    Attributes:
        name: The adapter's name, which stands in the keys.
        model: The tool's word for the model's family.
        base: The model that it was made for.
        version: The tool's.
        methods: What it is made of.
        inverts: Whether the tool undid an invertible adapter before the head of its model: that of a release before the
            present library, or a head of the tool's own.
        notes: What was mended.
    """

    name: str
    model: str
    base: str
    version: str
    methods: Sequence[Fields]
    inverts: bool = False
    notes: Sequence[str] = ()


def is_description(value: object) -> bool:
    """Whether JSON is an adapter's config of this tool. PEFT's file has the same name, and says `peft_type`."""
    return (
        isinstance(value, Mapping)
        and "peft_type" not in value
        and isinstance(value.get("config"), (Mapping, str))
        and isinstance(value.get("model_type", value.get("model_name")), str)
    )


def described(value: Mapping[str, Any], where: object) -> Description:
    """What it says.

    Raises:
        InvalidHeaderError: A field is missing, unknown, or of another type.
        UnsupportedFileError: It asks for a method that is not known here.
    """
    notes: list[str] = []
    version = text_of(value, "version", where)
    given = value["config"]
    if isinstance(given, str):
        if given not in _NAMED:
            raise UnsupportedFileError(f"names a config, {shown(given)}, and not its fields", where, "config")
        given = _NAMED[given]
    methods = [_method(one, where) for one in _united(given, where)]
    if not version:
        methods = [_renamed_activation(one) for one in methods]
    if _lacked_scale(version) and given.get("architecture") == "lora" and methods[0]["r"] != methods[0]["alpha"]:
        fields = {**methods[0].values, "alpha": methods[0]["r"]}
        notes.append(f"{version} trained LoRA without its scale: alpha={methods[0]['alpha']} is read as r")
        methods = [Fields("lora", fields, where)]
    base = " ".join(
        part for part in (text_of(value, "model_class", where), text_of(value, "model_name", where)) if part
    )
    name, model = text_of(value, "name", where), text_of(value, "model_type", where)
    flexible = text_of(value, "model_class", where).endswith(("AdapterModel", "ModelWithHeads"))
    inverts = flexible or not version.startswith(f"{_LIBRARY}.")
    return Description(name, model, base, version, methods, inverts, notes)


def text_of(value: Mapping[str, Any], key: str, where: object) -> str:
    """A text in the outermost object; "" where there is none."""
    found = value.get(key)
    if found is not None and not isinstance(found, str):
        raise InvalidHeaderError(f"must be text, not {shown(found)}", where, key)
    return found or ""


def fusion_fields(value: Mapping[str, Any], where: object) -> Fields:
    """The config of a fusion, checked; errors are those of `described`."""
    given = value.get("config")
    if isinstance(given, str) and given in ("static", "dynamic"):
        given = {"value": given == "dynamic"}
    return Fields("fusion", _checked(given or {}, FUSION, where), where)


def _united(given: Any, where: object) -> Sequence[Any]:
    if given.get("architecture") != "union":
        return [given]
    configs = given.get("configs")
    if not isinstance(configs, list) or not 1 <= len(configs) <= _MAX_PARTS:
        raise InvalidHeaderError(f"must be a list of configs, not {shown(configs)}", where, "config.configs")
    return configs


def _method(given: object, where: object) -> Fields:
    if not isinstance(given, Mapping):
        raise InvalidHeaderError(f"must be an object, not {shown(given)}", where, "config")
    architecture = given.get("architecture") or "bottleneck"
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        known = ", ".join([*ARCHITECTURES, "union"])
        raise UnsupportedFileError(f"{shown(architecture)} is no method that is known ({known})", where, "architecture")
    method, schema = ARCHITECTURES[architecture]
    fields = {key: value for key, value in given.items() if key != "architecture"}
    fields = _checked(fields, schema, where)
    if fields.get("invertible_adapter"):
        fields |= _old_invertible(fields["invertible_adapter"], where)
    return Fields(method, fields, where)


def _checked(given: Any, schema: Mapping[str, Any], where: object) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise InvalidHeaderError(f"must be an object, not {shown(given)}", where, "config")
    if unknown := sorted(set(given) - set(schema)):
        hint = did_you_mean(unknown[0], schema)
        raise InvalidHeaderError(f"is unknown: it may change what is computed.{hint}", where, f"config.{unknown[0]}")
    values: dict[str, Any] = {}
    for name, default in schema.items():
        if name not in given and isinstance(default, type):
            raise InvalidHeaderError("is missing", where, f"config.{name}")
        value = given.get(name, default)
        if value is None and not isinstance(default, type):
            value = default
        if not _fits(name, value, default):
            raise InvalidHeaderError(f"is {shown(value)}: expected {_expected(name, default)}", where, f"config.{name}")
        values[name] = value
    return values


def _kind(default: Any) -> type:
    return default if isinstance(default, type) else type(default)


_ANY = frozenset({"inv_adapter", "invertible_adapter", "task_names"})
_NUMBERS = frozenset({"inv_adapter_reduction_factor", "dropout_prob", "vera_d", "vera_b", "init_weights_seed"})
_MANY: Mapping[str, str] = MappingProxyType(
    {
        "reduction_factor": "a number above 0, or an object of layer -> number",
        "scaling": "a number, 'learned' or 'channel'",
        "residual_before_ln": "true, false or 'post_add'",
        "layers": "'all' or a list of layers",
        "value_initialized": "true or false",
    }
)


def _expected(name: str, default: Any) -> str:
    if name in _NUMBERS:
        return "a number, or null"
    words = {bool: "true or false", float: "a number", int: "a whole number from 0", str: "text", tuple: "a list"}
    return _MANY.get(name) or words.get(_kind(default), "another value")


def _fits(name: str, value: Any, default: Any) -> bool:
    if name == "reduction_factor":
        each = value.values() if isinstance(value, Mapping) else [value]
        return all(is_number(one) and one > 0 for one in each)
    if name == "scaling":
        return is_number(value) or value in ("learned", "channel")
    if name == "residual_before_ln":
        return isinstance(value, bool) or value == "post_add"
    if name == "layers":
        return value == "all" or _are_layers(value)
    if name == "value_initialized":
        return isinstance(value, (bool, str))
    if name in _NUMBERS:
        return value is None or is_number(value)
    if default is None:
        return value is None or isinstance(value, str) or is_number(value) or name in _ANY
    kind = _kind(default)
    if kind is float:
        return is_number(value)
    if kind is tuple:
        return _are_words(value) if default else _are_layers(value)
    if kind is int:
        return type(value) is int and value >= 0
    return isinstance(value, kind)


def _are_layers(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(type(one) is int and one >= 0 for one in value)


def _are_words(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(one, str) for one in value)


def _renamed_activation(fields: Fields) -> Fields:
    """Files without a version are of a release that meant others by these names."""
    names = {"gelu": "gelu_new", "gelu_orig": "gelu"}
    activation = fields.values.get("non_linearity")
    if not isinstance(activation, str) or activation not in names:
        return fields
    return Fields(fields.method, {**fields.values, "non_linearity": names[activation]}, fields.where)


def _old_invertible(given: Any, where: object) -> dict[str, Any]:
    if not isinstance(given, Mapping) or not {"block_type", "reduction_factor"} <= set(given):
        told = f"must have block_type and reduction_factor, not {shown(given)}"
        raise InvalidHeaderError(told, where, "config.invertible_adapter")
    return {"inv_adapter": given["block_type"], "inv_adapter_reduction_factor": given["reduction_factor"]}


def _lacked_scale(version: str) -> bool:
    library, _, number = version.partition(".")
    if library != _LIBRARY:
        return False
    parts = number.split(".")[:3]
    return all(part.isdigit() for part in parts) and tuple(map(int, parts)) < _SCALING_MENDED
