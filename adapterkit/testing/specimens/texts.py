"""Specimens of transformers' text models: causal, masked, sequence to sequence, and bare encoders and decoders."""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from adapterkit.errors import AdapterKitError
from adapterkit.testing.specimens.configs import VOCABULARY, shrunk, special_ids
from adapterkit.testing.specimens.specimen import NoSpecimen, Specimen, strengthened

ROWS: Final = 2
LENGTH: Final = 7
MOST_PARAMETERS: Final = 150_000_000
_SEED: Final = 1


def specimen_of(model: nn.Module) -> Specimen:
    """Give a small model of a text model's class, and calls with ids.

    Raises:
        NoSpecimen: It takes no ids, its config cannot be shrunk, or the small model does not run.
    """
    if not isinstance(model, PreTrainedModel) or "input_ids" not in _arguments(model):
        raise NoSpecimen(f"{type(model).__name__} is no text model of transformers")
    small = small_model(model)
    calls = text_calls(small)
    for call in calls.values():
        _tried(call, type(model))
    return Specimen(small, calls)


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
            return cast(PreTrainedModel, strengthened(cls(config)))
    except AdapterKitError:
        raise
    except Exception as error:
        raise NoSpecimen(f"{cls.__name__} cannot be built small: {_said(error)}") from error


def text_calls(model: PreTrainedModel) -> dict[str, Callable[[], Tensor]]:
    """Give the calls of a model that takes ids: with them, and with states of an encoder where it can attend to some."""
    inputs = _inputs(model)
    calls: dict[str, Callable[[], Tensor]] = {"text": functools.partial(run, model, inputs)}
    if _attends_to_others(model):
        width = _text_config(model.config).hidden_size
        states = _random(ROWS, LENGTH - 2, width)
        calls["text beside states"] = functools.partial(run, model, {**inputs, "encoder_hidden_states": states})
    return calls


def run(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """Run a model and give all that it returns as one flat tensor."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(_SEED)
        returned = list(tensors(model(**inputs)))
    return torch.cat([value.to(torch.float64).flatten() for value in returned])


def tensors(returned: object) -> Iterator[Tensor]:
    """Give the tensors of numbers in what a model returned, in order."""
    if isinstance(returned, Tensor):
        if returned.is_floating_point():
            yield returned
    elif isinstance(returned, Mapping):
        for value in returned.values():
            yield from tensors(value)
    elif isinstance(returned, list | tuple):
        for value in returned:
            yield from tensors(value)


def _inputs(model: PreTrainedModel) -> dict[str, Any]:
    arguments = _arguments(model)
    inputs: dict[str, Any] = {"input_ids": ids(model.config, LENGTH)}
    if "decoder_input_ids" in arguments:
        inputs["decoder_input_ids"] = ids(model.config, LENGTH - 1, seed=2)
    if "use_cache" in arguments:
        inputs["use_cache"] = False
    return inputs


def ids(config: PreTrainedConfig, length: int, seed: int = _SEED) -> Tensor:
    """Give ids [ROWS, length] of ordinary tokens."""
    special = special_ids(config)
    size = min(VOCABULARY, _text_config(config).vocab_size)
    ordinary = torch.tensor([n for n in range(size) if n not in special])
    chosen = torch.randint(len(ordinary), (ROWS, length), generator=torch.Generator().manual_seed(seed))
    return ordinary[chosen]


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(_SEED), dtype=torch.float64)


def _attends_to_others(model: PreTrainedModel) -> bool:
    """Tell whether a decoder without an encoder of its own takes another's states."""
    arguments = _arguments(model)
    return "encoder_hidden_states" in arguments and "decoder_input_ids" not in arguments


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


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
