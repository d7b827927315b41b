"""Output points of every vision family: stream plus output is the stream that the next sublayer sees.

If that holds on the base model, an adapter at the point stands exactly between the sublayer and the sum, and gets the
stream that the sum adds to. Where a block scales one of the two on the way, the test says by what.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.points import InjectionPoint, OutputLayout
from tests.backends import multimodal_models, vision_families
from tests.backends.vision_checks import randomise

NAMES = [name for name in vision_families.FAMILIES if name not in vision_families.WITHOUT_OUTPUTS]


def build(name: str) -> tuple[Any, Callable[[Any], Tensor]]:
    if name in multimodal_models.MAKE and name not in vision_families.FAMILIES:
        return multimodal_models.build(name, torch.float64), multimodal_models.see
    return vision_families.build(name, torch.float64), vision_families.see


def first(value: Any) -> Tensor:
    return value[0] if isinstance(value, tuple) else value


class Watch:
    """The stream and the output at each point, while the model runs."""

    def __init__(self, model: nn.Module, points: list[InjectionPoint]) -> None:
        self.stream: dict[str, Tensor] = {}
        self.output: dict[str, Tensor] = {}
        for point in points:
            assert isinstance(point.layout, OutputLayout)
            self._watch(model.get_submodule(point.layout.residual), model.get_submodule(point.path), point.id)

    def _watch(self, residual: nn.Module, core: nn.Module, key: str) -> None:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.stream[key] = (*args, *kwargs.values())[0]

        residual.register_forward_pre_hook(before, with_kwargs=True)
        core.register_forward_hook(lambda _, args, result: self.output.update({key: first(result)}))


def scales(name: str, model: nn.Module, point: InjectionPoint) -> tuple[Any, Any]:
    """What the block multiplies stream and output by: 1 and 1, but for two families."""
    block: Any = model.get_submodule(point.path.rpartition(".")[0])
    if name == "beit":
        return 1, block.lambda_1 if point.role == "attn" else block.lambda_2
    if name == "timm caformer":
        return (block.res_scale1 if point.role == "attn" else block.res_scale2).scale.flatten(), 1
    return 1, 1


def follows(point: InjectionPoint, after: InjectionPoint) -> bool:
    """Whether one sublayer gives its sum to the other: feed-forward after attention, layer after layer."""
    here, there = (p.site.rpartition(".") for p in (point, after))
    steps = (point.role, after.role, int(there[2]) - int(here[2]))
    return (
        point.component == after.component and here[0] == there[0] and steps in (("attn", "mlp", 0), ("mlp", "attn", 1))
    )


@pytest.mark.parametrize("name", [*NAMES, "llava", "qwen", "qwen3"])
def test_stream_plus_output_is_the_next_stream(name: str) -> None:
    model, run = build(name)
    points = [p for p in ak.points(model) if p.kind == "output"]
    watch = Watch(model, points)
    run(model)
    pairs = [(a, b) for a in points for b in points if follows(a, b)]
    if name == "qwen3":  # between the first layers of its language model it adds what the image encoder's layers saw
        pairs = [(a, b) for a, b in pairs if a.role == "attn" or a.tags["tower"] == "vision"]
    assert len(pairs) >= (3 if name != "timm caformer" else 2)
    for point, after in pairs:
        of_stream, of_output = scales(name, model, point)
        total = of_stream * watch.stream[point.id] + of_output * watch.output[point.id]
        single = name.startswith("qwen")  # whose norms compute in single precision
        expected = watch.stream[after.id].reshape(total.shape)
        torch.testing.assert_close(total, expected, rtol=0, atol=1e-5 if single else 1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_an_adapters_inputs_are_that_stream_and_that_output(name: str) -> None:
    """Pfeiffer's form at the first point that has a bottleneck: s + A(s + x)."""
    model, run = build(name)
    [point] = [p for p in ak.points(model) if p.kind == "output"][:1]
    watch = Watch(model, [point])
    run(model)
    stream, output = watch.stream[point.id], watch.output[point.id]
    adapters = ak.Adapters(model)
    adapters.add("a", ak.Bottleneck(width=3, targets=f"path:{point.path}"))
    randomise(adapters)
    run(model)
    module: Any = adapters.modules("a")[point.id]
    expected = output + module.up(torch.relu(module.down(stream.reshape(output.shape) + output)))
    torch.testing.assert_close(watch.output[point.id], expected, rtol=0, atol=1e-12)
