"""Canonical words for where blocks are: their numbers, and of the names in their paths those that tell them apart."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from adapterkit.points import Tag

Pattern = tuple[str, ...]
"""Names of a path; numbers are empty."""


def block_sites(paths: Iterable[str], prefix: str = "") -> dict[str, str]:
    """Path of each block -> its site: `3`; `encoder.3` and `decoder.3` where there are two lists; `0.1` in stages.

    Args:
        paths: All blocks of a model.
        prefix: What the model calls the bare model inside itself, which does not tell.
    """
    kept = {path: path.removeprefix(f"{prefix}.") if prefix else path for path in paths}
    patterns = {_pattern(path) for path in kept.values()}
    shared = set.intersection(*({name for name in pattern if name} for pattern in patterns)) if patterns else set[str]()
    if len({_without(pattern, shared) for pattern in patterns}) < len(patterns):
        shared = set()
    return {path: ".".join(word for word in inner.split(".") if word not in shared) for path, inner in kept.items()}


def block_tags(path: str, site: str) -> dict[str, Tag]:
    """`layer` is the last number of a block's path, `stage` the first of several, `stack` the names in its site."""
    numbers = [int(word) for word in path.split(".") if word.isdigit()]
    names = ".".join(word for word in site.split(".") if not word.isdigit())
    tags: Mapping[str, Tag | None] = {
        "layer": numbers[-1] if numbers else None,
        "stage": numbers[0] if len(numbers) > 1 else None,
        "stack": names or None,
    }
    return {name: tag for name, tag in tags.items() if tag is not None}


def _pattern(path: str) -> Pattern:
    return tuple("" if word.isdigit() else word for word in path.split("."))


def _without(pattern: Pattern, names: set[str]) -> Pattern:
    return tuple(word for word in pattern if word not in names)
