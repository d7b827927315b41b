"""Encoder-decoder models of transformers: T5 with its kin, BART, and Whisper, which listens and writes.

The two stacks are told apart by the tag `stack` and by the site: `attn.q@language.encoder.0`. A model that has only one
of them, such as the T5 encoder of a diffusion pipeline, names its points as the whole one does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from adapterkit.backend import Reach
from adapterkit.backends.longer import attend_longer, longer_decoder, longer_encoder
from adapterkit.backends.transformers_family import Family, FamilyBackend
from adapterkit.errors import UnsupportedModelError
from adapterkit.mapping.family import Attention, Entry, Group, Output, Read, Tokens, Weight
from adapterkit.mapping.layouts import first_path
from adapterkit.plugins.classes import SEQ2SEQ
from adapterkit.points import InjectionPoint

if TYPE_CHECKING:
    from torch import nn

Entries = tuple[Entry, ...]


def _t5_heads(attention: Any) -> tuple[int, int]:
    return attention.n_heads, attention.key_value_proj_dim


def _heads(attention: Any) -> tuple[int, int]:
    return attention.num_heads, attention.head_dim


def _stack(stack: str, roots: tuple[str, ...], layers: str, stem: Entries, block: Entries) -> tuple[Group, Group]:
    """What is in one stack: once at its root, and in each of its layers. `roots` are alternatives."""
    return (
        Group("|".join(roots), stack, stem, {"stack": stack}),
        Group("|".join(f"{root}.{layers}.{{layer}}" for root in roots), f"{stack}.{{layer}}", block, {"stack": stack}),
    )


def _t5_attention(role: str, layer: int, name: str) -> Entries:
    """An attention of T5 as a sublayer: x + dropout(attention(layer_norm(x)))."""
    path, norm = f"layer.{layer}.{name}", f"layer.{layer}.layer_norm"
    return (
        *(Weight(f"{role}.{part}", f"{path}.{part}") for part in "qkvo"),
        Weight("embed.pos", f"{path}.relative_attention_bias"),
        Attention(f"{role}.kv", path, _t5_heads),
        Output(role, f"layer.{layer}.dropout", residual=norm, norm_in=norm),
    )


def _t5_mlp(layer: int) -> Entries:
    path, norm = f"layer.{layer}.DenseReluDense", f"layer.{layer}.layer_norm"
    return (
        Weight("mlp.gate", f"{path}.wi_0"),
        Weight("mlp.up", f"{path}.wi_1|{path}.wi"),
        Weight("mlp.down", f"{path}.wo"),
        Output("mlp", f"layer.{layer}.dropout", residual=norm, norm_in=norm),
    )


_T5_SELF, _T5_CROSS = _t5_attention("attn", 0, "SelfAttention"), _t5_attention("cross", 1, "EncDecAttention")
_T5_STEM = (Weight("embed.tokens", "embed_tokens"), Tokens("tokens", "embed_tokens"))

T5 = Family(
    lengthening=longer_decoder,
    classes=SEQ2SEQ["t5"],
    groups=(
        *_stack("encoder", ("encoder", "transformer.encoder"), "block", _T5_STEM, (*_T5_SELF, *_t5_mlp(1))),
        *_stack("decoder", ("decoder", "transformer.decoder"), "block", _T5_STEM, (*_T5_SELF, *_T5_CROSS, *_t5_mlp(2))),
        Group(
            "",
            "",
            (
                Weight("head", "lm_head|qa_outputs|classifier|classification_head.out_proj"),
                Weight("head.transform", "classification_head.dense"),
            ),
        ),
    ),
)


def _bart_projections(role: str, path: str) -> Entries:
    return (
        *(Weight(f"{role}.{part}", f"{path}.{part}_proj") for part in "qkv"),
        Weight(f"{role}.o", f"{path}.out_proj"),
        Attention(f"{role}.kv", path, _heads),
    )


_BART_SELF, _BART_CROSS = _bart_projections("attn", "self_attn"), _bart_projections("cross", "encoder_attn")
_BART_MLP = (Weight("mlp.up", "fc1"), Weight("mlp.down", "fc2"))
_BART_ROOTS = {stack: (f"model.{stack}", stack) for stack in ("encoder", "decoder")}
# Both models' position tables are looked up by other numbers than their module is called with.
_POSITIONS = Read("embed.pos", "embed_positions", form="embedding")
_BART_STEM = (Weight("embed.tokens", "embed_tokens"), _POSITIONS, Tokens("tokens", "embed_tokens"))


def _post_norm(role: str, core: str, first: str, norm: str) -> Output:
    """For blocks that compute norm(x + sublayer(x)): x enters the sublayer's `first` module."""
    return Output(role, core, residual=first, norm_out=norm)


def _pre_norm(role: str, core: str, norm: str) -> Output:
    """For blocks that compute x + sublayer(norm(x))."""
    return Output(role, core, residual=norm, norm_in=norm)


_BART_ENDS = (
    _post_norm("attn", "self_attn.out_proj", "self_attn", "self_attn_layer_norm"),
    _post_norm("mlp", "fc2", "fc1", "final_layer_norm"),
)

BART = Family(
    lengthening=longer_decoder,
    classes=SEQ2SEQ["bart"],
    groups=(
        *_stack("encoder", _BART_ROOTS["encoder"], "layers", _BART_STEM, (*_BART_SELF, *_BART_MLP, *_BART_ENDS)),
        *_stack(
            "decoder",
            _BART_ROOTS["decoder"],
            "layers",
            _BART_STEM,
            (
                *_BART_SELF,
                *_BART_CROSS,
                *_BART_MLP,
                *_BART_ENDS,
                _post_norm("cross", "encoder_attn.out_proj", "encoder_attn", "encoder_attn_layer_norm"),
            ),
        ),
        Group(
            "",
            "",
            (
                Weight("head", "lm_head|qa_outputs|classification_head.out_proj"),
                Weight("head.transform", "classification_head.dense"),
            ),
        ),
    ),
)

_WHISPER_ENDS = (
    _pre_norm("attn", "self_attn.out_proj", "self_attn_layer_norm"),
    _pre_norm("mlp", "fc2", "final_layer_norm"),
)

# What makes the encoder's sequence from a spectrogram.
_CONVOLUTIONS = tuple(
    Group("|".join(_BART_ROOTS["encoder"]), f"encoder.{name}", (Weight("embed.audio", name),), {"stack": "encoder"})
    for name in ("conv1", "conv2")
)

WHISPER = Family(
    classes=SEQ2SEQ["whisper"],
    groups=(
        *_CONVOLUTIONS,
        *_stack("encoder", _BART_ROOTS["encoder"], "layers", (_POSITIONS,), (*_BART_SELF, *_BART_MLP, *_WHISPER_ENDS)),
        *_stack(
            "decoder",
            _BART_ROOTS["decoder"],
            "layers",
            _BART_STEM,
            (
                *_BART_SELF,
                *_BART_CROSS,
                *_BART_MLP,
                *_WHISPER_ENDS,
                _pre_norm("cross", "encoder_attn.out_proj", "encoder_attn_layer_norm"),
            ),
        ),
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
