"""Files of sentence-transformers beside a model: what of its tokens is the embedding, read and written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapterkit.errors import ConfigError
from adapterkit.formats.files import write_atomically
from adapterkit.training.language.embedding.objectives import Pooling
from adapterkit.training.loading import folder_config, reading

_MODULES, _POOLING = "modules.json", "1_Pooling/config.json"
_KEPT = ("config_sentence_transformers.json", "sentence_bert_config.json")
"""Prompts and the way of comparing, and how long texts may be: what a base says of them stays true."""
_TYPE = "sentence_transformers.models."
_COMPUTED = frozenset({"Transformer", "Pooling", "Normalize"})
_KEY = "pooling_mode_"
_WRITTEN: Mapping[str, Pooling] = {"mean_tokens": "mean", "cls_token": "cls", "lasttoken": "last"}
"""As all releases read them, behind `_KEY`."""
_POOLINGS: Mapping[str, Pooling] = {**_WRITTEN, "mean": "mean", "cls": "cls"}


def sentence_pooling(name: str) -> Pooling | None:
    """What of the tokens is the embedding, as the files beside a model say; None where there are none.

    Raises:
        ConfigError: It is something else, or something is computed of it that is not computed here.
    """
    path = _file(name, _POOLING)
    if path is None:
        return None
    said = _said(folder_config(str(path.parent)))
    if len(said) != 1 or said[0] not in _POOLINGS:
        problem = f"options.pooling: {path} says {', '.join(said) or 'none'}; choose mean, cls or last"
        raise ConfigError([problem], "run")
    _refuse_more(name)
    return _POOLINGS[said[0]]


def _said(told: Mapping[str, Any]) -> list[str]:
    """The ways of pooling in a config: `pooling_mode` from release 6 on, before that a key for each."""
    named = told.get("pooling_mode")
    if named is None:
        return [key.removeprefix(_KEY) for key, value in told.items() if key.startswith(_KEY) and value is True]
    return [str(one) for one in named] if isinstance(named, list) else [str(named)]


def _refuse_more(name: str) -> None:
    path = _file(name, _MODULES)
    try:
        modules: Any = [] if path is None else json.loads(path.read_text(encoding="utf-8"))
        kinds = [str(one["type"]).rpartition(".")[2] for one in modules]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError([f"model: {path} cannot be read ({error}); remove it, or mend it"], "run") from error
    if more := [kind for kind in kinds if kind not in _COMPUTED]:
        told = (
            f"{path} has {', '.join(more)}, which are not computed here; to train without them, choose options.pooling"
        )
        raise ConfigError([f"model: {told}"], "run")


def write_sentence_files(folder: Path, pooling: Pooling, width: int, base: str) -> None:
    """Writes them beside a model, so that sentence-transformers computes the embeddings that were trained.

    Args:
        folder: Of the model.
        pooling: What of its tokens.
        width: Features of an embedding.
        base: The model that was adapted, whose own files of this kind say the rest.
    """
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": _TYPE + kind}
        for number, (path, kind) in enumerate(kinds.items())
    ]
    modes = {_KEY + key: one == pooling for key, one in _WRITTEN.items()}
    config = {"word_embedding_dimension": width, **modes}
    for name, values in ((_MODULES, modules), (_POOLING, config)):
        (folder / name).parent.mkdir(exist_ok=True)
        write_atomically(folder / name, (json.dumps(values, indent=2) + "\n").encode())
    (folder / "2_Normalize").mkdir()
    for name in _KEPT:
        if (path := _file(base, name)) is not None:
            shutil.copy(path, folder / name)


def _file(name: str, file: str) -> Path | None:
    """A file of a model in a folder or on the hub; None where it has none."""
    with reading(name, "llm", "transformers"):
        from transformers.utils.hub import cached_file

        path = cached_file(
            name, file, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
        )
    return None if path is None else Path(path)
