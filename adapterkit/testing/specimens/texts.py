"""Specimens of transformers' text models: causal, masked, sequence to sequence, and bare encoders and decoders."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from adapterkit.errors import AdapterKitError
from adapterkit.testing.specimens.attempts import tensors
from adapterkit.testing.specimens.configs import VOCABULARY, shrunk, special_ids
from adapterkit.testing.specimens.exact import InFloat64
from adapterkit.testing.specimens.specimen import NoSpecimen, Specimen, strengthened

ROWS: Final = 2
LENGTH: Final = 7
MOST_PARAMETERS: Final = 150_000_000
_SEED: Final = 1
_STATES: Final = ("encoder_hidden_states", "encoder_outputs", "cross_attention_states")
"""Arguments by which a decoder is given another's states."""


def specimen_of(model: nn.Module) -> Specimen:
    """Give a small model of a text model's class, and calls with ids.

    Raises:
        NoSpecimen: It takes no ids, its config cannot be shrunk, or the small model does not run.
    """
    if not isinstance(model, PreTrainedModel) or "input_ids" not in _arguments(model):
        raise NoSpecimen(f"{type(model).__name__} is no text model of transformers")
    small = small_model(model)
    plain, *others = text_calls(small).items()
    _tried(plain[1], type(model))
    return Specimen(small, dict([plain, *(other for other in others if _runs(other[1]))]))


def small_model(model: PreTrainedModel) -> PreTrainedModel:
    """Give the model of a shrunk config, of the same class, with strong random weights.

    Raises:
        NoSpecimen: No config like that can be built, or what is built is still large.
    """
    cls = type(model)
    try:
        config = shrunk(model.config)
        with torch.device("meta"):
            size = sum(p.numel() for p in cls(config).parameters())
        if size > MOST_PARAMETERS:
            raise NoSpecimen(f"{cls.__name__} still has {size:,} parameters when its config is shrunk")
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(_SEED)
            return cast("PreTrainedModel", strengthened(cls(config)))
    except AdapterKitError:
        raise
    except Exception as error:
        raise NoSpecimen(f"{cls.__name__} cannot be built small: {_said(error)}") from error


def text_calls(model: PreTrainedModel) -> dict[str, Callable[[], Tensor]]:
    """Give the calls of a model that takes ids: with them, and beside states of an encoder where it takes some."""
    inputs = _inputs(model)
    calls: dict[str, Callable[[], Tensor]] = {"text": functools.partial(run, model, inputs)}
    arguments = _arguments(model)
    name = next((name for name in _STATES if name in arguments), None)
    width = getattr(_text_config(model.config), "hidden_size", None)
    if name is not None and width is not None and "decoder_input_ids" not in arguments:
        states = _random(inputs["input_ids"].shape[0], LENGTH - 2, width)
        given = (states,) if name == "encoder_outputs" else states
        calls["text beside states"] = functools.partial(run, model, {**inputs, name: given})
    return calls


def run(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """Run a model and give its logits, or all that it returns where there are none, as one flat tensor."""
    with torch.random.fork_rng(devices=[]), InFloat64():
        torch.default_generator.manual_seed(_SEED)
        returned = model(**inputs)
        # What else there is may be longer with a prompt: states of the encoder, of which these are made.
        if isinstance(returned, Mapping) and "logits" in returned:
            returned = returned["logits"]
        return torch.cat([value.flatten().to(torch.float64) for value in tensors(returned)])


def _inputs(model: PreTrainedModel) -> dict[str, Any]:
    arguments = _arguments(model)
    inputs: dict[str, Any] = {"input_ids": ids(model.config, LENGTH)}
    if "decoder_input_ids" in arguments:
        inputs["decoder_input_ids"] = ids(model.config, LENGTH - 1, seed=2)
    if "use_cache" in arguments:
        inputs["use_cache"] = False
    if "global_attention_mask" in arguments:
        inputs["global_attention_mask"] = torch.zeros_like(inputs["input_ids"])
        inputs["global_attention_mask"][:, 0] = 1
    return inputs


def ids(config: PreTrainedConfig, length: int, seed: int = _SEED) -> Tensor:
    """Give ids [ROWS, length] of ordinary tokens; with codebooks, so many rows for each."""
    special = special_ids(config)
    size = min(VOCABULARY, _text_config(config).vocab_size)
    ordinary = torch.tensor([n for n in range(size) if n not in special])
    rows = ROWS * _text_config(config).to_dict().get("num_codebooks", 1)
    chosen = torch.randint(len(ordinary), (rows, length), generator=torch.Generator().manual_seed(seed))
    return ordinary[chosen]


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(_SEED), dtype=torch.float64)


def _text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    return config.get_text_config(decoder=True)


def _arguments(model: nn.Module) -> frozenset[str]:
    return frozenset(inspect.signature(model.forward).parameters)


def _tried(call: Callable[[], Tensor], cls: type) -> None:
    try:
        result = call()
    except Exception as error:
        raise NoSpecimen(f"{cls.__name__} does not run small: {_said(error)}") from error
    if not result.isfinite().all():
        raise NoSpecimen(f"{cls.__name__} does not run small: what it gives is not finite")


def _runs(call: Callable[[], Tensor]) -> bool:
    """Tell whether a model can be called so: some name arguments that only another config of theirs lets them take."""
    try:
        return bool(call().isfinite().all())
    except Exception:  # noqa: BLE001 - of any kind: the model is somebody else's code
        return False


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
