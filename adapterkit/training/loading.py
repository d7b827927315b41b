"""Base models from a folder, a hub id or `timm:NAME`. Code that comes with a model is never run."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adapterkit.errors import (
    AdapterKitError,
    CheckpointError,
    ConfigError,
    MissingDependencyError,
    ModelNotFoundError,
    did_you_mean,
    near_matches,
    shown,
)
from adapterkit.formats.files import open_plain
from adapterkit.torchvision_ops import ensure_torchvision_ops
from adapterkit.training.classifiers import heads_of
from adapterkit.training.data_files import listed

_CONFIG_LIMIT = 1 << 24
TIMM = "timm:"
NO_CODE: dict[str, Any] = {"trust_remote_code": False}
"""For every load of diffusers and transformers: without it transformers asks at a terminal, and "y" runs the code."""


def device_here() -> torch.device:
    """Where a model computes that is loaded to be used: the GPU, where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def dtype_of(name: str) -> torch.dtype:
    """`float32`, `bfloat16` or `float16`."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def load_causal_lm(name: str, dtype: str) -> tuple[nn.Module, Any]:
    """A causal language model and its tokenizer."""
    with reading(name, "llm", "transformers"):
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype_of(dtype), **NO_CODE)
    return model, load_tokenizer(name)


def outline_causal_lm(name: str) -> nn.Module:
    """What `load_causal_lm` would load, on the meta device."""
    with reading(name, "llm", "transformers"), torch.device("meta"):
        from transformers import AutoConfig, AutoModelForCausalLM

        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(name, **NO_CODE), **NO_CODE)


def load_text_classifier(name: str, dtype: str, classes: int | None) -> tuple[nn.Module, list[str]]:
    """A classifier of sequences.

    Args:
        name: A folder or hub id of transformers.
        dtype: Of its weights.
        classes: Give it a head of that many; None keeps its own.

    Returns:
        It, and the paths of the modules of which the checkpoint has no weights that fit: they are random.
    """
    with reading(name, "llm", "transformers"), _unreported(unless=classes is None):
        from transformers import AutoModelForSequenceClassification

        fresh: dict[str, Any] = {"num_labels": classes, "ignore_mismatched_sizes": True} if classes else {}
        model, told = AutoModelForSequenceClassification.from_pretrained(
            name, dtype=dtype_of(dtype), output_loading_info=True, **NO_CODE, **fresh
        )
    return model, _lacking(told)


def outline_text_classifier(name: str, classes: int | None) -> nn.Module:
    """What `load_text_classifier` would load, on the meta device."""
    with reading(name, "llm", "transformers"), torch.device("meta"):
        from transformers import AutoConfig, AutoModelForSequenceClassification

        fresh = {"num_labels": classes} if classes else {}
        with _unreported(unless=classes is None):
            config = AutoConfig.from_pretrained(name, **NO_CODE, **fresh)
        return AutoModelForSequenceClassification.from_config(config, **NO_CODE)


def load_encoder(name: str, dtype: str) -> nn.Module:
    """A model of transformers without a head."""
    with reading(name, "llm", "transformers"):
        from transformers import AutoModel

        return AutoModel.from_pretrained(name, dtype=dtype_of(dtype), **NO_CODE)


def outline_encoder(name: str) -> nn.Module:
    """What `load_encoder` would load, on the meta device."""
    with reading(name, "llm", "transformers"), torch.device("meta"):
        from transformers import AutoConfig, AutoModel

        return AutoModel.from_config(AutoConfig.from_pretrained(name, **NO_CODE), **NO_CODE)


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a language model."""
    with reading(name, "llm", "transformers"):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(name, **NO_CODE)


def load_image_classifier(name: str, dtype: str, classes: int | None, **arguments: Any) -> nn.Module:
    """A classifier from timm or transformers.

    Args:
        name: `timm:NAME`, or a folder or hub id of transformers or of timm.
        dtype: Of its weights.
        classes: Replace the head by a fresh one of that many classes; None keeps it.
        **arguments: For `timm.create_model`.

    Raises:
        ModelNotFoundError: There is no model at that place.
        ConfigError: The arguments do not fit it.
    """
    if name.startswith(TIMM) or is_timm_folder(name):
        return _load_timm(name, classes, arguments).to(dtype_of(dtype))
    if arguments:
        raise ConfigError([f"options.model_args: {name} is no model of timm, and takes none"], "run")
    with reading(name, "vision", "transformers"), _unreported(unless=classes is None):
        from transformers import AutoModelForImageClassification

        fresh: dict[str, Any] = {"num_labels": classes, "ignore_mismatched_sizes": True} if classes else {}
        model, told = AutoModelForImageClassification.from_pretrained(
            name, dtype=dtype_of(dtype), output_loading_info=True, **NO_CODE, **fresh
        )
    random = [path for path in _lacking(told) if path not in heads_of(model, classes)] if classes else []
    if random:
        warnings.warn(f"{name} has no weights for {listed(random)}; they are random", stacklevel=2)
    return model


def outline_image_classifier(name: str, classes: int | None, **arguments: Any) -> nn.Module:
    """What `load_image_classifier` would load, on the meta device."""
    if name.startswith(TIMM) or is_timm_folder(name):
        with torch.device("meta"):
            return _load_timm(name, classes, {**arguments, "pretrained": False})
    with reading(name, "vision", "transformers"), torch.device("meta"):
        from transformers import AutoConfig, AutoModelForImageClassification

        fresh = {"num_labels": classes} if classes else {}
        with _unreported(unless=classes is None):
            config = AutoConfig.from_pretrained(name, **NO_CODE, **fresh)
        return AutoModelForImageClassification.from_config(config, **NO_CODE)


def load_image_processor(name: str) -> tuple[Any, str]:
    """What a model of transformers says of its images.

    Returns:
        Its image processor, and ""; or None, and why there is none that can be used.
    """
    with reading(name, "vision", "transformers"):
        from transformers import AutoImageProcessor

        try:
            return AutoImageProcessor.from_pretrained(name, **NO_CODE), ""
        except OSError:
            return None, f"{name} has no preprocessor_config.json"
        except (ImportError, KeyError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            return None, f"the preprocessor_config.json of {name} cannot be used ({type(error).__name__}: {reason})"


def label_names(name: str) -> list[str]:
    """What a classifier calls its classes, in order; nothing where it does not say."""
    if name.startswith(TIMM):
        return []
    with reading(name, "vision", "transformers"):
        if is_timm_folder(name):
            return [str(label) for label in folder_config(name).get("label_names") or []]
        from transformers import AutoConfig

        told: dict[Any, str] = AutoConfig.from_pretrained(name, **NO_CODE).id2label or {}
    labels = [str(told[number]) for number in sorted(told)]
    return [] if labels == [f"LABEL_{number}" for number in range(len(labels))] else labels


def checkpoint_activations(model: Any) -> None:
    """Makes a model of transformers or timm recompute its activations, by the name that its library has for it.

    Raises:
        ConfigError: It cannot.
    """
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable", "set_grad_checkpointing")
    enable = next((found for name in names if (found := getattr(model, name, None)) is not None), None)
    try:
        if enable is not None:
            enable()
            return
        reason = "it has no method for it"
    except (AssertionError, NotImplementedError, ValueError) as error:
        reason = str(error)
    raise ConfigError([f"gradient_checkpointing: {type(model).__name__} cannot ({reason}); set it to false"], "run")


def is_timm_folder(name: str) -> bool:
    """Whether a folder was written by timm, whose `config.json` names an architecture."""
    return isinstance(folder_config(name).get("architecture"), str)


def is_diffusers_part(name: str) -> bool:
    """Whether a folder is one model of a diffusers pipeline, such as its UNet, whose `config.json` names its class."""
    return isinstance(folder_config(name).get("_class_name"), str)


def folder_config(name: str) -> dict[str, Any]:
    """What the `config.json` of a folder says; nothing where there is none that could be read."""
    try:
        with open_plain(Path(name) / "config.json", _CONFIG_LIMIT, follow=True) as (file, _):
            config = json.loads(file.read())
    except (CheckpointError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def _load_timm(name: str, classes: int | None, arguments: dict[str, Any]) -> nn.Module:
    with reading(name, "vision"):
        import timm

        known = name.removeprefix(TIMM) if name.startswith(TIMM) else f"local-dir:{name}"
        if ":" not in known and not timm.is_model(architecture := known.partition(".")[0]):
            near = did_you_mean(architecture, timm.list_models())
            raise ModelNotFoundError(f"cannot load the model {shown(name)}: timm has no {shown(architecture)}.{near}")
        try:
            model: Any = timm.create_model(known, **{"pretrained": True, **arguments})
        except (AssertionError, TypeError) as error:
            raise ConfigError([f"options.model_args: {name} does not take {arguments} ({error})"], "run") from error
        if classes:
            model.reset_classifier(classes)
        return model


@contextlib.contextmanager
def reading(name: str, extra: str, *libraries: str) -> Iterator[None]:
    """Turns what the libraries raise about a model that cannot be had into errors that say what to do.

    Args:
        name: The model.
        extra: What installs the libraries.
        *libraries: Those of diffusers and transformers whose progress bars are for terminals only.
    """
    ensure_torchvision_ops()
    for file in (Path(name) / told for told in ("config.json", "model_index.json")):
        if os.path.lexists(file) and not file.is_file():  # a pipe would be waited for
            raise ModelNotFoundError(f"cannot load the model {shown(name)}: {file} is no plain file")
    try:
        with bars_on_terminals_only(libraries):
            yield
    except AdapterKitError:
        raise
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"{name} needs {error.name!r}, which is not installed. Run: pip install 'adapterkit[{extra}]'"
        ) from error
    except Exception as error:  # of files that are none of theirs the libraries raise anything
        place = "" if Path(name).exists() or name.startswith(TIMM) else _not_here(name)
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
        raise ModelNotFoundError(f"cannot load the model {shown(name)}{place}. {reason}") from error


def _not_here(name: str) -> str:
    """That a name is no folder's; and which folders of models that lie there are called like it."""
    near: list[str] = []
    with contextlib.suppress(OSError):
        beside = [
            file.parent for kind in ("config.json", "model_index.json") for file in Path(name).parent.glob(f"*/{kind}")
        ]
        near = near_matches(str(Path(name)), map(str, beside))
    meant = f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""
    return f"; there is no such folder in {Path.cwd()}{meant}"


def _lacking(told: Mapping[str, Any]) -> list[str]:
    """The paths of modules of which a checkpoint has no weights that fit."""
    keys = [*told["missing_keys"], *(key for key, *_ in told["mismatched_keys"])]
    return sorted({key.rpartition(".")[0] for key in keys})


@contextlib.contextmanager
def _unreported(*, unless: bool) -> Iterator[None]:
    """Without transformers' report of what a checkpoint lacks, where a fresh head is the reason."""
    logging: Any = importlib.import_module("transformers.utils.logging")
    before = logging.get_verbosity()
    if not unless:
        logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


@contextlib.contextmanager
def bars_on_terminals_only(libraries: Sequence[str] = ("transformers",)) -> Iterator[None]:
    """Keeps progress bars of diffusers or transformers out of log files; what the user has set for them is put back."""
    modules: list[Any] = [importlib.import_module(f"{library}.utils.logging") for library in libraries]
    shown = [] if sys.stderr.isatty() else [module for module in modules if module.is_progress_bar_enabled()]
    for module in shown:
        module.disable_progress_bar()
    try:
        yield
    finally:
        for module in shown:
            module.enable_progress_bar()
