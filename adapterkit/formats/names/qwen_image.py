"""What the original checkpoints of Qwen-Image call the modules of its transformer."""

from __future__ import annotations

from adapterkit.contract.naming import KnownBase
from adapterkit.formats.names.tables import TableNaming


class QwenImageNaming(TableNaming):
    """As diffusers does."""

    table = ()
    known = KnownBase("qwen_image", "Qwen-Image", "https://github.com/QwenLM/Qwen-Image", 1328, 1328, folded=True)
