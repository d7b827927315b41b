"""Encoder-decoder models of transformers: T5 with its kin, BART, and Whisper, which listens and writes.

The two stacks are told apart by the tag `stack`, and by the site: `attn.q@language.encoder.0`. A model that has only
one of them, such as the T5 encoders of diffusion pipelines, names its points like the whole one, so that their files
fit each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from adapterkit.backend import AttentionSeam, Backend
from adapterkit.backends.family import Attention, Entry, Group, Output, Read, Tokens, Weight, resolve
from adapterkit.backends.table import Table, groups_of
from adapterkit.backends.transformers_attention import TransformersAttentionSeam
from adapterkit.errors import UnsupportedModelError
from adapterkit.points import InjectionPoint

if TYPE_CHECKING:
    from torch import nn


def _t5_heads(attention: Any) -> tuple[int, int]:
    return attention.n_heads, attention.key_value_proj_dim


def _heads(attention: Any) -> tuple[int, int]:
    return attention.num_heads, attention.head_dim


def _stack(stack: str, roots: tuple[str, ...], blocks: str, inner: tuple[Entry, ...], stem: tuple[Entry, ...]) -> Group:
    raise NotImplementedError


def _t5_attention(role: str, layer: int, name: str) -> tuple[Entry, ...]:
    """One attention sublayer of T5: x + dropout(o(attention(layer_norm(x))))."""
    path = f"layer.{layer}.{name}"
    norm = f"layer.{layer}.layer_norm"
    return (
        Weight(f"{role}.q", f"{path}.q"),
        Weight(f"{role}.k", f"{path}.k"),
        Weight(f"{role}.v", f"{path}.v"),
        Weight(f"{role}.o", f"{path}.o"),
        Weight("embed.pos", f"{path}.relative_attention_bias"),
        Attention(f"{role}.kv", path, _t5_heads),
        Output(role, f"layer.{layer}.dropout", residual=norm, norm_in=norm),
    )
