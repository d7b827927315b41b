"""The modes of torch in which tensors are made."""

from __future__ import annotations

import contextlib

import torch


def ordinary_tensors() -> contextlib.AbstractContextManager[object]:
    """A block in which tensors that are made can be trained later: those of `torch.inference_mode()` cannot."""
    # A trace can neither ask nor need to: it is run in the mode in which it was traced.
    inferring = not torch.compiler.is_dynamo_compiling() and torch.is_inference_mode_enabled()
    return torch.inference_mode(False) if inferring else contextlib.nullcontext()
