"""What a module is called here that a file calls otherwise: a wider model, a bare one, another version of a library."""

from __future__ import annotations

import collections
from collections.abc import Collection, Iterable, Mapping, Sequence

_DEPTH = 4
_LEAST = 2


def renamed(paths: Iterable[str], known: Collection[str]) -> dict[str, str]:
    """Path in a file -> path in the model, for those that differ by what stands in front, as most others do.

    At least the last two names stay. What could be several modules is left out, and so is what would be a module that
    another path is already.

    Args:
        paths: Of the file's modules.
        known: Of the model's.
    """
    paths = list(dict.fromkeys(paths))
    lost = [path for path in paths if path not in known]
    if not lost:
        return {}
    votes = _votes(lost, _ends(known))
    taken = {path for path in paths if path in known}
    found: dict[str, str] = {}
    for count in sorted({*votes.values()}, reverse=True):
        alike = sorted(
            (pair for pair, own in votes.items() if own == count), key=lambda pair: (len("".join(pair)), pair)
        )
        made = _applied(alike, [path for path in lost if path not in found], known)
        targets = collections.Counter(made.values())
        if not any(target in taken or number > 1 for target, number in targets.items()):
            found |= made
            taken |= {*targets}
    return found


def _ends(known: Collection[str]) -> Mapping[str, Sequence[str]]:
    """The end of a path -> what stands in front of it, wherever the model has it."""
    found: dict[str, list[str]] = {}
    for path in known:
        words = path.split(".")
        for cut in range(min(_DEPTH, len(words) - _LEAST + 1)):
            found.setdefault(".".join(words[cut:]), []).append(".".join(words[:cut]))
    return found


def _votes(lost: Sequence[str], ends: Mapping[str, Sequence[str]]) -> collections.Counter[tuple[str, str]]:
    """(front in the file, front in the model) -> how many paths it would find."""
    found: collections.Counter[tuple[str, str]] = collections.Counter()
    for path in lost:
        words = path.split(".")
        for cut in range(min(_DEPTH, len(words) - _LEAST + 1)):
            fronts = ends.get(".".join(words[cut:]), ())
            found.update((".".join(words[:cut]), front) for front in fronts)
    return found


def _applied(pairs: Sequence[tuple[str, str]], paths: Sequence[str], known: Collection[str]) -> dict[str, str]:
    """What these changes make of paths, where they agree."""
    found: dict[str, set[str]] = {}
    for old, new in pairs:
        for path in paths:
            rest = path if not old else path[len(old) + 1 :] if path.startswith(f"{old}.") else None
            if rest is not None and (here := f"{new}.{rest}" if new else rest) in known:
                found.setdefault(path, set()).add(here)
    return {path: next(iter(here)) for path, here in found.items() if len(here) == 1}
