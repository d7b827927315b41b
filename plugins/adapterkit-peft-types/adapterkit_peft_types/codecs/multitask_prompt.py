"""Multitask prompts in files of PEFT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import ClassVar

from torch import Tensor

from adapterkit.contract.codec import Codec, Context, Place, Said
from adapterkit.errors import CheckpointError, ShapeMismatchError
from adapterkit.points import TokensPoint
from adapterkit_peft_types.codecs.modules import field

_NAMES = {"prompt": "prompt_embeddings", "columns": "prefix_task_cols", "rows": "prefix_task_rows"}


class MultitaskPromptCodec(Codec):
    """The prompt of all tasks, and each task's columns and rows; of an encoder-decoder's the first half is read."""

    names = frozenset(_NAMES.values())
    types = frozenset({"multitask_prompt"})
    axes: ClassVar[Mapping[str, int]] = {"prompt_embeddings": 2, "prefix_task_cols": 3, "prefix_task_rows": 3}
    whole = True

    def takes(self, names: Set[str], context: Context) -> Set[str]:
        return self.names if self.names <= names else frozenset()

    def read(self, tensors: Mapping[str, Tensor], place: Place, context: Context) -> Sequence[Said]:
        if not isinstance(place.point, TokensPoint) or place.point.role != "prompt" or not place.point.lengthens:
            return ()
        own = {name: tensors[other] for name, other in _NAMES.items()}
        parts = max(field(context, "num_transformer_submodules", 1), 1) if context.config else 1
        length, features = len(own["prompt"]) // parts, place.point.out_features
        tasks, rank = len(own["columns"]), own["rows"].shape[1]
        shapes = {
            "prompt": (length * parts, features),
            "columns": (tasks, length * parts, rank),
            "rows": (tasks, rank, features),
        }
        for name, shape in shapes.items():
            if tuple(own[name].shape) != shape:
                told = f"is {tuple(own[name].shape)}, and {shape} is expected"
                raise ShapeMismatchError(told, context.where, _NAMES[name])
        context.note("PEFT's task_ids are the side input task: with adapters.context(task=ids)")
        own["prompt"], own["columns"] = own["prompt"][:length].contiguous(), own["columns"][:, :length].contiguous()
        config = {"length": length, "tasks": tasks, "rank": rank, "padded": True}
        return [Said("multitask_prompt", config, own)]

    def write(self, said: Sequence[tuple[Place, Said]], context: Context) -> Mapping[str, Tensor]:
        ((place, one),) = said
        view = None if place.model is None else place.model.components.get(place.point.model)
        if view is not None and view.config.get("is_encoder_decoder"):
            told = "PEFT has a prompt for the decoder of an encoder-decoder too, which this adapter has not"
            raise CheckpointError(f"{told}; native holds it", context.where, place.point.id)
        if not one.config.get("padded"):
            context.note("PEFT puts a prompt in front of padding: padded rows get other outputs there")
        tasks, length, rank = one.tensors["columns"].shape
        context.config |= {
            "peft_type": "MULTITASK_PROMPT_TUNING",
            "task_type": "CAUSAL_LM",
            "num_virtual_tokens": length,
            "token_dim": one.tensors["prompt"].shape[1],
            "num_transformer_submodules": 1,
            "num_tasks": tasks,
            "num_ranks": rank,
        }
        return {other: one.tensors[name] for name, other in _NAMES.items()}
