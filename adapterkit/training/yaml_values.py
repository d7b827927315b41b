"""YAML as its authors read it: `no` is a word, `1e-4` is a number, and a key stands once.

PyYAML follows YAML 1.1, where `mixed_precision: no` means false and `learning_rate: 1e-4` is text.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

_FLOAT = re.compile(
    r"^[-+]?([0-9][0-9_]*\.[0-9_]*([eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+|\.[0-9][0-9_]*([eE][-+]?[0-9]+)?"
    r"|\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"
)
_BOOL = re.compile(r"^(true|True|TRUE|false|False|FALSE)$")
_OWN_RULES = {"tag:yaml.org,2002:float": (_FLOAT, "-+0123456789."), "tag:yaml.org,2002:bool": (_BOOL, "tTfF")}


class _Loader(yaml.SafeLoader):
    """SafeLoader with the rules of YAML 1.2 for numbers and booleans, that refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)  # pyright: ignore[reportUnknownMemberType]
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is not text", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


# A copy: the resolvers of a loader class are one table that its subclasses share.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, rule) for tag, rule in rules if tag not in _OWN_RULES]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, (_rule, _first) in _OWN_RULES.items():
    _Loader.add_implicit_resolver(_tag, _rule, list(_first))


def parse(text: str) -> Any:
    """The value of a YAML document.

    Raises:
        yaml.YAMLError: The text is no YAML, a key stands twice, or a key is not text.
    """
    return yaml.load(text, Loader=_Loader)


def dump(value: Any) -> str:
    """A value of JSON types as YAML, keys in the order given."""
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100)
