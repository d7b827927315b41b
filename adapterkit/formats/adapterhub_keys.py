"""The keys of AdapterHub's files: `<module path>.<what it is>.<adapter's name>.<parameter>`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

from adapterkit.formats.adapterhub_names import FUSED, HIDDEN, Block, Places

OUTPUTS = ("attn", "mlp", "cross")
WEIGHTS = ("attn.q", "attn.k", "attn.v", FUSED, "cross.q", "cross.k", "cross.v", "mlp.up", "mlp.down")
ATTENTIONS = ("attn.kv", "cross.kv")

ROLES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "adapters": OUTPUTS,
        "adapter_fusion_layer": OUTPUTS,
        "loras": WEIGHTS,
        "prefix_gates": ATTENTIONS,
        "refts": (HIDDEN,),
    }
)
"""What stands in front of an adapter's name in a block -> the roles that it is at."""
WHOLE = ("prefix_tunings", "prompt_tunings", "invertible_adapters", "shared_parameters")
"""What stands there outside of all blocks."""
_BELOW = {"prefix_gates": "prefix_tuning", "refts": "reft_layer"}
"""The module between a place and what is at it."""
_POOL = "pool"
"""Every attention holds the prefixes of all of them: the same tensors again and again."""
_OLD = {
    "attention_text_task_adapters": "adapters",
    "attention_text_lang_adapters": "adapters",
    "layer_text_task_adapters": "adapters",
    "layer_text_lang_adapters": "adapters",
    "invertible_lang_adapters": "invertible_adapters",
}
"""Words of releases before 2."""
_WORDS = frozenset({*ROLES, *WHOLE, *_OLD})
"""Of which a key of an adapter has one."""


class Key(NamedTuple):
    """A key, taken apart: the module's path, what is there, the adapter's name, and the parameter."""

    path: str
    kind: str
    name: str
    parameter: str


def parsed(key: str) -> Key | None:
    """A key of an adapter or a fusion; None for any other."""
    words = key.split(".")
    if _WORDS.isdisjoint(words):
        return None
    parts = [_OLD.get(word, word) for word in words]
    for i, part in enumerate(parts[:-2]):
        if part in ROLES or part in WHOLE:
            return Key(".".join(parts[:i]), part, parts[i + 1], ".".join(parts[i + 2 :]))
    return None


@dataclass
class Keys:
    """The keys of one file, by what they are for.

    Attributes:
        placed: What it is, role and the block's site -> parameter -> key.
        whole: What is outside of all blocks -> parameter -> key.
        again: Keys of tensors that others hold too.
        elsewhere: Keys at no place of the model.
        strange: Keys of no adapter, or of another.
    """

    placed: dict[tuple[str, str, str], dict[str, str]] = field(default_factory=dict)
    whole: dict[str, dict[str, str]] = field(default_factory=dict)
    again: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)
    strange: list[str] = field(default_factory=list)

    @classmethod
    def sorted_out(cls, keys: Iterable[str], name: str, places: Places) -> Keys:
        """Those of a file that holds the adapter, or the fusion, of this name."""
        made = cls()
        for key in sorted(keys, key=len):  # of what stands in a file several times, the shortest key is the first
            found = parsed(key)
            if found is None or found.name != name:
                made.strange.append(key)
            elif found.kind in ROLES:
                made._put(key, found, places)
            elif found.kind == "prefix_tunings" and found.path.rpartition(".")[2] == _POOL:
                inside = made.whole.setdefault(found.kind, {})
                made.again.append(key) if found.parameter in inside else inside.update({found.parameter: key})
            else:
                made.whole.setdefault(found.kind, {})[found.parameter] = key
        return made

    def _put(self, key: str, found: Key, places: Places) -> None:
        path = found.path
        if below := _BELOW.get(found.kind):
            path = path.removesuffix(f".{below}")
        inside = places.place(path)
        block, rest = inside or (None, "")
        roles = ROLES[found.kind]
        role = None if block is None else HIDDEN if roles == (HIDDEN,) and not rest else block.stack.role(rest, roles)
        if block is None or role is None:
            self.elsewhere.append(key)
        else:
            self.placed.setdefault((found.kind, role, block.site), {})[found.parameter] = key

    def take(self, kind: str, role: str, block: Block) -> dict[str, str]:
        """The keys at a place, by parameter; they are taken out, so that what is left was asked for by nobody."""
        return self.placed.pop((kind, role, block.site), {})

    def take_whole(self, kind: str) -> dict[str, str]:
        """The keys outside of all blocks; taken out as well."""
        return self.whole.pop(kind, {})
