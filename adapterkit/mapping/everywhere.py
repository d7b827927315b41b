"""Points that every family has alike: the norms, found by what a module is, and the blocks around sublayers."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from adapterkit.backend import SITE
from adapterkit.mapping.layouts import first_path
from adapterkit.mapping.structure import named_base_modules
from adapterkit.points import (
    InjectionPoint,
    NormPoint,
    OutputLayout,
    OutputPoint,
    Tag,
    TokensLayout,
    TokensPoint,
    WeightLayout,
    WeightPoint,
)

_KNOWN = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm, _NormBase)
MASKS = ("attention_mask", "attn_mask")
"""What a model, a stack of blocks or a block calls its mask."""

_EPSILONS = ("eps", "variance_epsilon")
_INHERITED = ("layer", "stage", "stream", "block")


def norm_points(
    points: Sequence[InjectionPoint], component: str, module: nn.Module, at: str = "", beside: Collection[int] = ()
) -> list[InjectionPoint]:
    """The role `norm` at every normalisation with a gain, in model order.

    Its site is the module's path. Tags such as `layer` are those on which all points beside it in its block agree.

    Args:
        points: What the component's backend has found.
        component: Its name.
        module: The model, or the part that is mapped.
        at: The part's path in the model.
        beside: Ids of modules that are not looked into.
    """
    around, found = _tags_around(points), list[InjectionPoint]()
    taken = {point.path for point in points if isinstance(point, WeightPoint)}
    for path, norm in named_base_modules(module, prefix=at, seen=set(beside)):
        if path not in taken and is_norm(norm):
            found.append(_point(path, norm, {"component": component, **_inherited(path, around)}))
    return found


def block_points(model: nn.Module, points: Iterable[InjectionPoint]) -> list[InjectionPoint]:
    """The role `hidden` at every block that holds sublayers: its whole output, after the last residual add.

    For families whose blocks take the residual stream first, and give it back alone or first.

    Args:
        model: The component.
        points: Its points; a block is what is around the `output` points of one site.
    """
    sites: dict[str, list[InjectionPoint]] = {}
    for point in points:
        if isinstance(point, OutputPoint):
            sites.setdefault(point.site, []).append(point)
    found: list[InjectionPoint] = []
    for site, sublayers in sites.items():
        path, last = _block(model, _around(sublayers)), sublayers[-1]  # a block that changes the width ends in it
        if path and "layer" in last.tags:
            found.append(replace(last, role="hidden", path=path, site=site, layout=OutputLayout(path, whole=True)))
    return found


def _block(model: nn.Module, path: str) -> str:
    """The path, or that of the block that keeps its sublayers in a list there."""
    while isinstance(model.get_submodule(path), (nn.ModuleList, nn.ModuleDict)):
        path = path.rpartition(".")[0]
    return path


def _around(sublayers: Sequence[InjectionPoint]) -> str:
    """The path of the smallest module that holds all these sublayers, and where their residual streams come from."""
    paths = [point.path for point in sublayers]
    paths += [point.layout.residual for point in sublayers if isinstance(point, OutputPoint)]
    levels = zip(*(path.split(".") for path in paths), strict=False)
    return ".".join(names[0] for names in itertools.takewhile(lambda names: len(set(names)) == 1, levels))


def prompt_points(model: nn.Module, points: Sequence[InjectionPoint], beside: str = "") -> list[InjectionPoint]:
    """The role `prompt` for every embedded sequence: at what runs on it, as wide as its blocks where it has `beside`.

    Args:
        model: The model.
        points: Its points.
        beside: Path of the module that runs on the sequence, from the one that holds the embedding; empty for that one,
            which transformers' `get_input_embeddings` tells.
    """
    found: list[InjectionPoint] = []
    for point in points:
        if not isinstance(point, TokensPoint):
            continue
        path = point.path.rpartition(".")[0]
        while path and not _runs_sequence(model, path, beside):
            path = path.rpartition(".")[0]
        whole = path if beside else None
        path = ".".join(name for name in (path, beside) if name)
        if first_path(model, path) is not None:
            width = _stream(points, path) if beside else None
            widths = {} if width is None else {"in_features": width, "out_features": width}
            found.append(replace(point, role="prompt", path=path, layout=_prompted(model, path, whole), **widths))
    return found


def _stream(points: Iterable[InjectionPoint], path: str) -> int | None:
    """Width of the stream in a module: ELECTRA projects what it has embedded before its blocks see it."""
    inside = (one for one in points if isinstance(one, OutputPoint) and one.path.startswith(f"{path}."))
    return next((one.out_features for one in inside), None)


def _prompted(model: nn.Module, path: str, whole: str | None = None) -> TokensLayout:
    """Rows can have positions of their own where there is a mask."""
    masked = not inspect.signature(type(model.get_submodule(path)).forward).parameters.keys().isdisjoint(MASKS)
    return TokensLayout(extendable=True, lengthens=True, masked=masked, whole=whole)


def _runs_sequence(model: nn.Module, path: str, beside: str) -> bool:
    if beside:
        return first_path(model, f"{path}.{beside}") is not None
    return hasattr(model.get_submodule(path), "get_input_embeddings")


def prompt_layer_points(model: nn.Module, points: Iterable[InjectionPoint]) -> list[InjectionPoint]:
    """The role `prompt.layer` at every block around `output` points, where positions do not matter to them."""
    return [_prompted_block(model, block) for block in block_points(model, points)]


def _prompted_block(model: nn.Module, block: InjectionPoint) -> TokensPoint:
    widths, layout = (block.in_features, block.out_features), _prompted(model, block.path)
    return TokensPoint("prompt.layer", block.path, block.site, *widths, layout, tags=block.tags)


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalises and then scales: by its class, or by its one gain beside an epsilon."""
    own = module._parameters
    weight, bias = own.get("weight"), own.get("bias")
    if weight is None or weight.ndim != 1 or not weight.is_floating_point() or (bias is not None and bias.ndim != 1):
        return False
    if isinstance(module, _KNOWN):
        return True
    children = len(module._modules) - (SITE in module.__dict__)  # adapters are a child
    only = own.keys() <= {"weight", "bias"} and not children
    return only and any(isinstance(getattr(module, name, None), float) for name in _EPSILONS)


def _point(path: str, module: nn.Module, tags: dict[str, Tag]) -> InjectionPoint:
    weight, biased = module._parameters["weight"], module._parameters.get("bias") is not None
    features = 0 if weight is None else len(weight)
    layout = WeightLayout("norm", bias=biased, access="read", bias_parameter="bias" if biased else "")
    return NormPoint("norm", path, path, features, features, layout, tags=tags)


Around = dict[str, dict[str, Tag | None]]


def _tags_around(points: Sequence[InjectionPoint]) -> Around:
    """Path of every module above a sublayer -> the tags that all below it share; None where they differ.

    Above any point, where there are no sublayers.
    """
    around: Around = {}
    for point in [
        point for point in points if isinstance(point, OutputPoint)
    ] or points:  # a few tell what thousands would
        for above in _above(point.path):
            if above not in around:
                around[above] = {tag: point.tags.get(tag) for tag in _INHERITED}
            else:
                known = around[above]
                for tag, value in known.items():
                    if value is not None and value != point.tags.get(tag):
                        known[tag] = None
    return around


def _inherited(path: str, around: Around) -> dict[str, Tag]:
    for above in _above(path):
        if above in around:
            return {tag: value for tag, value in around[above].items() if value is not None}
    return {}


def _above(path: str) -> Iterator[str]:
    """The module itself and those around it, the nearest first; not the model."""
    while path:
        yield path
        path = path.rpartition(".")[0]
