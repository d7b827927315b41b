"""Which formats a run's adapter is written in, and what of it goes into each."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from adapterkit.checkpoint import Checkpoint
from adapterkit.formats.parts import Collected, said_of, shared_of
from adapterkit.plugins.manager import get_plugin_manager


def divided(trained: Checkpoint, named: Sequence[str] | None, usual: Sequence[str]) -> list[tuple[str, Checkpoint]]:
    """Format -> what it is to hold: types that have a format of their own (`FormatSpec.apart`) are in no other.

    Args:
        trained: The adapter.
        named: The formats that the run asks for, each of which gets something; None where it leaves that to the task.
        usual: The task's.
    """
    wanted = usual if named is None else named
    types = {one.type for own in said_of(trained).values() for one in own}
    specs = get_plugin_manager().formats().values() if wanted else ()
    beside = {spec.name: own for spec in specs if (own := types & {*spec.apart})}
    if not beside:
        return [(format, trained) for format in wanted]
    others = types.difference(*beside.values())
    rest = _only(trained, others) if others else None if named is None else trained
    found = [(format, rest) for format in wanted if format not in beside and rest is not None]
    return [*found, *((format, _only(trained, own)) for format, own in beside.items())]


def _only(trained: Checkpoint, types: Collection[str]) -> Checkpoint:
    collected = Collected()
    for point, own in said_of(trained).items():
        collected.add(point, [one for one in own if one.type in types])
    shared = {type: tensors for type, tensors in shared_of(trained).items() if type in types}
    return trained.replace(parts=collected.parts(shared), base={})
