"""Structures that most models repeat, as data: attentions, feed-forwards and blocks, matched by their children."""

from adapterkit.mapping.templates.attentions import ATTENTIONS
from adapterkit.mapping.templates.blocks import BLOCKS
from adapterkit.mapping.templates.feed_forwards import FEED_FORWARDS
from adapterkit.mapping.templates.template import AttentionTemplate, BlockTemplate, Template

__all__ = ["ATTENTIONS", "BLOCKS", "FEED_FORWARDS", "AttentionTemplate", "BlockTemplate", "Template"]
