"""What the original checkpoints of Qwen-Image call the modules of its transformer."""

from __future__ import annotations

from adapterkit.formats.names.tables import TableNaming
from adapterkit.naming import KnownBase


class QwenImageNaming(TableNaming):
    """As diffusers does."""

    table = ()
    known = KnownBase("qwen_image", "Qwen-Image", "https://github.com/QwenLM/Qwen-Image", 1328, 1328, folded=True)
