"""Which of a model's points an adapter is for: by kind, by selector, and by what its type says. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from adapterkit.errors import ConfigError, IncompatibleTargetError, TargetNotFoundError, did_you_mean, shown
from adapterkit.points import InjectionPoint
from adapterkit.selectors import Selector

_SHOWN, _LINE = 5, 200


Accepts = Callable[[InjectionPoint], str | None]
"""Why a type cannot act at a point, or None."""


def by_selector(
    targets: str,
    kinds: Collection[str],
    points: Sequence[InjectionPoint],
    type_name: str,
    label: str,
    accepts: Accepts = lambda point: None,
) -> list[InjectionPoint]:
    """The points of these kinds that a selector names.

    Raises:
        TargetNotFoundError: A part of the selector matches nothing.
        IncompatibleTargetError: It matches points of other kinds, or the model has none at which the type can act.
    """
    usable = [point for point in points if point.kind in kinds]
    selector, acts = Selector(targets), f"{type_name} acts at {'/'.join(sorted(kinds))} points"
    if not usable:
        offered = ", ".join(sorted({point.kind for point in points})) or "none"
        raise IncompatibleTargetError(f"{acts}, and {label} offers none (it offers: {offered}){instead(points)}")
    try:
        return selector.select(usable, label)
    except TargetNotFoundError as error:
        others = [point for point in points if point.kind not in kinds and selector.matches(point)]
        if others:
            raise IncompatibleTargetError(
                f"{acts}, but {shown(targets)} names {others[0].kind} points such as {others[0].id}; "
                f"its roles here: {', '.join(sorted({p.role for p in usable}))}"
            ) from None
        refusals = [accepts(point) for point in usable]
        if None in refusals:
            roles = {point.role for point, refusal in zip(usable, refusals, strict=True) if refusal is None}
            raise TargetNotFoundError(
                f"{str(error).rstrip('.')}. {type_name} can act at {some(sorted(roles))}"
            ) from None
        told = f"{usable[0].id}: {refusals[0]}"
        raise IncompatibleTargetError(f"{type_name} can act nowhere in {label} ({told}){instead(points)}") from None


_ELSEWHERE: Sequence[tuple[str, str, tuple[str, ...]]] = (
    ("LoRA", "weight", ("attention", "linear", "all")),
    ("Prefix", "attention", ("attn.kv", "cross.kv")),
    ("Bottleneck", "output", ("mlp", "attn")),
)
"""What can be written where a type finds nothing to act at: a type, its kind, and targets of which the first fits."""


def instead(points: Sequence[InjectionPoint]) -> str:
    """`; write LoRA(targets='attention') or Prefix(targets='attn.kv') instead`: what these points have room for."""
    found: list[str] = []
    for name, kind, each in _ELSEWHERE:
        here = [point for point in points if point.kind == kind]
        fitting = next((text for text in each if any(map(Selector(text).matches, here))), None)
        if fitting is not None:
            found.append(f"{name}(targets={fitting!r})")
    return f"; write {' or '.join(found)} instead" if found else ""


def by_ids(ids: Collection[str], points: Sequence[InjectionPoint], label: str) -> list[InjectionPoint]:
    """The points with these ids, in model order.

    Raises:
        TargetNotFoundError: There is no such point.
    """
    here = {point.id: point for point in points}
    if missing := [key for key in ids if key not in here]:
        raise TargetNotFoundError(
            f"settings name {len(missing)} points that {label} has not: {some(missing)}."
            f"{did_you_mean(missing[0], here)} List all with adapterkit.points(model)."
        )
    return [point for key, point in here.items() if key in ids]


def narrowed(
    chosen: Sequence[InjectionPoint], kept: Sequence[InjectionPoint], type_name: str, targets: str
) -> list[InjectionPoint]:
    """What a type has kept of the chosen points.

    Raises:
        IncompatibleTargetError: Nothing.
    """
    if not kept:
        raise IncompatibleTargetError(
            f"none of the {len(chosen)} points that {shown(targets)} names concerns this {type_name}: "
            f"{some([point.id for point in chosen])}"
        )
    return list(kept)


def check_concerned(named: Sequence[InjectionPoint], kept: Sequence[InjectionPoint], type_name: str) -> None:
    """Raises IncompatibleTargetError where a type would leave out points that are named one by one."""
    held = {point.id for point in kept}
    if lost := [point.id for point in named if point.id not in held]:
        raise IncompatibleTargetError(
            f"{len(lost)} of the {len(named)} points that settings name do not concern this {type_name}: {some(lost)}"
        )


def check_accepted(points: Sequence[InjectionPoint], accepts: Accepts, type_name: str) -> None:
    """Raises IncompatibleTargetError, with the reasons, where a type refuses points."""
    refused = [f"{point.id}: {reason}" for point in points if (reason := accepts(point)) is not None]
    if refused:
        raise IncompatibleTargetError(f"{type_name} cannot act at {some(refused)}; narrow its targets")


def some(items: Sequence[str]) -> str:
    """The first few of them, each cut to a line, and how many more there are."""
    first = ", ".join(item if len(item) <= _LINE else f"{item[:_LINE]}..." for item in items[:_SHOWN])
    return first + (f", and {len(items) - _SHOWN} more" if len(items) > _SHOWN else "")


def check_parts(parts: Mapping[str, Collection[str]], attached: Mapping[str, Collection[str]], type_name: str) -> None:
    """Raises ConfigError where an adapter combines others that are not there, or only some of what they do.

    Args:
        parts: Name of a part -> ids of the points where it is combined.
        attached: Name of an adapter -> ids of its points.
        type_name: For the error.
    """
    known = ", ".join(attached) or "none"
    problems = [f"its part {name!r} is not attached (attached: {known})" for name in parts if name not in attached]
    for name, points in parts.items():
        if lost := [key for key in attached.get(name, ()) if key not in points]:
            problems.append(f"its part {name!r} acts at {some(lost)} too, which would be lost; widen its targets")
    if problems:
        raise ConfigError(problems, type_name)
