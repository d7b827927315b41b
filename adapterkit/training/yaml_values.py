"""YAML as its authors read it: `no` is a word, `1e-4` is a number, `010` is ten, a date is text, and a key stands once.

PyYAML follows YAML 1.1, where `mixed_precision: no` means false and `learning_rate: 1e-4` is text.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

from adapterkit.errors import shown

_TAG = "tag:yaml.org,2002:"
_RULES = {
    "int": (r"[-+]?[0-9][0-9_]*|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (
        r"[-+]?([0-9][0-9_]*\.[0-9_]*([eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+|\.[0-9][0-9_]*([eE][-+]?[0-9]+)?"
        r"|\.(inf|Inf|INF)|\.(nan|NaN|NAN))",
        "-+0123456789.",
    ),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "null": (r"~|null|Null|NULL|", "~nN\0"),
    "merge": (r"<<", "<"),
}
"""Tag -> which words are meant without one, and how they begin."""
_TYPES = ("int", "float", "bool", "null", "str", "map", "seq")
_MOST, _LEVELS = 100_000, 32
"""Values of a document, each alias counted as what it stands for, and levels of nesting."""


class _Loader(yaml.SafeLoader):
    """SafeLoader for JSON's types, that refuses a key given twice. What is wrong is told with its line."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)  # pyright: ignore[reportUnknownMemberType]
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:  # PyYAML's own constructors
            kind = node.tag.removeprefix(_TAG)
            raise ConstructorError(None, None, f"{shown(node.value)} is no {kind}", node.start_mark) from error

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        text = self.construct_scalar(node).replace("_", "")
        return int(text, 0) if text[1:2] in ("o", "x") else int(text)

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict[Any, Any]:
        if not isinstance(node, yaml.MappingNode):
            raise ConstructorError(None, None, f"{shown(node.value)} is no map", node.start_mark)
        seen: set[Any] = set()
        for key_node in (key for key, _ in node.value if key.tag != f"{_TAG}merge"):
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise ConstructorError(None, None, f"the key {shown(key)} is not text", key_node.start_mark)
            if key in seen:
                raise ConstructorError(None, None, f"the key {shown(key)} stands twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes text which either version of YAML would take for something else."""


def _rules() -> Iterator[tuple[str, str, re.Pattern[str]]]:
    for kind, (rule, first) in _RULES.items():
        for sign in first:
            yield sign.strip("\0"), f"{_TAG}{kind}", re.compile(f"^({rule})$")


# Copies: what a class knows are tables that its subclasses share.
_Loader.yaml_implicit_resolvers, _Dumper.yaml_implicit_resolvers = {}, copy.deepcopy(_Dumper.yaml_implicit_resolvers)
for _first, _tag, _rule in _rules():
    for _resolvers in (_Loader.yaml_implicit_resolvers, _Dumper.yaml_implicit_resolvers):
        _resolvers.setdefault(_first, []).append((_tag, _rule))
_Loader.yaml_constructors = {
    tag: make for tag, make in yaml.SafeLoader.yaml_constructors.items() if tag is None or tag[len(_TAG) :] in _TYPES
} | {f"{_TAG}int": _Loader.construct_yaml_int}


def parse(text: str) -> Any:
    """The value of a YAML document.

    Raises:
        yaml.YAMLError: The text is no YAML, a key stands twice or is not text, a value is no JSON value, or there is
            more in it, aliases counted, than anybody writes.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _measure(node, {}, 0)
        return loader.construct_document(node)
    except RecursionError:
        raise yaml.YAMLError(f"nested deeper than {_LEVELS}") from None
    finally:
        loader.dispose()


def _measure(node: yaml.Node, known: dict[int, tuple[int, int]], level: int) -> tuple[int, int]:
    """How many values a node holds, and how many levels; an alias is what it stands for."""
    if isinstance(node, yaml.ScalarNode):
        return 1, 0
    if id(node) not in known and level <= _LEVELS:  # an alias of what it is in goes down for ever
        children = [one for item in node.value for one in (item if isinstance(item, tuple) else (item,))]
        below = [_measure(child, known, level + 1) for child in children]
        known[id(node)] = 1 + sum(size for size, _ in below), 1 + max((levels for _, levels in below), default=0)
    size, levels = known.get(id(node), (1, _LEVELS + 1))
    if levels > _LEVELS:
        raise ComposerError(None, None, f"nested deeper than {_LEVELS}", node.start_mark)
    if size > _MOST:
        raise ComposerError(None, None, f"aliases make {size:,} values; at most {_MOST:,} are read", node.start_mark)
    return size, levels


def dump(value: Any) -> str:
    """A value of JSON types as YAML, keys in the order given."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
