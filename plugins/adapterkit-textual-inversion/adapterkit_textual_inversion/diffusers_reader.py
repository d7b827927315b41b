"""How diffusers reads embedding files, for the length of a check."""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from adapterkit.checkpoint import OtherReader
from adapterkit_textual_inversion.embeddings import KEYS, TEXT_1, TEXT_2


def reader_of(pipe: Any) -> OtherReader | None:
    """The loader of a pipeline that has one.

    Args:
        pipe: A pipeline, or any other model.
    """
    if not hasattr(pipe, "load_textual_inversion"):
        return None
    name = f"diffusers {importlib.metadata.version('diffusers')}"
    usage = None if "text_encoder_2" in pipe.components else _line
    return OtherReader(name, lambda path: _reading(pipe, path), usage=usage)


def _line(path: Path) -> str:
    return f'for file in Path("{path.as_posix()}").glob("*.safetensors"): pipe.load_textual_inversion(str(file))'


@contextlib.contextmanager
def _reading(pipe: Any, folder: Path) -> Iterator[None]:
    from adapterkit.training.export.libraries import as_it_was, quiet

    with quiet(), as_it_was(pipe), contextlib.ExitStack() as kept:
        for encoder in (pipe.components.get("text_encoder"), pipe.components.get("text_encoder_2")):
            if encoder is not None:
                kept.enter_context(_embedding_as_it_was(encoder))
        for file in sorted(folder.glob("*.safetensors")):
            _load(pipe, file)
        yield


def _load(pipe: Any, file: Path) -> None:
    """As diffusers' documentation says: a file by itself, or, of several encoders, one by one."""
    tensors = load_file(file)
    if KEYS[TEXT_2] not in tensors:
        pipe.load_textual_inversion(str(file))
        return
    from adapterkit.formats.source import Source

    token = Source.of(file).metadata["name"]
    for key, suffix in ((KEYS[TEXT_1], ""), (KEYS[TEXT_2], "_2")):
        if key in tensors:
            encoder, tokenizer = (getattr(pipe, f"{part}{suffix}") for part in ("text_encoder", "tokenizer"))
            pipe.load_textual_inversion(tensors[key], token=token, text_encoder=encoder, tokenizer=tokenizer)


@contextlib.contextmanager
def _embedding_as_it_was(encoder: Any) -> Iterator[None]:
    """It is lengthened in place."""
    embedding, size = encoder.get_input_embeddings(), encoder.config.vocab_size
    weight, rows = embedding.weight, embedding.num_embeddings
    values = weight.data
    try:
        yield
    finally:
        weight.data, embedding.weight, embedding.num_embeddings = values, weight, rows
        encoder.config.vocab_size = size
