"""Training with `transformers.Trainer`: adapter-only checkpoints, exact resume, and what some types ask of a loop.

`AdapterTrainer` is the Trainer with it; `AdapterTraining` goes before any other Trainer:

    class MyTrainer(AdapterTraining, SFTTrainer): ...

What trains on the model when training begins is what is trained and saved; see `Adapters.train`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINING_ARGS_NAME

from adapterkit.engine.slots import Slot
from adapterkit.errors import ConfigError, StateError
from adapterkit.handle.adapters import Adapters
from adapterkit.points import NormPoint
from adapterkit.training.base_changes import BaseChanges
from adapterkit.training.snapshots import ADAPTER

BASE = "base.safetensors"
"""File of a checkpoint for what training changes of the base itself; there is none where it changes nothing."""

if TYPE_CHECKING:
    _Trainer: Any = Trainer
else:
    _Trainer = object  # a mixin: whichever Trainer comes behind it


class _Handle:
    """The handle on a Trainer's model: the one that was given, or one of our own; a model_init makes new models."""

    def __init__(self, given: Adapters | None) -> None:
        self._given, self._model, self._own = given, None, given

    def __call__(self, model: Any) -> Adapters:
        if self._own is None or (self._given is None and self._model is not model):
            self._model, self._own = model, Adapters(model)
        return self._own


class AdapterCallback(TrainerCallback):
    """Tells adapters of every step, and puts their file into every checkpoint that lacks it.

    It is all that a Trainer needs whose class cannot be chosen: checkpoints then hold the base too, and neither a
    penalty nor rates of their own are known. `AdapterTraining` brings it along.

    Args:
        adapters: The handle; by default one on the Trainer's model.
    """

    def __init__(self, adapters: Adapters | None = None) -> None:
        self._on = _Handle(adapters)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """See `TrainerCallback`.

        Raises:
            StateError: No adapter trains.
        """
        if not self._on(model).trained:
            raise StateError("no adapter trains on the model; add() one, or say train(name), before Trainer.train()")

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._on(model).after_step(state.global_step + 1, state.max_steps)

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        path = Path(args.output_dir) / f"checkpoint-{state.global_step}" / ADAPTER
        if args.should_save and path.parent.is_dir() and not path.exists():
            adapters = self._on(model)
            adapters.save(adapters.trained, path)


class AdapterTraining(_Trainer):
    """Put before a Trainer: what it trains, saves and loads are the adapters on its model.

    A checkpoint holds one native file, `adapter.safetensors`, of the adapters that train, beside the Trainer's own
    state; what else trains of the base, such as a head, is in `base.safetensors`. Resuming and `load_best_model_at_end`
    put values into the parameters that are there. Losses in training have the types' penalties in them, and parameters
    the learning rates that their types want (LoRA+).

    With FSDP and DeepSpeed checkpoints are the Trainer's own.

    Args:
        args: For the Trainer behind it.
        adapters: The handle; by default one on the Trainer's model.
        kwargs: For the Trainer behind it.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        order = cls.__mro__
        if Trainer in order[: order.index(AdapterTraining)]:
            raise ConfigError(["a Trainer stands before AdapterTraining, which must come first"], cls.__name__)

    def __init__(self, *args: Any, adapters: Adapters | None = None, **kwargs: Any) -> None:
        self._on = _Handle(adapters)
        model = kwargs.get("model", args[0] if args else None)
        with _not_purely_quantized(model):
            super().__init__(*args, **kwargs)
        self.add_callback(AdapterCallback(adapters))
        self._base = BaseChanges(self.model)

    @property
    def adapters(self) -> Adapters:
        """The handle on the model's adapters."""
        return self._on(self.model)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """The Trainer's new model, as it is before it trains."""
        model = super().call_model_init(trial)
        self._base = BaseChanges(model)
        return model

    # -- the optimizer and the loss ---------------------------------------------------------------------------------

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The Trainer's optimizer, whose groups are split by the rates that types want."""
        given = self.optimizer
        optimizer = super().create_optimizer(*args, **kwargs)
        if given is None:
            split_by_rate(optimizer, self._rates())
        return optimizer

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """The Trainer's, with those of adapters, which it does not find; not at norms."""
        names: list[str] = super().get_decay_parameter_names(model)
        for path, slot in model.named_modules():
            if isinstance(slot, Slot) and not isinstance(slot.point, NormPoint):
                for name, adapter in slot._modules.items():
                    names += [f"{path}.{name}.{key}" for key in super().get_decay_parameter_names(adapter)]
        return names

    def _rates(self) -> Mapping[int, float]:
        groups = self.adapters.parameter_groups(*self.adapters.trained, lr=1.0)
        return {id(parameter): group["lr"] for group in groups for parameter in group["params"]}

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """The Trainer's loss; in training with the penalties of the adapters that train.

        Raises:
            StateError: No adapter that trains has a part in it.
        """
        result: Any = super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        loss = result[0] if return_outputs else result
        if model.training and torch.is_grad_enabled() and not loss.requires_grad:
            names = ", ".join(map(repr, self.adapters.trained))
            raise StateError(f"no adapter that trains ({names}) has a part in the loss; activate() it, or unmerge()")
        penalty = self.adapters.penalty() if model.training else 0.0
        if not isinstance(penalty, Tensor):
            return result
        if self._scaled(kwargs.get("num_items_in_batch")):  # else the Trainer divides the sum
            penalty = penalty / self.current_gradient_accumulation_steps
        return (result[0] + penalty, *result[1:]) if return_outputs else result + penalty

    def _scaled(self, num_items: Any) -> bool:
        """Whether a loss counts as the share that its batch has in the step."""
        told = getattr(self, "loss_is_scaled_for_ga", None)  # what a Trainer says that computes its own, since 5.20
        if told is not None:
            return told
        return (self.model_accepts_loss_kwargs and num_items is not None) or self.compute_loss_func is not None

    # -- checkpoints ------------------------------------------------------------------------------------------------

    @property
    def _spread(self) -> bool:
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self._spread:
            super()._save(output_dir, state_dict=state_dict)
            return
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.adapters.save(self.adapters.trained, folder / ADAPTER)
        self._base.save(folder / BASE)
        processor = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if processor is not None:
            processor.save_pretrained(folder)
        torch.save(self.args, folder / TRAINING_ARGS_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self._spread:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self._restore(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        if self._spread or self.state.best_model_checkpoint is None:
            super()._load_best_model()
        else:
            self._restore(Path(self.state.best_model_checkpoint))

    def _restore(self, folder: Path) -> None:
        for name in self.adapters.trained:
            self.adapters.load_into(name, folder / ADAPTER)
        self._base.restore(folder / BASE)


class AdapterTrainer(AdapterTraining, Trainer):
    """`transformers.Trainer` for the adapters on its model; see `AdapterTraining`."""


def split_by_rate(optimizer: torch.optim.Optimizer, rates: Mapping[int, float]) -> None:
    """Gives parameters that want another learning rate groups of their own, before any scheduler is made.

    Args:
        optimizer: The optimizer.
        rates: Id of a parameter -> factor on the learning rate of its group.
    """
    for group in list(optimizer.param_groups):
        own: dict[float, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            own.setdefault(rates.get(id(parameter), 1.0), []).append(parameter)
        group["params"] = own.pop(1.0, [])
        for rate, parameters in own.items():
            optimizer.add_param_group({**group, "params": parameters, "lr": group["lr"] * rate})


@contextlib.contextmanager
def _not_purely_quantized(model: Any) -> Iterator[None]:
    """Says to the Trainer's check of a quantized model that there is something on it that can be trained."""
    if not getattr(model, "is_quantized", False):
        yield
        return
    before = model.__dict__.get("_hf_peft_config_loaded")
    model._hf_peft_config_loaded = True
    try:
        yield
    finally:
        if before is None:
            del model._hf_peft_config_loaded
        else:
            model._hf_peft_config_loaded = before
