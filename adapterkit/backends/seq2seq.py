"""Encoder-decoder models of transformers: T5 with its kin, BART, and Whisper, which listens and writes.

The two stacks are told apart by the tag `stack` and by the site: `attn.q@language.encoder.0`. A model that has only one
of them, such as the T5 encoder of a diffusion pipeline, names its points as the whole one does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from adapterkit.backend import Reach
from adapterkit.backends.language_decoders import EMBEDDED
from adapterkit.backends.longer import attend_longer, longer_decoder, longer_encoder
from adapterkit.backends.transformers_family import Family, FamilyBackend
from adapterkit.errors import UnsupportedModelError
from adapterkit.mapping.family import Block, Entry, Group, Read, Weight
from adapterkit.mapping.layouts import first_path
from adapterkit.plugins.classes import SEQ2SEQ
from adapterkit.points import InjectionPoint

if TYPE_CHECKING:
    from torch import nn

Entries = tuple[Entry, ...]


def _stack(stack: str, around: str, layers: str, stem: Entries, further: Entries = ()) -> tuple[Group, Group]:
    """What is in one stack: once at its root, and in each of its layers. `around` is what may hold the stacks."""
    roots = (f"{around}.{stack}", stack)
    blocks = "|".join(f"{root}.{layers}.{{layer}}" for root in roots)
    return (
        Group("|".join(roots), stack, stem, {"stack": stack}),
        Group(blocks, f"{stack}.{{layer}}", (Block(), *further), {"stack": stack}),
    )


_T5_POSITIONS = (
    Weight("embed.pos", "layer.0.SelfAttention.relative_attention_bias"),
    Weight("embed.pos", "layer.1.EncDecAttention.relative_attention_bias"),
)
_HEAD = (
    Weight("head", "lm_head|qa_outputs|classifier|classification_head.out_proj"),
    Weight("head.transform", "classification_head.dense"),
)

T5 = Family(
    lengthening=longer_decoder,
    classes=SEQ2SEQ["t5"],
    groups=(
        *_stack("encoder", "transformer", "block", EMBEDDED, _T5_POSITIONS),
        *_stack("decoder", "transformer", "block", EMBEDDED, _T5_POSITIONS),
        Group("", "", _HEAD),
    ),
)

# Both models' position tables are looked up by other numbers than their module is called with.
_POSITIONS = Read("embed.pos", "embed_positions", form="embedding")
_STEM = (*EMBEDDED, _POSITIONS)

BART = Family(
    lengthening=longer_decoder,
    classes=SEQ2SEQ["bart"],
    groups=(
        *_stack("encoder", "model", "layers", _STEM),
        *_stack("decoder", "model", "layers", _STEM),
        Group("", "", _HEAD),
    ),
)

# What makes the encoder's sequence from a spectrogram.
_CONVOLUTIONS = tuple(
    Group("model.encoder|encoder", f"encoder.{name}", (Weight("embed.audio", name),), {"stack": "encoder"})
    for name in ("conv1", "conv2")
)

WHISPER = Family(
    classes=SEQ2SEQ["whisper"],
    groups=(
        *_CONVOLUTIONS,
        *_stack("encoder", "model", "layers", (_POSITIONS,)),
        *_stack("decoder", "model", "layers", _STEM),
        Group("", "", (Weight("head", "proj_out|classifier"), Weight("head.transform", "projector"))),
    ),
)


class Seq2SeqBackend(FamilyBackend):
    """T5, Flan-T5, mT5, UMT5, BART and Whisper, with any of their heads or none, and T5's encoders alone."""

    component = "language"
    name = "seq2seq"
    generates = True
    families = (T5, BART, WHISPER)
    ignored: ClassVar[Mapping[str, str]] = {
        "*norm": "a norm's gain is no projection; adapters act on the projections beside it",
        "*layernorm_embedding": "a norm, as above",
        "shared": "a second name of the stacks' embeddings, which is never called",
        "model.shared": "as above",
        "transformer.shared": "as above",
        "layer_weights": "the mixture of the encoder's layers is a vector, and belongs to the head",
    }

    def points(self, model: nn.Module, component: str) -> list[InjectionPoint]:
        points = super().points(model, component)
        if len(_stacks(model)) > 1:  # a prompt is the encoder's, and the decoder attends to it
            points = [p for p in points if p.role != "prompt" or p.tags["stack"] == "encoder"]
        if not points:
            raise UnsupportedModelError(
                f"{type(model).__name__} is one stack of a model and cannot be told from the other; "
                "pass the model that holds it, or an encoder model such as T5EncoderModel"
            )
        return points

    def reach(self, model: nn.Module, point: InjectionPoint) -> Reach:
        found, stacks = super().reach(model, point), _stacks(model) if point.role == "prompt" else {}
        if found.lengthening is None or len(stacks) < 2:
            return found
        return replace(found, lengthening=longer_encoder, attending={stacks["decoder"]: attend_longer})


def _stacks(model: nn.Module) -> dict[str, str]:
    """Encoder and decoder -> their paths, as far as they are there."""
    roots = {stack: (stack, f"model.{stack}", f"transformer.{stack}") for stack in ("encoder", "decoder")}
    found = {stack: first_path(model, "|".join(paths)) for stack, paths in roots.items()}
    return {stack: path for stack, path in found.items() if path is not None}
