"""The modes of torch in which tensors are made."""

from __future__ import annotations

import contextlib

import torch


def ordinary_tensors() -> contextlib.AbstractContextManager[object]:
    """A block in which tensors that are made can be trained later: those of `torch.inference_mode()` cannot."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else contextlib.nullcontext()
