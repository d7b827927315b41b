"""What an adapter is given of the model: what its point computed before. Part of the contract in `adapter`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from adapterkit.kernels.packed_documents import Documents


class Base(Protocol):
    """What a point computed before this adapter: `base(x)`."""

    def __call__(self, x: Tensor, /) -> Tensor:
        """The output for this input."""
        ...

    @property
    def context(self) -> Mapping[str, Tensor]:
        """The side inputs of the block around the forward, by name; see `Adapters.context`.

        Each has as many rows as this point's input: [rows, ...], on its device.

        Raises:
            ContextError: One that is asked for was not given, or has other rows.
        """
        ...


class Beside(Protocol):
    """What is given to an adapter that puts something beside what the model has: no output, and the side inputs."""

    @property
    def context(self) -> Mapping[str, Tensor]:
        """As `Base.context`; the rows are those of the keys, or of the sequence."""
        ...

    @property
    def input(self) -> Tensor:
        """What the attention's module was called with, [batch, queries, features]: its queries are made from it.

        Only for an adapter with `reads_input`, at an attention point.
        """
        ...


class WeightBase(Base, Protocol):
    """The base at a `weight` point: its frozen weight can be read too.

    Below other adapters (in a `Stack`) it is the weight with those in it.
    """

    @property
    def weight(self) -> Tensor:
        """[out, in / groups, *kernel], in the model's dtype; the point's rows (or columns) only. Requires no grad."""
        ...

    @property
    def bias(self) -> Tensor | None:
        """[out] or None."""
        ...

    def layer(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What the point computes with another weight and bias of these shapes, in the model's dtype."""
        ...


class Sublayer(Base, Protocol):
    """The base at an `output` point: `x` is the residual stream, `base(x)` the sublayer's output before the add.

    The block computes `y = x + base(x)` (pre-norm), or `y = norm_out(x + base(x))` (post-norm).
    """

    @property
    def documents(self) -> Documents | None:
        """Which tokens there are, and which of them are one document; at the output of a whole block alone (`hidden`).

        None where every row is one document without padding, as far as the block is told: by its mask, by positions
        that restart where flash attention has no mask, or by lengths. Who counts positions (`AdapterModule.positional`)
        counts these.
        """
        ...

    def norm_in(self, x: Tensor) -> Tensor:
        """The pre-norm between residual stream and sublayer; the identity in a post-norm block."""
        ...

    def norm_out(self, x: Tensor) -> Tensor:
        """The post-norm over the residual sum; the identity in a pre-norm block."""
        ...


class Attention(Base, Protocol):
    """The base at an `attention` point: `base(query)` is what the softmax attention gave for its query.

    That is [batch, heads, queries, value_width], with whatever other adapters have put in front of the keys.
    """

    def mix(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """`softmax(scale query keys^T) values` with the model's own scale, and no mask: [batch, heads, queries, width].

        Args:
            query: [batch, heads, queries, head_dim].
            keys, values: [batch or nothing, heads or kv_heads, length, width]; cast to the query's dtype.
        """
        ...

    def project(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """What the model's own frozen layers make of tokens: keys and values, before norms and position encodings.

        Only where these layers are known: where the point's layout has a `source`, the width of the tokens.

        Args:
            tokens: [length, features] or [batch, length, features]: like what the keys and values are made from.

        Returns:
            [kv_heads, length, head_dim] and [kv_heads, length, value_width], behind the batch, if any.
        """
        ...


class Part(Protocol):
    """Another adapter at the same point."""

    def __call__(self, x: Tensor, base: Base, /) -> Tensor:
        """As `AdapterModule.forward`."""
        ...
