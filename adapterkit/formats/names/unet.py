"""What the original checkpoints of Stable Diffusion 1.x, 2.x and XL call the modules of a UNet."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

from adapterkit.contract.naming import KnownBase, Naming, Piece
from adapterkit.contract.view import ComponentView

_TOP = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "class_embedding.linear_1": "label_emb.0.0",
    "class_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}

_V1 = KnownBase("sd_v1", "stable-diffusion-v1", "diffusers", 512, 512)
_V2 = KnownBase("sd_v2", "stable-diffusion-v2-512", "diffusers", 512, 512)
_XL = KnownBase("sdxl_base_v1-0", "stable-diffusion-xl-v1-base", "https://github.com/Stability-AI/generative-models")
_V2_WIDTH = 1024


class UNetNaming(Naming):
    """Blocks are counted through: `input_blocks`, `middle_block`, `output_blocks`."""

    def modules(self, component: ComponentView) -> Mapping[str, Sequence[Piece]]:
        blocks = dict(_blocks(frozenset(component.paths)))
        found: dict[str, Sequence[Piece]] = {}
        for path in component.paths:
            if (name := _TOP.get(path) or _inside(path, blocks)) is not None:
                found[name] = [Piece(path)]
        return found

    def in_files(self, component: ComponentView, style: str) -> bool:
        return style != "kohya" or _is_xl(component)  # the others go by diffusers' names

    def base(self, component: ComponentView) -> KnownBase | None:
        if _is_xl(component):
            return _XL
        return _V2 if component.config.get("cross_attention_dim") == _V2_WIDTH else _V1


def _is_xl(component: ComponentView) -> bool:
    return component.config.get("addition_embed_type") == "text_time"


def _inside(path: str, blocks: Mapping[str, str]) -> str | None:
    head, below = _split(path)
    if head not in blocks:
        return None
    if head.split(".")[-2] == "resnets":
        return f"{blocks[head]}.{_RESNET[below]}" if below in _RESNET else None
    return f"{blocks[head]}.{below}" if below else blocks[head]


def _split(path: str) -> tuple[str, str]:
    """A block's resnet, attention or sampler, and what is in it."""
    parts = path.split(".")
    cut = 3 if parts[0] == "mid_block" else 4
    if len(parts) > 3 and parts[2].endswith("samplers"):
        cut = 5
    return ".".join(parts[:cut]), ".".join(parts[cut:])


def _blocks(paths: frozenset[str]) -> Iterator[tuple[str, str]]:
    at = itertools.count(1)
    for block in _counted("down_blocks", paths):
        for resnet in _counted(f"{block}.resnets", paths):
            yield from _pair(resnet, f"input_blocks.{next(at)}")
        if f"{block}.downsamplers.0.conv" in paths:
            yield f"{block}.downsamplers.0.conv", f"input_blocks.{next(at)}.0.op"
    yield "mid_block.resnets.0", "middle_block.0"
    yield "mid_block.attentions.0", "middle_block.1"
    yield "mid_block.resnets.1", "middle_block.2"
    at, last = itertools.count(), ""
    for block in _counted("up_blocks", paths):
        for resnet in _counted(f"{block}.resnets", paths):
            last = f"output_blocks.{next(at)}"
            yield from _pair(resnet, last)
        place = 2 if f"{block}.attentions" in paths else 1
        yield f"{block}.upsamplers.0.conv", f"{last}.{place}.conv"


def _pair(resnet: str, block: str) -> Iterator[tuple[str, str]]:
    yield resnet, f"{block}.0"
    yield resnet.replace(".resnets.", ".attentions."), f"{block}.1"


def _counted(start: str, paths: frozenset[str]) -> Iterator[str]:
    return itertools.takewhile(paths.__contains__, (f"{start}.{i}" for i in itertools.count()))
