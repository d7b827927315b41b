"""In which order a module's forward calls its children, read off its source: nothing is run.

Children with the same names stand before a sublayer in one model and behind it in another (`self_attn_layer_norm` of
BART and of mBART): the order tells which.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator

from torch import nn

from adapterkit.mapping.structure import base_class

_DEPTH = 4
"""How many methods of the module deep."""

_Branches = tuple["_Calls", "_Calls"]
_Calls = tuple["str | _Branches", ...]
"""Names that are called, and where a condition decides, those of either branch."""


def called_children(module: nn.Module) -> tuple[str, ...] | None:
    """Names of the module's children in the order of their calls, each as often as it is called; None without source.

    Both branches of a condition are taken, one after the other; but one alone where both call the same, or where the
    other calls what this module has not.
    """
    calls = _calls_of(base_class(module))
    return None if calls is None else tuple(_taken(module, calls))


def _taken(module: nn.Module, calls: _Calls) -> Iterator[str]:
    for call in calls:
        if isinstance(call, str):
            if call in module._modules:
                yield call
            continue
        possible = [tuple(_taken(module, branch)) for branch in call if _is_possible(module, branch)]
        for branch in dict.fromkeys(possible):
            yield from branch


def _is_possible(module: nn.Module, branch: _Calls) -> bool:
    return all(getattr(module, call, None) is not None for call in branch if isinstance(call, str))


def names_of(module: nn.Module) -> frozenset[str]:
    """What the module's own forward names: attributes, methods, functions."""
    forward = inspect.unwrap(base_class(module).forward)
    return frozenset(forward.__code__.co_names) if inspect.isfunction(forward) else frozenset()


def precedes(calls: tuple[str, ...], first: str, second: str) -> bool:
    """Whether every call of `second` follows one of `first`, and none of `first` is left: f s, f s f s."""
    both = [name for name in calls if name in (first, second)]
    return bool(both) and both[::2] == [first] * (len(both) // 2) and both[1::2] == [second] * (len(both) // 2)


@functools.lru_cache(maxsize=1024)
def _calls_of(cls: type[nn.Module]) -> _Calls | None:
    forward = _source(cls, "forward")
    return None if forward is None else tuple(_calls(cls, forward, _DEPTH))


def _source(cls: type, name: str) -> ast.AST | None:
    method = inspect.unwrap(getattr(cls, name, None))  # type: ignore[arg-type]
    if not inspect.isfunction(method):
        return None
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(method)))
    except (OSError, TypeError, SyntaxError):
        return None


def _calls(cls: type, node: ast.AST, depth: int) -> Iterator[str | _Branches]:
    """What is called on `self`, in the order of evaluation: arguments before the call that takes them."""
    if isinstance(node, ast.Call):
        for argument in (*node.args, *(keyword.value for keyword in node.keywords)):
            passed = _attribute_of_self(argument)
            if passed is not None and _source(cls, passed) is not None:  # a method of its own, to be called there
                yield from _inlined(cls, passed, depth)
            else:
                yield from _calls(cls, argument, depth)
        name = _attribute_of_self(node.func)
        if name is None:
            yield from _calls(cls, node.func, depth)
        else:
            yield from _inlined(cls, name, depth)
    elif isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign) and node.value is not None:
        yield from _calls(cls, node.value, depth)
    elif isinstance(node, ast.If):
        yield from _calls(cls, node.test, depth)
        one, other = (
            tuple(c for step in steps for c in _calls(cls, step, depth)) for steps in (node.body, node.orelse)
        )
        yield (one, other)
    elif isinstance(node, ast.IfExp):
        yield from _calls(cls, node.test, depth)
        yield (tuple(_calls(cls, node.body, depth)), tuple(_calls(cls, node.orelse, depth)))
    else:
        for child in ast.iter_child_nodes(node):
            yield from _calls(cls, child, depth)


def _inlined(cls: type, name: str, depth: int) -> Iterator[str | _Branches]:
    """The name; what a method of the class calls in its place."""
    method = _source(cls, name) if depth and hasattr(cls, name) and name != "forward" else None
    if method is None:
        yield name
    else:
        yield from _calls(cls, method, depth - 1)


def _attribute_of_self(node: ast.AST) -> str | None:
    own = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    return node.attr if own else None  # type: ignore[union-attr]
