"""Folding adapters into the weights, and giving back the very bits.

A merge puts new parameters in the place of the old ones and keeps the old: unmerging is bitwise, and a weight that is
tied to another module's stays as it is there, but for what acts in both as one (see `Tied`). A layer whose weight is
no such parameter (see `adapterkit.contract.layer`) becomes a plain one for as long.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from adapterkit.composition import Expression, names_of
from adapterkit.engine.attach import site_of, sites_of
from adapterkit.engine.expressions import acting_at
from adapterkit.engine.selection import Selection, strength_at
from adapterkit.errors import NotMergeableError, PluginError, StateError, blaming
from adapterkit.handle.concurrency import require_alike, require_no_calls
from adapterkit.handle.merged_weights import Target, merged, share_weights
from adapterkit.handle.sharding import put_away
from adapterkit.handle.stand_ins import Original, OriginalParameter, as_it_was, replace_layer, replace_parameter
from adapterkit.handle.state import Merge, State
from adapterkit.handle.ties import Ties
from adapterkit.kernels.sums import Acting, Strength
from adapterkit.kernels.weights import layer_handler
from adapterkit.mapping import offload_hooks
from adapterkit.mapping.structure import base_modules
from adapterkit.points import InjectionPoint, ParameterPoint


def merge(state: State, selection: Selection) -> Merge:
    """Folds the selection into the weights. Everything is computed before anything is changed.

    Raises:
        NotMergeableError: An adapter has no equivalent weight, or the merged weights would not be finite.
        StateError: A block of another thread or task says that something else acts, or another thread is in a call.
    """
    _require_undisturbed(state, selection)
    put_away(state.roots)
    targets = _targets(state, selection)
    with torch.no_grad():
        computed = [(target, *merged(target)) for target in targets if target.same_as is None]
        plain = {id(target): _plain(target, weight, bias) for target, weight, bias in computed}
    with state.switch.held():
        _require_undisturbed(state, selection)
        originals = _all_put(_put(computed, plain, targets))
        state.merge = Merge(selection, originals, Ties(state.roots, originals))
        _tell_sites(state.merge, merged=True)
        _tell_places(state, state.merge)
        state.switch.fold(selection)
    return state.merge


def _tell_sites(merge: Merge, *, merged: bool) -> None:
    """Lets each site know what its module was: blocks of the caller's own still say what they said."""
    replaced: dict[int, list[Original]] = {}
    for original in merge.originals:
        replaced.setdefault(id(original.module), []).append(original)
    for originals in replaced.values():
        if (site := site_of(originals[0].module)) is not None:
            site.beneath = functools.partial(as_it_was, originals) if merged else None
            site.changed()


def _tell_places(state: State, merge: Merge) -> None:
    """Lets a weight that has come with another size, or gone, be no weight that somebody else has resized."""
    places = {id(state.places[place]): place for place in state.places}
    for original in merge.originals:
        place = places.get(id(original.module))
        if place is not None and isinstance(original, OriginalParameter) and original.resizes:
            present = original.module.get_parameter(original.name)
            state.places.resize(place, original.name, tuple(present.shape))


def _require_undisturbed(state: State, selection: Selection) -> None:
    require_alike(state.switch, selection)
    require_no_calls(state.roots, "merge")


def _all_put(steps: Iterator[Original]) -> list[Original]:
    """All of them or, where somebody interrupts, none."""
    done: list[Original] = []
    try:
        for original in steps:
            done.append(original)
    except BaseException:
        for original in reversed(done):
            original.restore()
        raise
    return done


def _put(
    computed: Iterable[tuple[Target, Tensor | None, Tensor | None]],
    plain: Mapping[int, nn.Module | None],
    targets: Sequence[Target],
) -> Iterator[Original]:
    for target, made, bias in computed:
        others = [] if made is None else [one for one in targets if one.same_as is target]
        weight = nn.Parameter(made, requires_grad=False) if made is not None and others else made
        for other in others:
            assert weight is not None
            yield replace_parameter(other.module, other.path, other.layout.parameter, weight)
        instead = plain[id(target)]
        if instead is not None:
            yield replace_layer(target.module, target.path, instead)
            continue
        names = (target.layout.parameter, target.layout.bias_parameter)
        for name, new in zip(names, (weight, bias), strict=True):
            if new is not None:
                yield replace_parameter(target.module, target.path, name, new)


def unmerge(state: State, *, force: bool = False) -> list[str]:
    """Puts the original parameters back, on the device and in the dtype that the model has now.

    Args:
        state: Whose.
        force: Whether to do so where merged weights were changed or replaced: that is lost then.

    Returns:
        What was lost.

    Raises:
        StateError: Merged weights were changed or replaced, and are not to be lost; or they are offloaded. Nothing is
            changed.
    """
    if state.merge is None:
        return []
    originals = state.merge.originals
    if elsewhere := [told for original in originals if (told := original.elsewhere())]:
        more = f" (and {len(elsewhere) - 1} more)" if len(elsewhere) > 1 else ""
        raise StateError(
            f"cannot unmerge: {elsewhere[0]}{more}. Take the offload hooks off first, with "
            "accelerate.hooks.remove_hook_from_module(model, recurse=True), or pipe.remove_all_hooks()"
        )
    stand_ins = {id(new): old for original in originals for new, old in original.pairs}
    lost = [told for original in originals if (told := original.lost(stand_ins))]
    if lost and not force:
        more = f" (and {len(lost) - 1} more)" if len(lost) > 1 else ""
        raise StateError(
            f"cannot unmerge: {lost[0]}{more}. unmerge(force=True) and detach(force=True) give back the weights from "
            "before the merge, and what came after it is lost"
        )
    with state.switch.held():
        require_no_calls(state.roots, "unmerge")
        for original in reversed(originals):
            original.restore()
        _put_back(state, stand_ins)
        _tell_sites(state.merge, merged=False)
        _tell_places(state, state.merge)
        state.merge = None
        state.switch.fold(None)
    return lost


def _put_back(state: State, stand_ins: Mapping[int, nn.Parameter | None]) -> None:
    """Wherever else a merged weight has been tied in the meantime, what it stood for comes back too."""
    for module in base_modules(state.roots):
        for name, parameter in module._parameters.items():
            if id(parameter) in stand_ins:
                module._parameters[name] = stand_ins[id(parameter)]


def _targets(state: State, selection: Selection) -> Sequence[Target]:
    targets: dict[tuple[int, str], Target] = {}
    said: dict[tuple[int, str], list[object]] = {}
    problems: list[str] = []
    for expression, point, acting, weight in _acting(state, selection):
        if not isinstance(point, ParameterPoint):
            problems.append(f"{expression!r} at {point.id} acts on a sublayer's {point.kind}, not on a weight")
            continue
        if reason := offload_hooks.stored_elsewhere(state.mapped.root(point), point.path):
            problems.append(f"{point.id}: {reason}")
            continue
        module, layout = state.module(point), point.layout
        if len(sites_of(module)) > 1:
            problems.append(f"{point.full_path} has adapters of another handle too, on a model that shares this part")
            continue
        key = (id(module), layout.parameter)
        target = targets.setdefault(key, Target(module, point.full_path, layout))
        said.setdefault(key, []).append(_told(state, expression, point, weight))
        parts = target.matrices.setdefault(layout.index, {})
        active = [*(parts[point.id][1] if point.id in parts else ()), (acting, weight)]
        parts[point.id] = (point, active)
    if problems:
        more = f" (and at {len(problems) - 1} more points)" if len(problems) > 1 else ""
        raise NotMergeableError(f"{problems[0]}{more}; keep it active instead of merging it")
    share_weights(targets, said)
    return [*targets.values()]


def _told(state: State, expression: Expression, point: InjectionPoint, weight: Strength) -> object:
    """What acts at a point, equal to what is told of another where both are one; unlike any other where it is alone."""
    modules = [state.adapters[name].modules.get(point.id) for name in names_of(expression)]
    ties = [None if module is None else module.tied for module in modules]
    return object() if None in ties or not isinstance(weight, (int, float)) else (expression, ties, weight)


def _acting(state: State, selection: Selection) -> Iterator[tuple[Expression, InjectionPoint, Acting, Strength]]:
    """Whatever acts anywhere, point by point."""
    for expression, weight in selection.acting:
        attached = [state.adapters[name] for name in names_of(expression)]
        for key, point in {key: point for one in attached for key, point in one.points.items()}.items():
            here = {name: one.modules[key] for name, one in state.adapters.items() if key in one.modules}
            acting, strength = acting_at(expression, here), strength_at(weight, point)
            if acting is not None and (isinstance(strength, Tensor) or strength != 0):
                yield expression, point, acting, strength


def _plain(target: Target, weight: Tensor | None, bias: Tensor | None) -> nn.Module | None:
    """A plain layer with the merged weight, where the target's own layer cannot hold one."""
    handler = layer_handler(target.module)
    if handler is None or weight is None:
        return None
    own = target.module._parameters.get(target.layout.bias_parameter)
    bias = own.detach().clone() if bias is None and own is not None else bias
    with blaming(f"layer handler {type(handler).__name__}", "dense()", handler.plugin):
        made: object = handler.dense(target.module, target.layout, weight, bias)
        if not isinstance(made, nn.Module) or made is target.module:
            raise PluginError(f"returned {made!r:.80} at {target.keys}; expected another module")
        return made
