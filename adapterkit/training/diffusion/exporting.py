"""What a trained denoiser's adapter is written as for others, and how the files are checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

import numpy as np
import torch
from torch import Tensor

from adapterkit.formats.foreign_names import known_base
from adapterkit.handle.view import seen
from adapterkit.mapping.model import map_model
from adapterkit.training.diffusion.drawing import Drawing
from adapterkit.training.export.libraries import diffusers_reader
from adapterkit.training.export.scripts import Shown, scripts_metadata
from adapterkit.training.samples.sample import Sample
from adapterkit.training.task import OtherReader

_PROBED = 4
"""Denoising steps of the picture that shows whether an exported file is what was trained."""
_READ_BY_DIFFUSERS = frozenset({"kohya", "comfy", "diffusers"})


class Exporting(Drawing):
    """The part of the task that knows other tools."""

    def exports(self) -> Sequence[str]:
        """For the UIs, by kohya's names, or by ComfyUI's where newer models have no others; and for diffusers."""
        base = known_base(seen(map_model(self.pipe)))
        return ("comfy" if base is not None and base.folded else "kohya", "diffusers")

    def metadata(self) -> Mapping[str, str]:
        """As kohya's scripts write it."""
        shown = [Shown(one.path.parent.resolve().name, one.caption, one.repeats) for one in self.learnt()]
        return scripts_metadata(self.config, shown, self.size)

    def probe(self) -> Tensor:
        """One picture [height, width, 3], 0 to 1, in few steps; of floats, for 8 bits hide what a short run does."""
        sample = dataclasses.replace(next(iter(self.samples()), Sample("")), steps=None)
        picture = self.picture(sample, min(_PROBED, self.options.sample_steps), "np")
        return torch.from_numpy(np.asarray(picture, dtype=np.float32))

    def as_loaded(self) -> AbstractContextManager[object]:
        """Without the words that adapters have brought."""
        return self.words.untaught()

    def other_reader(self, format: str) -> OtherReader | None:
        """The pipeline's own loader; of files for the UIs it reads those of some models."""
        return diffusers_reader(self.pipe, own=format == "diffusers") if format in _READ_BY_DIFFUSERS else None
