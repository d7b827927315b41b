"""What a backend's table says, compared with the models that it is for."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from adapterkit.backend import Backend
from adapterkit.kernels.weights import base_weight
from adapterkit.mapping.family import Fused, FusedInput, Group, Output, Weight, resolve
from adapterkit.points import InjectionPoint, OutputPoint, ParameterPoint, Span

_SUBLAYERS = {"attn", "cross", "mlp", "moe", "ssm", "block"}
_LAYERS = {"res", "proj", "down", "up", "mod", "embed", "head", "conv", "linear"}
VOCABULARY = frozenset(_SUBLAYERS | _LAYERS | {"norm", "tokens", "hidden", "prompt"})
"""The first words of the roles that all families share; see `adapterkit points`. A family may have others."""

_ALIKE = 0.8
"""From here on a word is a slip of another: `atn`, `heads`."""

_ROLE = re.compile(r"[a-z][a-z0-9_]*(\.[a-z][a-z0-9_]*)*")


def check_role(name: str, point: InjectionPoint) -> None:
    """Raises AssertionError where a role cannot be selected, or is a slip of one that all families share."""
    role = point.role
    assert _ROLE.fullmatch(role), f"{name}: the role {role!r} at {point.path} must be lower-case words joined by dots"
    first = role.partition(".")[0]
    near = difflib.get_close_matches(first, VOCABULARY, n=1, cutoff=_ALIKE)
    assert first in VOCABULARY or not near, f"{name}: the role {role!r} at {point.path}: did you mean {near[0]!r}?"


def tables(backend: type[Backend]) -> Iterator[Group]:
    """The groups in a backend's class attributes."""
    for cls in backend.__mro__:
        for value in vars(cls).values():
            if isinstance(value, (tuple, list)):
                yield from (item for item in value if isinstance(item, Group))


def check_entries(groups: Iterable[Group], models: Mapping[str, nn.Module]) -> None:
    """Raises AssertionError where an entry, or a norm of one, is found in none of the models.

    Layers that are called are left out: tables share such entries, and a layer without a point is seen anyway.
    """
    for group in groups:
        for entry in group.entries:
            if isinstance(entry, (Weight, Fused, FusedInput)):
                continue
            alone = dataclasses.replace(group, entries=(entry,))
            points = [point for model in models.values() for point in resolve(model, [alone], "model")]
            told = f"{entry} below {group.pattern or 'the model'!r}"
            names = ", ".join(models)
            assert points, f"{told} is in none of the samples ({names}): a slip in a path, or a sample too few"
            if isinstance(entry, Output):
                _check_norms(entry, points, told)


def _check_norms(entry: Output, points: Sequence[InjectionPoint], told: str) -> None:
    for part in ("norm_in", "norm_out"):
        if getattr(entry, part) is not None:
            layouts = [point.layout for point in points if isinstance(point, OutputPoint)]
            found = [one for one in layouts if getattr(one, part) is not None]
            assert found, f"{told}: there is nothing at {part} {getattr(entry, part)!r} in any sample"


def check_spans(name: str, model: nn.Module, points: Iterable[InjectionPoint]) -> None:
    """Raises AssertionError where the spans of one weight overlap, or leave rows (or columns) of it out."""
    parts: dict[tuple[Any, ...], list[InjectionPoint]] = {}
    for point in points:
        if isinstance(point, ParameterPoint) and (point.span or point.in_span):
            key = (point.path, point.layout.parameter, point.layout.index, point.span is None)
            parts.setdefault(key, []).append(point)
    for (path, parameter, _, of_input), found in parts.items():
        spans = [span for point in found if (span := point.in_span if of_input else point.span) is not None]
        covered = sorted(row for span in spans for row in _rows(span))
        weight, _ = base_weight(model.get_submodule(path), dataclasses.replace(found[0], span=None, in_span=None))
        assert weight is not None, f"{name}: {path} has no weight {parameter}"
        count = weight.shape[1 if of_input else 0]
        what = f"the {count} {'columns' if of_input else 'rows'} of {path}.{parameter}"
        assert len(set(covered)) == len(covered), f"{name}: spans of {what} overlap"
        missing = sorted(set(range(count)) - set(covered))
        assert not missing, f"{name}: no span has {len(missing)} of {what}, such as {missing[0]}"
        assert len(covered) == count, f"{name}: a span goes beyond {what}"


def _rows(span: Span) -> Iterator[int]:
    for group in range(span.count):
        first = group * (span.step or span.size) + span.start
        yield from range(first, first + span.size)
