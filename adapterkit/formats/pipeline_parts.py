"""Which model of a pipeline a file means by one of its parts: known by what it is, not by what it is called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from adapterkit.contract.view import ComponentView
from adapterkit.formats.prefixes import ANY, DENOISER, TEXT, TEXT_1, TEXT_2, TEXT_3

_CLIP = frozenset({"transformers:CLIPTextModel", "transformers:CLIPTextModelWithProjection"})
_PROJECTING = "transformers:CLIPTextModelWithProjection"
_T5 = "transformers:T5PreTrainedModel"
_TEXT = "transformers:PreTrainedModel"
_CLIP_L_WIDTH = 768
_SECOND = "text_encoder_2"
_PARTS = frozenset({DENOISER, ANY, TEXT, TEXT_1, TEXT_2, TEXT_3})


def candidates(part: str, components: Mapping[str, ComponentView]) -> list[str]:
    """The components that a part can be, the likeliest first.

    Args:
        part: See `prefixes`; or a component's own name.
        components: The model's.
    """
    if part not in _PARTS:
        return [part] if part in components else []
    texts = texts_of(components)
    denoisers = [name for name, one in components.items() if not _is(one, _TEXT)]
    if part == DENOISER:
        return denoisers
    if part == ANY:
        return [*denoisers, *(one.name for one in texts)]
    ranked = sorted(texts, key=lambda one: _rank(part, _kind(one, texts)))
    return [one.name for one in ranked]


def texts_of(components: Mapping[str, ComponentView]) -> list[ComponentView]:
    """The text encoders, in the order of the pipeline."""
    return [one for one in components.values() if _is(one, _TEXT)]


def part_of(component: ComponentView, components: Mapping[str, ComponentView]) -> str:
    """Which part a component is."""
    return _kind(component, texts_of(components)) if _is(component, _TEXT) else DENOISER


def _is(component: ComponentView, cls: str) -> bool:
    return cls in component.classes


def _kind(one: ComponentView, texts: Sequence[ComponentView]) -> str:
    if _is(one, _T5):
        return TEXT_3
    if not _CLIP & {*one.classes}:
        return TEXT
    clips = [other for other in texts if _CLIP & {*other.classes}]
    if len(clips) > 1:
        return TEXT_1 if one is clips[0] else TEXT_2
    bare = len(texts) == 1 and _is(one, _PROJECTING) and one.config.get("hidden_size") != _CLIP_L_WIDTH
    return TEXT_2 if one.name == _SECOND or bare else TEXT_1


def _rank(part: str, kind: str) -> int:
    """Files of Flux say 2 for T5 too, and newer ones 1 for whatever encoder there is."""
    order = {
        TEXT_1: (TEXT_1, TEXT, TEXT_2, TEXT_3),
        TEXT_2: (TEXT_2, TEXT_3, TEXT_1, TEXT),
        TEXT_3: (TEXT_3, TEXT, TEXT_2, TEXT_1),
        TEXT: (TEXT, TEXT_3, TEXT_1, TEXT_2),
    }
    return order[part].index(kind)
