"""What no family claims: any module, mapped by its structure, by the classes of its layers, and by sure names.

Attentions, feed-forwards and blocks are recognised by the children that they have: see `adapterkit.mapping.templates`.
Every other layer has its path for a site and the role `linear` or `conv`, and the user can say more: see
`adapterkit.mapping.roles`.

Whether a model reads a weight instead of calling its module cannot be seen from outside, except in torch's own layers,
where it is known, and in layers whose class has a forward of its own. Elsewhere adapters act on both: on the call, and
on what is read while the parent or the model is called.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from torch import nn

from adapterkit.backend import Backend, Reach
from adapterkit.backends.inside import withheld_inside
from adapterkit.backends.seams import reach_of, refusal
from adapterkit.backends.transformers_ties import untying
from adapterkit.contract.layouts import Repeats, TokensLayout
from adapterkit.errors import UnsupportedModelError
from adapterkit.mapping.everywhere import block_points
from adapterkit.mapping.kinds import component_of, generates, joins_pipelines
from adapterkit.mapping.layers import layer_layout
from adapterkit.mapping.parts import in_order
from adapterkit.mapping.plain_layers import layer_points, tags_of
from adapterkit.mapping.recognition import Recognised, recognise
from adapterkit.mapping.roles import RoleMap
from adapterkit.mapping.roles_plugin import write_plugin
from adapterkit.mapping.structure import base_modules
from adapterkit.mapping.towers import towers
from adapterkit.points import AttentionPoint, InjectionPoint, OutputPoint, TokensPoint, WeightPoint

__all__ = ["GenericBackend", "tags_of", "write_plugin"]


class GenericBackend(Backend):
    """Attentions, feed-forwards and blocks of any model that have a known structure, and every other layer.

    Attributes:
        roles: Roles by path, as in `adapterkit.mapping.roles`, for a model of a known structure.
    """

    writes = ("save_pretrained",)
    in_pipelines = False  # a library's own models are; what no library knows there is not what the user means
    roles: ClassVar[Mapping[str, str]] = {}

    def component_of(self, model: nn.Module) -> str:
        return component_of(model)

    def joins_pipelines(self, model: nn.Module) -> bool:
        meant = self.in_pipelines or joins_pipelines(model)
        return meant and any(layer_layout(module) is not None for module in base_modules([model]))

    def points(self, model: nn.Module, component: str) -> list[InjectionPoint]:
        """See `Backend.points`.

        Raises:
            UnsupportedModelError: There is no layer that an adapter could act in.
            TargetNotFoundError, IncompatibleTargetError, ConfigError: The class's `roles` do not fit the model.
        """
        beside = {id(model.get_submodule(path)) for path in self.parts(model).values()}
        recognised = self._recognised(model, component, beside)
        claimed = {point.path for point in recognised.points if isinstance(point, WeightPoint)}
        rest = [one for one in layer_points(model, component, beside) if one.path not in claimed]
        rest = _named(model, rest, component)
        found = [*recognised.points, *rest, *_hidden(model, recognised), *_tokens(model, rest)]
        if not found and not beside:
            raise UnsupportedModelError(
                f"{type(model).__name__} has no adaptable layer: no Linear, Conv1d, Conv2d, Conv3d, Embedding, "
                "transformers Conv1D or MultiheadAttention. Models that are scripted, traced, or quantized by "
                "torch.ao.quantization are adapted before that"
            )
        found = in_order(found, model)
        return RoleMap(self.roles).apply(found, {component: model}) if self.roles else found

    def parts(self, model: nn.Module) -> Mapping[str, str]:
        return {} if self.roles else towers(model)  # whose roles are those of the whole model's paths

    def withheld(self, model: nn.Module, part: str, point: InjectionPoint) -> str | None:
        return withheld_inside(model, part, point)

    def remarks(self, model: nn.Module) -> Mapping[str, str]:
        return self._recognised(model, self.component, ()).remarks

    def _recognised(self, model: nn.Module, component: str, beside: Collection[int]) -> Recognised:
        return recognise(model, component, refusal, getattr(model, "base_model_prefix", ""), beside)

    def reach(self, model: nn.Module, point: InjectionPoint) -> Reach:
        if isinstance(point, AttentionPoint):
            return reach_of(model.get_submodule(point.path), point)
        return super().reach(model, point)

    def repeats(self, model: nn.Module, point: InjectionPoint) -> Repeats | None:
        return "each" if generates(model) and point.role != "embed.pos" else None

    def untying(self, model: nn.Module, names: Sequence[Sequence[str]]) -> Callable[[], None] | None:
        return untying(model, names)


def _hidden(model: nn.Module, recognised: Recognised) -> list[InjectionPoint]:
    """The outputs of the blocks whose output is the residual stream."""
    around = tuple(f"{path}." for path in recognised.blocks)
    outputs = [one for one in recognised.points if isinstance(one, OutputPoint) and one.path.startswith(around)]
    return block_points(model, outputs)


def _named(model: Any, points: Sequence[InjectionPoint], component: str) -> list[InjectionPoint]:
    """The points, where the one embedding of tokens and the one head have no path for a site, as in every family."""
    if component == "model":
        return [*points]
    embedding, heads = _input_embeddings(model), [one for one in points if one.role == "head"]
    single = heads[0] if len(heads) == 1 else None

    def is_first(one: InjectionPoint) -> bool:
        return one is single or (one.role == "embed.tokens" and model.get_submodule(one.path) is embedding)

    return [replace(one, site="") if is_first(one) else one for one in points]


def _input_embeddings(model: Any) -> object:
    try:
        return model.get_input_embeddings()
    except (AttributeError, NotImplementedError, TypeError):  # there are none, or of several towers
        return None


def _tokens(model: nn.Module, points: Sequence[InjectionPoint]) -> list[InjectionPoint]:
    """The embedded sequence, where a layer of torch's gives it: others may give a scale beside it."""
    named = [one for one in points if one.role == "embed.tokens" and not one.site]
    first = [one for one in named if isinstance(model.get_submodule(one.path), nn.Embedding)]
    return [
        TokensPoint("tokens", one.path, "", one.out_features, one.out_features, TokensLayout(), tags=one.tags)
        for one in first
    ]
