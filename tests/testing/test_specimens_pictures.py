"""Shrunk copies of models that see and hear: each runs, and its calls together reach every layer."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import nn

from adapterkit.testing.specimens import NoSpecimen
from adapterkit.testing.specimens.exact import InFloat64
from adapterkit.testing.specimens.pictures import specimen_of
from tests.architectures.catalogue import BrokenDefaultError, names, skeleton

LINES = {"image_classification": 0.95, "image_text": 0.95, "audio": 0.85}


def _default(name: str) -> nn.Module:
    """A model on the meta device from its own default config."""
    cls: Any = getattr(importlib.import_module("transformers"), name)
    with torch.device("meta"):
        return cls(cls.config_class())


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("ViTForImageClassification", ["image"]),
        ("LlavaForConditionalGeneration", ["image and text"]),
        ("Qwen2VLForConditionalGeneration", ["image and text"]),
        ("GitForCausalLM", ["image and text"]),
        ("WhisperForAudioClassification", ["audio"]),
        ("VoxtralRealtimeForConditionalGeneration", ["audio and text"]),  # adds what it hears to its text
        ("VibeVoiceAsrForConditionalGeneration", ["audio and text"]),  # hears with noise unless told not to
    ],
)
def test_calls_reach_every_linear_layer_and_repeat_themselves(name: str, labels: list[str]) -> None:
    made = specimen_of(_default(name))
    reached: set[nn.Module] = set()
    for module in made.model.modules():
        module.register_forward_hook(lambda module, args, output: reached.add(module))
    first = {label: call() for label, call in made.calls.items()}
    assert list(first) == labels
    missed = [
        path for path, module in made.model.named_modules() if isinstance(module, nn.Linear) and module not in reached
    ]
    assert not [path for path in missed if "pool" not in path]  # poolers of towers whose tokens are used instead
    for label, call in made.calls.items():
        assert torch.isfinite(first[label]).all()
        assert torch.equal(call(), first[label])


def test_what_is_seen_matters() -> None:
    made = specimen_of(_default("LlavaForConditionalGeneration"))
    before = made.calls["image and text"]()
    with torch.no_grad():
        made.model.get_submodule("model.vision_tower").get_submodule("embeddings.patch_embedding").weight.mul_(2.0)
    assert not torch.allclose(made.calls["image and text"](), before)


def test_a_model_of_text_alone_is_not_for_here() -> None:
    with pytest.raises(NoSpecimen, match="neither pictures nor sound"):
        specimen_of(_default("GPT2LMHeadModel"))


def test_lower_precisions_asked_for_are_not_given() -> None:
    x = torch.ones(2, dtype=torch.float64)
    with InFloat64():
        kinds = {
            y.dtype
            for y in (x.float(), x.to(torch.float32), x.softmax(-1, dtype=torch.float32), torch.full((2,), -1e300))
        }
    assert kinds == {torch.float64}
    assert x.float().dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize("line", sorted(LINES))
def test_most_architectures_have_a_specimen(line: str) -> None:
    reasons = {}
    for name in names(line):
        try:
            made = specimen_of(skeleton(line, name))
            assert all(torch.isfinite(call()).all() for call in made.calls.values()), name
        except (NoSpecimen, BrokenDefaultError) as error:
            reasons[name] = str(error)
    assert len(reasons) <= (1 - LINES[line]) * len(names(line)), reasons
