"""Structures that most models repeat, as data: attentions, feed-forwards and blocks, matched by their children."""

from adapterkit.mapping.templates import attentions, blocks, feed_forwards
from adapterkit.mapping.templates.diffusion import DIFFUSION_ATTENTIONS, DIFFUSION_FEED_FORWARDS
from adapterkit.mapping.templates.diffusion_blocks import DIFFUSION_BLOCKS
from adapterkit.mapping.templates.encoder_blocks import ENCODER_BLOCKS
from adapterkit.mapping.templates.joint_blocks import JOINT_BLOCKS
from adapterkit.mapping.templates.picture_blocks import PICTURE_ATTENTIONS, PICTURE_BLOCKS, PICTURE_FEED_FORWARDS
from adapterkit.mapping.templates.sound_blocks import SOUND_BLOCKS
from adapterkit.mapping.templates.template import AttentionTemplate, BlockTemplate, Template
from adapterkit.mapping.templates.text_attentions import TEXT_ATTENTIONS, WINDOWED
from adapterkit.mapping.templates.text_blocks import TEXT_BLOCKS
from adapterkit.mapping.templates.vision import VISION_ATTENTIONS, VISION_FEED_FORWARDS
from adapterkit.mapping.templates.vision_blocks import VISION_BLOCKS

ATTENTIONS = (
    *WINDOWED,
    *PICTURE_ATTENTIONS,
    *DIFFUSION_ATTENTIONS,
    *attentions.ATTENTIONS,
    *TEXT_ATTENTIONS,
    *VISION_ATTENTIONS,
)
BLOCKS = (
    *blocks.BLOCKS,
    *DIFFUSION_BLOCKS,
    *JOINT_BLOCKS,
    *TEXT_BLOCKS,
    *ENCODER_BLOCKS,
    *VISION_BLOCKS,
    *PICTURE_BLOCKS,
    *SOUND_BLOCKS,
)
FEED_FORWARDS = (*DIFFUSION_FEED_FORWARDS, *VISION_FEED_FORWARDS, *feed_forwards.FEED_FORWARDS, *PICTURE_FEED_FORWARDS)

__all__ = ["ATTENTIONS", "BLOCKS", "FEED_FORWARDS", "AttentionTemplate", "BlockTemplate", "Template"]
