"""Textual inversion. This module is what adapterkit imports when it starts, so it imports no torch."""

from __future__ import annotations

from adapterkit import hookimpl
from adapterkit.specs import AdapterSpec, FormatSpec


@hookimpl
def adapterkit_register_adapters() -> list[AdapterSpec]:
    """Adds the type `textual_inversion`."""
    target = "adapterkit_textual_inversion.inversion:TextualInversion"
    summary = "new tokens with vectors of their own, beside an embedding that stays as it is"
    return [AdapterSpec("textual_inversion", target, kinds={"weight"}, summary=summary)]


@hookimpl
def adapterkit_register_formats() -> list[FormatSpec]:
    """Adds the format `embeddings`, which lies beside the files of what else an adapter has."""
    target = "adapterkit_textual_inversion.embeddings:EmbeddingFiles"
    summary = "embedding files of A1111, ComfyUI and diffusers, one for each string"
    return [FormatSpec("embeddings", target, summary=summary, apart=("textual_inversion",))]
