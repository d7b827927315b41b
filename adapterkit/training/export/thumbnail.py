"""A small picture of a sample, for the header of a file."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path

from adapterkit.training.samples.sheets import is_picture

_SIDE = 256


def thumbnail(samples: Sequence[Path]) -> str:
    """The first picture of these as a data URL, at most 256 pixels on a side; empty where there is none."""
    picture = next((path for path in samples if is_picture(path) and path.is_file()), None)
    if picture is None:
        return ""
    from PIL import Image

    held = io.BytesIO()
    with Image.open(picture) as image:
        small = image.convert("RGB")
        small.thumbnail((_SIDE, _SIDE))
        small.save(held, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(held.getvalue()).decode()}"
