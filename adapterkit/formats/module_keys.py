"""Keys of files for the UIs: a prefix, a module, and a tensor's name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from adapterkit.errors import CheckpointError
from adapterkit.formats.dialect import Dialect
from adapterkit.formats.prefixes import BEGINNINGS, Prefix, is_original, prefix_of

DIALECT = "lycoris"
_ALIASES = {
    "lora_A.weight": "lora_down.weight",
    "lora_B.weight": "lora_up.weight",
    "lora_A.default.weight": "lora_down.weight",
    "lora_B.default.weight": "lora_up.weight",
    "lora.down.weight": "lora_down.weight",
    "lora.up.weight": "lora_up.weight",
    "down.weight": "lora_down.weight",
    "up.weight": "lora_up.weight",
}
"""Other names for the tensors of LoRA -> the dialect's."""
_SHARED_PREFIXES = frozenset({"transformer.", "unet.", "prior.", "text_encoder.", "text_encoder_2.", "text_encoder_3."})
"""Those that files of other libraries have too, which name LoRA's tensors otherwise."""
_OF_SEVERAL = frozenset({*_ALIASES, "alpha", "weight", "bias"})
"""Names of tensors that those files have too."""
_WRAPPER = "base_model.model."
"""PEFT's, which has LoHa and LoKr by the same names. With names of an original checkpoint it is none of PEFT's."""
_SHOWN = 200
"""Characters of a key that an error shows."""


@dataclass
class Found:
    """A module as a file has it.

    Attributes:
        prefix, name: In front of it, and its name.
        keys: Tensor name in the dialect -> key.
    """

    prefix: Prefix
    name: str
    keys: dict[str, str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """What errors call it."""
        return f"{self.prefix.text}{self.name}"[:_SHOWN]


def style_of(keys: Iterable[str], *, shared: bool = True) -> str | None:
    """The format whose files have such keys; None where they are of none of this dialect.

    Args:
        keys: The file's.
        shared: Whether keys count that other libraries' files may have too: not where the metadata are theirs.
    """
    likely = [key for key in keys if key.startswith(BEGINNINGS)]
    if not likely:  # of a file of another format, and quick
        return None
    split = _Splitting(Dialect(DIALECT).names)
    for key in likely:
        prefix = prefix_of(key)
        found = None if prefix is None else split(key, prefix)
        if prefix is None or found is None:
            continue
        module, name = found
        if prefix.text == _WRAPPER:
            own = is_original(module) or name in _ALIASES.values()
        else:
            own = prefix.text not in _SHARED_PREFIXES or (shared and name not in _OF_SEVERAL)
        if own:
            return prefix.style
    return None


class _Splitting:
    """Splits keys behind their prefixes into a module and a tensor's name.

    Args:
        names: Those of tensors that codecs know.
    """

    def __init__(self, names: frozenset[str]) -> None:
        self._names = names | _ALIASES.keys()
        self._longest = max(map(len, self._names))

    def __call__(self, key: str, prefix: Prefix) -> tuple[str, str] | None:
        """The module, and what is behind it; None where no such tensor is known."""
        rest = key[len(prefix.text) :]
        # A key may have millions of dots: of a dotted one no more is looked at than the longest name takes.
        at = rest.find(".", 0 if prefix.flat else max(0, len(rest) - self._longest - 1))
        while at >= 0 and rest[at + 1 :] not in self._names:
            at = -1 if prefix.flat else rest.find(".", at + 1)
        return (rest[:at], rest[at + 1 :]) if at > 0 else None


def grouped(keys: Iterable[str], dialect: Dialect, where: object = None) -> tuple[list[Found], list[str]]:
    """A file's keys by module, and those that are of none.

    Raises:
        CheckpointError: Two keys say the same.
    """
    splitting = _Splitting(dialect.names)
    found: dict[tuple[str, str], Found] = {}
    left_over: list[str] = []
    for key in keys:
        prefix = prefix_of(key)
        split = None if prefix is None else splitting(key, prefix)
        if prefix is None or split is None:
            left_over.append(key)
            continue
        module, name = split[0], _ALIASES.get(split[1], split[1])
        own = found.setdefault((prefix.text, module), Found(prefix, module)).keys
        if name in own:
            raise CheckpointError(f"says the same as {own[name][:_SHOWN]!r}", where, key[:_SHOWN])
        own[name] = key
    return list(found.values()), left_over
