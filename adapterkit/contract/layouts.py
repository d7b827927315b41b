"""What an adapter must know of a point to act there, by what can act there. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Form = Literal["linear", "linear_t", "conv", "embedding", "norm"]
Access = Literal["call", "read", "any"]
Repeats = Literal["each", "whole"]
"""How one sample becomes several rows of a batch: each of them several times, one after the other, as beams; or the
whole batch several times, one copy behind the other, as with guidance."""


@dataclass(frozen=True)
class Span:
    """The rows of a fused projection's output that belong to one point.

    The output's last axis (the channel axis of a convolution) is read as `count` groups of `step` rows; the span
    is rows `start : start + size` of every group. A contiguous span is one group: timm's value is
    `Span(2 * d, d)`; GPT-NeoX's per-head query is `Span(0, head_dim, count=heads, step=3 * head_dim)`.

    Attributes:
        start: First row of the span inside each group.
        size: Rows of the span inside each group.
        count: Number of groups.
        step: Rows in a group, or None where there is one group.
    """

    start: int
    size: int
    count: int = 1
    step: int | None = None

    @property
    def features(self) -> int:
        """The number of rows in all."""
        return self.size * self.count


@dataclass(frozen=True)
class WeightLayout:
    """What a weight point's module computes, so that an adapter's factors can compute alike.

    Attributes:
        form: `linear` [out, in]; `linear_t` [in, out] (transformers' Conv1D); `conv`; `embedding` [in, out]; `norm`
            [features], at norm points, whose weight is always read.
        bias: Whether the module has a bias.
        kernel, stride, dilation: One entry per spatial axis; empty where there is none.
        padding: Entries per axis, or torch's "same" or "valid".
        padding_mode: torch's name of the mode.
        groups: Convolution groups.
        scale: Factor on an embedding's rows (Gemma multiplies by sqrt(d)); 1 elsewhere.
        access: How the model uses the weight: it `call`s the module, or it `read`s the parameter and computes with it
            elsewhere. A weight that is read can only take adapters that have an equivalent weight. `any` where it is
            not known: adapters act on the call, and on what is read during a forward of the model.
        parameter: The parameter's name in its module.
        bias_parameter: The name of its bias.
        index: For a stack of weights in one parameter (experts): this one's place along the first axis.
    """

    form: Form
    bias: bool = False
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    dilation: tuple[int, ...] = ()
    padding_mode: str = "zeros"
    groups: int = 1
    scale: float = 1.0
    access: Access = "call"
    parameter: str = "weight"
    bias_parameter: str = "bias"
    index: int | None = None


@dataclass(frozen=True)
class OutputLayout:
    """Where a sublayer's neighbours are: the paths (relative to the component) that give an adapter its inputs.

    Attributes:
        residual: Module whose first input is the residual stream before the sublayer.
        norm_in: Norm between the residual stream and the sublayer (pre-norm blocks), or None.
        norm_out: Norm over sublayer output plus residual (post-norm blocks), or None.
        whole: Whether it is a whole block, whose output is the residual stream itself.
        channels_first: Whether stream and output are [batch, features, height, width] in the model. Adapters are given
            them, and norms, with the features last as everywhere.
    """

    residual: str
    norm_in: str | None = None
    norm_out: str | None = None
    whole: bool = False
    channels_first: bool = False


@dataclass(frozen=True)
class AttentionLayout:
    """Keys are [batch, kv_heads, length, head_dim], values [batch, kv_heads, length, value_width].

    Attributes:
        kv_heads: Heads of keys and values, which grouped-query attention has fewer of.
        head_dim: Width of one head; not always hidden size / heads.
        value_dim: Width of one head's values, where it is another (latent attention); None where it is `head_dim`.
        source: Width of the tokens that the keys and the values are made from, each by one layer that is a point too;
            None where there are no such layers. Found for every family alike.
    """

    kv_heads: int
    head_dim: int
    value_dim: int | None = None
    source: int | None = field(default=None, compare=False)  # told by the model, not by a family

    @property
    def value_width(self) -> int:
        """Width of one head's values."""
        return self.head_dim if self.value_dim is None else self.value_dim


@dataclass(frozen=True)
class TokensLayout:
    """The embedded sequence [batch, length, features] can be changed.

    Attributes:
        extendable: Whether the family accepts a longer sequence than the embedding made.
        lengthens: Whether this point makes it longer: the adapter is asked for further positions (`lengthen`), which
            nothing outside of the point's module sees.
        masked: Whether each row of a batch can have positions of its own, since the family masks the others'.
        until: Where no one module runs on the longer sequence: the path of the one before which it ends. The positions
            are put behind what the point's module returns, and taken off what enters the module at this path. None
            where the backend's `reach` gives a `lengthening`.
        whole: Path of the model around, where it returns what happens in between (hidden states, attentions): they are
            taken off there too. None where it does not.
    """

    extendable: bool = False
    lengthens: bool = False
    masked: bool = False
    until: str | None = None
    whole: str | None = None
