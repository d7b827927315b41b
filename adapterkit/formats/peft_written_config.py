"""The `adapter_config.json` of what is written: one config for all modules, and patterns where they differ."""

from __future__ import annotations

import collections
import re
from collections.abc import Mapping, Sequence
from typing import Any

from adapterkit.errors import CheckpointError
from adapterkit.formats.peft_units import Unit

NO_TARGETS = "dummy-target-modules"
"""What PEFT takes for no modules at all."""

_BY_PATTERN = {
    "r": "rank_pattern",
    "effective_rank": "rank_pattern",
    "lora_alpha": "alpha_pattern",
    "alpha": "alpha_pattern",
    "block_size": "block_size_pattern",
    "n_frequency": "n_frequency_pattern",
}
_TASKS = (
    ("ForCausalLM", "CAUSAL_LM"),
    ("LMHeadModel", "CAUSAL_LM"),
    ("ForConditionalGeneration", "SEQ_2_SEQ_LM"),
    ("ForSequenceClassification", "SEQ_CLS"),
    ("ForTokenClassification", "TOKEN_CLS"),
    ("ForQuestionAnswering", "QUESTION_ANS"),
)
_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
"""Tasks for which PEFT saves modules of these names by itself, and then expects them."""

_WITH_BIAS = {"LORA": "lora_only", "BOFT": "boft_only", "OFT": "oft_only", "HRA": "hra_only", "VERA": "vera_only"}


def written_config(
    units: Sequence[Unit], paths: Sequence[str], known: Mapping[str, Any], classes: Sequence[str], where: object
) -> dict[str, Any]:
    """The config's fields.

    Args:
        units: What is written.
        paths: Of the model's modules.
        known: Fields that the adapter brings along.
        classes: Of the model, most derived first.
        where: What errors name.

    Raises:
        CheckpointError: Modules differ in what is one for all of a file.
    """
    found = {"inference_mode": True, **known, **_Merging(units, paths, where).fields()}
    types = dict.fromkeys(unit.config["peft_type"] for unit in units if unit.adapted)
    if len(types) > 1:
        raise CheckpointError(
            f"has {' and '.join(types)}, and an adapter of PEFT is of one type; native holds any", where
        )
    found["peft_type"] = next(iter(types), "LORA")
    targets = {unit.path for unit in units if unit.adapted and unit.path and not unit.is_parameter}
    if targets:
        found["target_modules"] = _targets(targets, paths)
    elif not types:
        found |= {"target_modules": NO_TARGETS, "r": 1}
    _settle_bias(found, units)
    _settle_task(found, units, classes)
    return {name: sorted(value) if isinstance(value, set) else value for name, value in found.items()}


def _settle_bias(found: dict[str, Any], units: Sequence[Unit]) -> None:
    """`bias` as the type has it; PEFT loads the biases of a file in any case."""
    if "bias" not in found:
        return
    only = all(unit.adapted for unit in units if unit.config.get("bias"))
    name = _WITH_BIAS.get(found["peft_type"])
    found.pop("bias")
    if name is not None:
        found["bias"] = name if only else "all"


def _settle_task(found: dict[str, Any], units: Sequence[Unit], classes: Sequence[str]) -> None:
    """The task, which prompts need; where PEFT would expect a head with it that is not there, it is left out."""
    whole = any(not unit.path for unit in units)
    names = [name.partition(":")[2] for name in classes]
    guessed = next((task for end, task in _TASKS if any(name.endswith(end) for name in names)), "FEATURE_EXTRACTION")
    task = found.pop("task_type", None) or (guessed if whole else None)
    saved = {path.rpartition(".")[2] for path in found.get("modules_to_save", ())}
    if task is not None and (whole or task not in _HEADS or saved & {*_HEADS[task]}):
        found["task_type"] = task


class _Merging:
    """One value of each field for all modules."""

    def __init__(self, units: Sequence[Unit], paths: Sequence[str], where: object) -> None:
        self._units, self._paths, self._where = units, paths, where

    def fields(self) -> dict[str, Any]:
        """Sets and dicts of all modules together; the rest the same for all, or by pattern.

        A frozenset has choices, each of fields and their values; one that all modules have is taken.
        """
        names = dict.fromkeys(name for unit in self._units for name in unit.config)
        found: dict[str, Any] = {}
        for name in names:
            values = [(unit, unit.config[name]) for unit in self._units if name in unit.config]
            if isinstance(values[0][1], set):
                found[name] = set[str]().union(*(value for _, value in values))
            elif isinstance(values[0][1], dict):
                for _, value in values:
                    found.setdefault(name, {}).update(value)
            elif isinstance(values[0][1], frozenset):
                found |= self._one_of([value for _, value in values], name)
            else:
                found[name] = self._common(name, values, found)
        if any(unit.adapted for unit in self._units):
            saved = (unit.config.get("modules_to_save", set()) for unit in self._units if not unit.adapted)
            found["modules_to_save"] = set[str]().union(*saved)
        return {name: value for name, value in found.items() if value not in ({}, set())}

    def _one_of(self, choices: Sequence[frozenset[Any]], name: str) -> dict[str, Any]:
        if not (common := frozenset.intersection(*choices)):
            told = f"the modules have no {name} in common, and in PEFT's files it is one for all; native holds any"
            raise CheckpointError(told, self._where)
        return dict(min(common, key=repr))

    def _common(self, name: str, values: Sequence[tuple[Unit, Any]], found: dict[str, Any]) -> Any:
        """The value that most modules have; what others have goes into a pattern."""
        usual = collections.Counter(map(repr, (value for _, value in values))).most_common(1)[0][0]
        value = next(value for _, value in values if repr(value) == usual)
        for unit, own in [(unit, own) for unit, own in values if own != value]:
            pattern = _BY_PATTERN.get(name, "")
            if pattern not in unit.config:
                told = f"{name} is {value!r} and at {unit.path} {own!r}, and in PEFT's files it is one for all"
                raise CheckpointError(f"{told}; native holds any", self._where, unit.path)
            found.setdefault(pattern, {})[_pattern(unit.pattern, self._paths)] = own
        return value


def _pattern(path: str, paths: Sequence[str]) -> str:
    """A pattern for one module: its path, from the beginning where it is another's end too."""
    return f"^{re.escape(path)}" if _is_end(path, paths) else path


def _is_end(path: str, paths: Sequence[str]) -> bool:
    return any(other.endswith(f".{path}") for other in paths)


def _targets(targets: set[str], paths: Sequence[str]) -> list[str] | str:
    if any(_is_end(path, paths) for path in targets):
        return "|".join(re.escape(path) for path in sorted(targets))
    return sorted(targets)
