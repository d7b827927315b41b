"""`adapter_config.json`: what it says for a whole adapter of PEFT, and for one module of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from adapterkit.contract.fields import is_number
from adapterkit.errors import InvalidHeaderError, shown
from adapterkit.formats.peft_patterns import Patterns, is_whole
from adapterkit.formats.source import Source

CONFIG_FILE = "adapter_config.json"
WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
KEPT = ("base_model_name_or_path", "task_type")
"""Fields that an adapter keeps as metadata."""

_PATTERNS = {"rank_pattern": ("r",), "alpha_pattern": ("lora_alpha", "alpha")}
_NUMBERS = ("lora_alpha", "alpha", "init_r", "target_r", "lora_dropout", "rank_dropout", "module_dropout")
_MAX_RANK = 2**16


class PeftConfig:
    """An adapter's config.

    Args:
        values: The fields of the JSON object; empty where there is none.
        where: What errors name.

    Raises:
        InvalidHeaderError: It is no config of PEFT, or has a pattern that is not run.
    """

    def __init__(self, values: Mapping[str, Any], where: object = None) -> None:
        self.values, self.where = dict(values), where
        if not isinstance(self.type, str):
            raise InvalidHeaderError(f"must be a name, not {shown(self.type)}", where, "peft_type")
        self._patterns = {name: self._pattern(name) for name in _PATTERNS}
        self._check_rank(self.values.get("r"), "r")
        for name in _NUMBERS:
            if not (self.values.get(name) is None or is_number(self.values[name])):
                raise InvalidHeaderError(f"must be a number, not {shown(self.values[name])}", where, name)

    @property
    def type(self) -> str:
        """`peft_type`, in capitals as PEFT writes it; empty where there is no config."""
        found = self.values.get("peft_type", "")
        return found.upper() if isinstance(found, str) else found

    @property
    def version(self) -> str:
        """The release that wrote it."""
        found = self.values.get("peft_version", "")
        return found if isinstance(found, str) else ""

    @property
    def kept(self) -> dict[str, str]:
        """What an adapter keeps of it beside its tensors."""
        return {name: text for name in KEPT if isinstance(text := self.values.get(name), str) and text}

    @property
    def target_parameters(self) -> Sequence[str]:
        """Ends of the paths of parameters that are adapted themselves."""
        found = self.values.get("target_parameters") or ()
        return [name for name in found if isinstance(name, str)] if isinstance(found, list) else ()

    def at(self, module: str) -> dict[str, Any]:
        """The fields as they are at a module: its own rank and alpha stand in the place of the file's.

        Args:
            module: As the file calls it, without the prefix of the wrapper.
        """
        found = dict(self.values)
        for name, fields in _PATTERNS.items():
            own = self._patterns[name].at(module)
            if own is not None:
                found |= {field: own for field in fields if field in found}
        inner = found.get("feedforward_modules")
        if isinstance(inner, (list, str)):
            found["feedforward_modules"] = [module] if self._is_inner(module, inner) else []
        rows = found.get("trainable_token_indices")
        if isinstance(rows, Mapping):
            own = next((end for end in rows if module == end or module.endswith(f".{end}")), None)
            found["trainable_token_indices"] = rows.get(own)
        return found

    def _is_inner(self, module: str, given: list[Any] | str) -> bool:
        """Whether a module is one of those whose input is scaled."""
        if isinstance(given, str):
            return is_whole(given, module, self.where, "feedforward_modules")
        return any(isinstance(end, str) and module.endswith(end) for end in given)

    def _pattern(self, name: str) -> Patterns:
        given = self.values.get(name) or {}
        if not isinstance(given, Mapping):
            raise InvalidHeaderError(f"must map patterns to numbers, not {shown(given)}", self.where, name)
        numbers = {key: value for key, value in given.items() if not isinstance(value, list)}  # AdaLoRA's are masks
        for key, value in numbers.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise InvalidHeaderError(f"{shown(key)} must have a number, not {shown(value)}", self.where, name)
            if name == "rank_pattern" and not 0 < value <= 1:  # a part of all ranks, in OSF
                self._check_rank(value, f"{name}.{key}")
        return Patterns(numbers, self.where, name)

    def _check_rank(self, rank: object, key: str) -> None:
        if rank is None or (type(rank) is int and 0 <= rank <= _MAX_RANK):
            return
        raise InvalidHeaderError(f"must be a whole number up to {_MAX_RANK:,}, not {shown(rank)}", self.where, key)


def config_in(source: Source) -> dict[str, Any] | None:
    """What the config in a folder, or beside a file, says; None where there is none, or none of PEFT.

    Raises:
        CheckpointError: It is no JSON.
    """
    if CONFIG_FILE not in source.files:
        return None
    found = source.json(CONFIG_FILE)
    return found if isinstance(found, dict) and "peft_type" in found else None
