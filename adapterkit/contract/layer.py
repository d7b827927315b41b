"""The contract of a layer handler: how layers of a class keep a weight that is no plain dense parameter."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from torch import Tensor, nn

from adapterkit.errors import NotMergeableError

if TYPE_CHECKING:
    from adapterkit.points import WeightLayout


class LayerHandler(ABC):
    """How some layers keep their weight: quantized, in a float of eight bits, in shards.

    Whatever reads a base's weight (start values, `base.weight` in a forward, weights that a model reads, a merge) asks
    the handler of its layer. A handler must carry no state, so that an adapted model can be copied and pickled.

    Attributes:
        plugin: The name of the plug-in that registered it, for messages. adapterkit sets it.
    """

    plugin: str = ""

    def layout(self, module: nn.Module) -> tuple[WeightLayout, int, int] | None:
        """Layout, in_features and out_features of a layer whose class derives from none of torch's; None from one."""
        return None

    @abstractmethod
    def weight(self, module: nn.Module, layout: WeightLayout) -> Tensor:
        """The weight that the layer computes with, dense, in the order of memory that the layout tells.

        Returns:
            For a linear layer [out, in]; in a floating-point dtype that sums can be kept in.
        """

    def dense(self, module: nn.Module, layout: WeightLayout, weight: Tensor, bias: Tensor | None) -> nn.Module:
        """A plain layer with this weight and bias, which computes in the place of `module` while adapters are merged.

        Args:
            module: The layer, which is not to be changed.
            layout: Its layout.
            weight: Shaped as what `weight` gives, and in its dtype.
            bias: [out] or None.

        Raises:
            NotMergeableError: By default, for any other layer than a linear one.
        """
        if layout.form != "linear":
            told = f"{type(self).__name__} makes no plain layer of the form {layout.form!r}: its dense() is not written"
            raise NotMergeableError(told)
        plain = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        plain.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            plain.bias = nn.Parameter(bias, requires_grad=False)
        return plain
