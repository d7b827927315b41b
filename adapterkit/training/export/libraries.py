"""Other libraries that read exported files, for the length of a check."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.metadata
import importlib.util
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from adapterkit.training.parts import parts_of
from adapterkit.training.task import OtherReader


def diffusers_reader(pipe: Any, *, own: bool) -> OtherReader | None:
    """The loader of a pipeline of diffusers; None for one that has none.

    Args:
        pipe: The pipeline.
        own: Whether the format is its own; otherwise it may not know it for such a model.
    """
    if not hasattr(pipe, "load_lora_weights"):
        return None
    reader = _reader("diffusers", lambda path: _read_by_diffusers(pipe, path), own=own)
    return dataclasses.replace(reader, usage=_line_for_diffusers)


def peft_reader(model: nn.Module) -> OtherReader:
    """PEFT, on a model of transformers."""
    reader = _reader("peft", lambda path: _read_by_peft(model, path), own=True)
    return dataclasses.replace(reader, usage=_line_for_peft)


def _line_for_peft(path: Path) -> str:
    return f'model = PeftModel.from_pretrained(model, "{path.as_posix()}")'


def _line_for_diffusers(path: Path) -> str:
    return f'pipe.load_lora_weights("{path.parent.as_posix()}", weight_name="{path.name}")'


def _reader(library: str, reading: Any, *, own: bool) -> OtherReader:
    lacking = "" if importlib.util.find_spec("peft") else "peft"
    version = "" if lacking and library == lacking else f" {importlib.metadata.version(library)}"
    return OtherReader(f"{library}{version}", reading, lacking, own)


@contextlib.contextmanager
def _read_by_diffusers(pipe: Any, path: Path) -> Iterator[None]:
    with quiet(), as_it_was(pipe):
        pipe.load_lora_weights(str(path.parent), weight_name=path.name)
        try:
            yield
        finally:
            pipe.unload_lora_weights()


@contextlib.contextmanager
def _read_by_peft(model: nn.Module, path: Path) -> Iterator[None]:
    peft: Any = importlib.import_module("peft")
    with quiet(), as_it_was(model):
        wrapped = peft.PeftModel.from_pretrained(model, str(path)).eval()
        try:
            yield
        finally:
            wrapped.unload()


@contextlib.contextmanager
def as_it_was(model: Any) -> Iterator[None]:
    """Puts back which modules are where: a library that fails half-way leaves its own."""
    before = [(one, dict(one._modules)) for part in parts_of(model).values() for one in part.modules()]
    try:
        yield
    finally:
        for module, children in before:
            module._modules.clear()
            module._modules.update(children)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what they say to programmers, and of each model that a file says nothing of."""
    logging: Any = importlib.import_module("transformers.utils.logging")
    found = [logging] if not importlib.util.find_spec("diffusers") else [logging, _diffusers_logging()]
    before = [one.get_verbosity() for one in found]
    for one in found:
        one.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for one, verbosity in zip(found, before, strict=True):
            one.set_verbosity(verbosity)


def _diffusers_logging() -> Any:
    return importlib.import_module("diffusers.utils.logging")
