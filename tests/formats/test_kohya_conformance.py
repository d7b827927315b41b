"""The kit's checks of a format, of those of the UIs."""

from __future__ import annotations

import adapterkit as ak
from adapterkit.formats.comfy import ComfyFormat
from adapterkit.formats.kohya import KohyaFormat
from adapterkit.testing import FormatConformance


class TestKohya(FormatConformance):
    format = KohyaFormat
    configs = (ak.LoRA(rank=2),)
    tolerance = 1e-6


class TestComfy(FormatConformance):
    format = ComfyFormat
    configs = (ak.LoRA(rank=2),)
    tolerance = 1e-6
