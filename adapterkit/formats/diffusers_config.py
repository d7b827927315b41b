"""What diffusers keeps beside an adapter's tensors: the fields of PEFT's `LoraConfig`, for each component."""

from __future__ import annotations

import collections
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from adapterkit.errors import InvalidHeaderError, shown
from adapterkit.formats import strict_json
from adapterkit.formats.peft_config import PeftConfig
from adapterkit.formats.source import JSON_LIMIT
from adapterkit.formats.strict_json import StrictJSONError

KEY = "lora_adapter_metadata"
"""Under which it stands in a file's metadata, as JSON."""
_NUMBERS = ("lora_alpha", "alpha", "lora_dropout")


class Metadata:
    """What a file says of its components.

    Args:
        text: JSON: `component.field` -> value, or `field` -> value; None where there is none.
        where: What errors name.

    Raises:
        InvalidHeaderError: It is no such JSON.
    """

    def __init__(self, text: str | None, where: object = None) -> None:
        self._where = where
        self._fields = {} if text is None else _parsed(text, where)
        self._known: dict[str, PeftConfig] = {}

    def __bool__(self) -> bool:
        return bool(self._fields)

    @property
    def version(self) -> str:
        """Of PEFT, which was there when it was written."""
        found = next((value for key, value in self._fields.items() if key.rpartition(".")[2] == "peft_version"), "")
        return f"PEFT {found}" if isinstance(found, str) and found else ""

    def config(self, prefix: str) -> PeftConfig:
        """The fields of a component; none where nothing is said.

        Args:
            prefix: What stands in front of its keys.

        Raises:
            InvalidHeaderError: One has a value that it cannot have.
        """
        if prefix not in self._known:
            own = {key.removeprefix(prefix): value for key, value in self._fields.items() if key.startswith(prefix)}
            plain = {key: value for key, value in (own or self._fields).items() if "." not in key}
            self._known[prefix] = PeftConfig(plain, self._where)
            _check_numbers(plain, self._where)
        return self._known[prefix]


def _parsed(text: str, where: object) -> Mapping[str, Any]:
    if len(text) > JSON_LIMIT:
        raise InvalidHeaderError(f"{len(text):,} characters of JSON; the limit is {JSON_LIMIT:,}", where, KEY)
    try:
        found = strict_json.loads(text)
    except StrictJSONError as error:
        raise InvalidHeaderError(f"is {error}", where, KEY) from error
    if not isinstance(found, dict):
        raise InvalidHeaderError(f"must be an object of fields, not {shown(found)}", where, KEY)
    return found


def _check_numbers(fields: Mapping[str, Any], where: object) -> None:
    for name in _NUMBERS:
        value = fields.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise InvalidHeaderError(f"must be a number, not {shown(value)}", where, name)


def written(modules: Mapping[str, Mapping[str, Any]], others: Collection[str]) -> dict[str, Any]:
    """The fields for one component, no more than are needed: whatever release reads them knows them.

    Args:
        modules: Every adapted module by name -> what its codec says: `r`, `lora_alpha`, `use_dora`, ...
        others: The names of the component's other modules.
    """
    found: dict[str, Any] = {"target_modules": _targets(modules, others)}
    for field, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        values = {name: _number(config[field]) for name, config in modules.items()}
        found[field] = collections.Counter(values.values()).most_common(1)[0][0]
        found[pattern] = dict(_patterns(values, found[field]))
    for field in ("use_dora", "lora_bias", "lora_dropout"):
        given = {config.get(field) for config in modules.values()}
        if len(given) == 1 and (value := given.pop()):
            found[field] = value
    return found


def _number(value: float) -> float:
    return int(value) if value == int(value) else value


def _targets(modules: Collection[str], others: Collection[str]) -> list[str] | str:
    """Ends of names, or one expression where the whole name of one is the end of another's."""
    ends = list(_ends(modules, others))
    if None in ends:
        return "|".join(re.escape(name) for name in sorted(modules))
    return sorted({end for end in ends if end is not None})


def _patterns(values: Mapping[str, float], usual: float) -> Iterator[tuple[str, float]]:
    for value in dict.fromkeys(values.values()):
        if value != usual:
            own = [name for name, other in values.items() if other == value]
            ends = _ends(own, [name for name, other in values.items() if other != value])
            for name, end in zip(own, ends, strict=True):
                yield (f"^{name}" if end is None else end), value


def _ends(wanted: Collection[str], others: Collection[str]) -> Sequence[str | None]:
    """For each name the end of the fewest words that is no end of any of the others; None where there is none."""
    taken = {end for name in others for end in _all_ends(name)}
    return [next((end for end in _all_ends(name) if end not in taken), None) for name in wanted]


def _all_ends(name: str) -> Iterator[str]:
    at = len(name)
    while (at := name.rfind(".", 0, at)) >= 0:
        yield name[at + 1 :]
    yield name
