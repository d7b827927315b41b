"""The kit's own models and the native format run the kit."""

from __future__ import annotations

import torch

import adapterkit as ak
from adapterkit.formats.native import NativeFormat
from adapterkit.testing import BackendConformance, FormatConformance, Sample, families, models, toys

SAMPLES = {one.name: Sample(one.make, *one.inputs(3, torch.float64)) for one in models.EXAMPLES}
families.register()


class TestToys(BackendConformance):
    backend = toys.ToyBackend
    samples = {"language": SAMPLES["language"]}


class TestVision(BackendConformance):
    backend = families.ToyVisionBackend
    samples = {"vision": SAMPLES["vision"]}


class TestDiffusion(BackendConformance):
    backend = families.ToyDiffusionBackend
    samples = {"diffusion": SAMPLES["diffusion"]}


class TestMixture(BackendConformance):
    backend = families.ToyMixtureBackend
    samples = {"mixture": SAMPLES["mixture"]}


class TestNative(FormatConformance):
    format = NativeFormat
    configs = (ak.LoRA(rank=2), ak.Bottleneck(width=3), ak.Prefix(length=2))
    checks_itself = False  # the header's free parts have no checksum
