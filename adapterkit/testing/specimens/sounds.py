"""Sound as transformers' models take it: raw, or as spectra over time."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Final

import torch

from adapterkit.testing.specimens.images import ROWS, Inputs, noise, size_in

_SAMPLES: Final = 7680
_FRAMES: Final = 64
_LONG: Final = 200
"""Frames, for models that take them in hundreds."""
_HOP: Final = 320
"""Samples of a codec's frame."""
_MADE: Final = (128, 160, 320, 560)
"""Bands that feature extractors make, where the config does not tell: 128, two or four frames of 80, seven."""
_BANDS: Final = (
    "num_mel_bins",
    "feature_size",
    "input_feat_size",
    "feature_projection_input_dim",
    "input_feat_per_channel",
    "input_dim",
    "mel_bins",
    "n_mels",
    "input_features_dim",
)
_MASKS: Final = ("input_features_mask", "feature_attention_mask", "input_values_mask", "padding_mask")


def sound_inputs(config: object, names: Collection[str]) -> Iterator[Inputs]:
    """The ways to give two sounds to a function with parameters of these names, the likeliest first.

    Args:
        config: The audio tower's.
        names: What the function takes.
    """
    name = next(one for one in ("input_features", "input_values") if one in names)
    for inputs, time in _shapes(config, name, names):
        lengths = torch.full((ROWS,), time)
        yield {**inputs, "chunk_sample_lengths": 160 * lengths}
        for mask in _MASKS:
            if mask in names:
                yield {**inputs, mask: torch.ones(ROWS, time, dtype=torch.bool), "audio_feature_lengths": lengths}
                yield {**inputs, mask: torch.zeros(ROWS, time, dtype=torch.bool)}  # true where it is padding


def _shapes(config: object, name: str, names: Collection[str]) -> Iterator[tuple[Inputs, int]]:
    """Sounds, and how long they are."""
    bands = size_in(config, _BANDS, 80)
    if name == "input_values":
        length = size_in(config, ("max_length",), _FRAMES)
        yield {name: noise(ROWS, length, bands)}, length
        yield {name: noise(ROWS, _SAMPLES)}, _SAMPLES
        yield {name: noise(ROWS, 1, _SAMPLES)}, _SAMPLES
        return
    whole = 2 * size_in(config, ("max_source_positions",), _FRAMES // 2)
    for count in dict.fromkeys((bands, *_MADE)):
        if "input_values" in names:  # a codec that takes both, as long as each other
            both = {"input_values": noise(ROWS, 1, _SAMPLES), name: noise(ROWS, _SAMPLES // _HOP, count)}
            yield both, _SAMPLES
        yield {name: noise(ROWS, count, whole)}, whole
        for frames in (_FRAMES, _LONG):
            yield {name: noise(ROWS, frames, count)}, frames
            yield {name: noise(ROWS, count, frames)}, frames
    yield {name: noise(ROWS, 1, _FRAMES, bands)}, _FRAMES
    yield {name: noise(ROWS, _SAMPLES)}, _SAMPLES
