"""Files of LyCORIS: kohya's keys with the tensors of its types, or `lycoris_` and a library's own names."""

from __future__ import annotations

from adapterkit.formats.kohya import KohyaFormat


class LycorisFormat(KohyaFormat):
    """One safetensors file of the dialect `lycoris`, whatever types its modules have."""

    style = "lycoris"
    rotations = "lora_unet_"
