"""LLaMA-Adapter in files of PEFT, which calls it an adaption prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import ClassVar

from torch import Tensor

from adapterkit.contract.codec import Codec, Context, Place, Said
from adapterkit.errors import CheckpointError, ShapeMismatchError
from adapterkit.points import AttentionPoint

_GATE, _PROMPT = "adaption_gate", "adaption_prompt"
_BEHIND = frozenset({"gpt2"})
"""Models in which PEFT adds the attention over the prompt behind the output projection, and not before it."""


class AdaptionPromptCodec(Codec):
    """A gate [1] and a prompt [1, length, features] for each attention."""

    names = frozenset({_GATE, _PROMPT})
    types = frozenset({"llama_adapter"})
    axes: ClassVar[Mapping[str, int]] = {_GATE: 1, _PROMPT: 3}
    whole = True  # the config counts the layers

    def takes(self, names: Set[str], context: Context) -> Set[str]:
        return self.names if self.names <= names else frozenset()

    def read(self, tensors: Mapping[str, Tensor], place: Place, context: Context) -> Sequence[Said]:
        if not isinstance(place.point, AttentionPoint):
            return ()
        _check_model(place, context)
        gate, prompt = tensors[_GATE], tensors[_PROMPT]
        width = place.point.layout.source
        if gate.shape != (1,) or (len(prompt), prompt.shape[-1]) != (1, width):
            told = f"the gate is {tuple(gate.shape)} and the prompt {tuple(prompt.shape)}"
            raise ShapeMismatchError(f"{told}; (1,) and (1, length, {width}) are expected", context.where, _PROMPT)
        config = {"length": prompt.shape[1], "gate": "layer", "padded": True}
        return [Said("llama_adapter", config, {"gate": gate, "prompt": prompt[0].contiguous()})]

    def write(self, said: Sequence[tuple[Place, Said]], context: Context) -> Mapping[str, Tensor]:
        found: dict[str, Tensor] = {}
        for place, one in said:
            _check_model(place, context)
            if one.config.get("gate") != "layer":
                told = "PEFT has one plain gate for a layer, and this adapter has tanh(g) for each head"
                raise CheckpointError(f"{told}: gate='layer' is PEFT's; native holds both", context.where)
            if not one.config.get("padded"):
                context.note("PEFT counts padding as positions: rows that are padded in front get other outputs there")
            found[f"base_model.model.{place.point.path}.{_GATE}"] = one.tensors["gate"]
            found[f"base_model.model.{place.point.path}.{_PROMPT}"] = one.tensors["prompt"][None]
        context.config |= {
            "peft_type": "ADAPTION_PROMPT",
            "task_type": "CAUSAL_LM",
            "adapter_len": _one_length(said, context),
            "adapter_layers": len(said),
            "target_modules": _topmost(said, context),
        }
        return found


def _check_model(place: Place, context: Context) -> None:
    """Raises CheckpointError for models where PEFT computes something else."""
    view = None if place.model is None else place.model.components.get(place.point.model)
    kind = "" if view is None else view.config.get("model_type")
    if kind in _BEHIND:
        told = f"with {kind}, PEFT adds what attends to the prompt behind the attention's output projection, and"
        raise CheckpointError(f"{told} LlamaAdapter acts before it: there is no type for that", context.where)


def _one_length(said: Sequence[tuple[Place, Said]], context: Context) -> int:
    lengths = {len(one.tensors["prompt"]) for _, one in said}
    if len(lengths) > 1:
        told = f"its prompts have lengths {sorted(lengths)}, and in PEFT's files one is for all"
        raise CheckpointError(f"{told}; native holds any", context.where)
    return lengths.pop()


def _topmost(said: Sequence[tuple[Place, Said]], context: Context) -> str:
    """The attentions' own name, if they are the model's last ones."""
    own = [place.point.path for place, _ in said]
    end = own[0].rpartition(".")[2]
    model = said[0][0].model
    view = None if model is None else model.components.get(said[0][0].point.model)
    there = own if view is None else [path for path in view.paths if path.endswith(f".{end}")]
    if there[-len(own) :] != own:
        told = f"PEFT adapts a model's last attentions, and this adapter {', '.join(own[:3])}"
        raise CheckpointError(f"{told}; native holds any", context.where)
    return end
