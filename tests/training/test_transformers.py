"""The real `transformers.Trainer`: what a checkpoint holds, resuming bit for bit, the best that is not the last."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainingArguments,
)

import adapterkit as ak
from adapterkit import errors
from adapterkit.training.transformers import AdapterCallback, AdapterTrainer, AdapterTraining

SIZES: Any = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
}
ROWS = torch.randint(1, 32, (32, 6), generator=torch.Generator().manual_seed(0)).tolist()
TEXTS = [{"input_ids": row, "labels": row} for row in ROWS]
CLASSES = [{"input_ids": row, "labels": row[0] % 2} for row in ROWS]


def language(config: ak.AdapterConfig, seed: int = 0, cls: type = LlamaForCausalLM) -> tuple[Any, ak.Adapters]:
    torch.manual_seed(0)
    model = cls(LlamaConfig(**SIZES))
    adapters = ak.Adapters(model)
    adapters.add("x", config, seed=seed)
    return model, adapters


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    given = {
        "max_steps": 4,
        "save_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "logging_strategy": "no",
        **options,
    }
    return TrainingArguments(output_dir=str(folder), **given)


def values(model: Any) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_a_checkpoint_is_small_and_resuming_is_exact(tmp_path: Path) -> None:
    config = ak.LoRA(rank=2, targets="attn.q mlp.up", dropout=0.2)
    model, _ = language(config)
    base = {key for key in model.state_dict() if "adapterkit" not in key}
    start = values(model)
    AdapterTrainer(model=model, args=arguments(tmp_path / "whole"), train_dataset=TEXTS).train()
    whole = values(model)
    assert not same(whole, start)
    assert all(torch.equal(whole[key], start[key]) for key in base)
    folder = tmp_path / "whole/checkpoint-2"
    files = {file.name for file in folder.iterdir()}
    assert "adapter.safetensors" in files
    assert not files & {"model.safetensors", "base.safetensors", "config.json"}
    model, adapters = language(config, seed=5)  # other start values: all comes from the checkpoint
    before = [*adapters.parameters("x")]
    AdapterTrainer(model=model, args=arguments(tmp_path / "resumed"), train_dataset=TEXTS).train(
        resume_from_checkpoint=str(folder)
    )
    assert same(values(model), whole)
    assert all(now is then for now, then in zip(adapters.parameters("x"), before, strict=True))


class Worsening(AdapterTrainer):
    """The first evaluation is the best; the values at each are kept."""

    kept: dict[int, dict[str, Tensor]]

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        self.kept = {**getattr(self, "kept", {}), self.state.global_step: values(self.model)}
        return {**super().evaluate(*args, **kwargs), "eval_worse": float(self.state.global_step)}


BEST: Any = {
    "load_best_model_at_end": True,
    "metric_for_best_model": "worse",
    "greater_is_better": False,
    "eval_strategy": "steps",
    "eval_steps": 2,
}


def test_the_best_is_not_the_last_and_a_head_of_the_base_comes_along(tmp_path: Path) -> None:
    model, _ = language(ak.LoRA(rank=2), cls=LlamaForSequenceClassification)
    head = model.score.weight.requires_grad_(True).detach().clone()
    args = arguments(tmp_path, **BEST)
    trainer = Worsening(model=model, args=args, train_dataset=CLASSES, eval_dataset=CLASSES[:4])
    trainer.train()
    assert same(values(model), trainer.kept[2])
    assert not same(trainer.kept[4], trainer.kept[2])
    assert not torch.equal(model.score.weight, head)
    fresh, _ = language(ak.LoRA(rank=2), seed=1, cls=LlamaForSequenceClassification)
    resumed = AdapterTrainer(model=fresh, args=arguments(tmp_path), train_dataset=CLASSES)
    with pytest.raises(errors.UnexpectedKeysError, match=r"score\.weight.*let it require grad"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    fresh.score.requires_grad_(True)
    AdapterTrainer(model=fresh, args=arguments(tmp_path), train_dataset=CLASSES).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-2")
    )
    assert same(values(fresh), trainer.kept[4])


@pytest.mark.slow
def test_running_means_of_the_base_come_along(tmp_path: Path) -> None:
    def model() -> Any:
        torch.manual_seed(0)
        sizes: Any = {"embedding_size": 4, "hidden_sizes": [4], "depths": [1], "layer_type": "basic", "num_channels": 3}
        made = ResNetForImageClassification(ResNetConfig(**sizes))
        ak.Adapters(made).add("x", ak.LoRA(rank=2, targets="all"))
        return made

    images = [{"pixel_values": torch.randn(3, 8, 8), "labels": row[0] % 2} for row in ROWS]
    whole = model()
    trainer = Worsening(
        model=whole, args=arguments(tmp_path / "a", **BEST), train_dataset=images, eval_dataset=images[:4]
    )
    trainer.train()
    assert same(values(whole), trainer.kept[2])
    resumed = model()
    AdapterTrainer(model=resumed, args=arguments(tmp_path / "b"), train_dataset=images).train(
        resume_from_checkpoint=str(tmp_path / "a/checkpoint-2")
    )
    assert same(values(resumed), trainer.kept[4])


def test_steps_and_penalties_are_those_of_a_loop_by_hand(tmp_path: Path) -> None:
    config = ak.AdaLoRA(rank=2, targets="attn.q attn.v", orthogonality=10.0)
    options: Any = {"max_grad_norm": 0.0, "lr_scheduler_type": "constant", "optim": "sgd", "save_strategy": "no"}
    for micro in (1, 2):
        args = arguments(tmp_path, per_device_train_batch_size=4 // micro, gradient_accumulation_steps=micro, **options)
        model, adapters = language(config)
        trainer = AdapterTrainer(model=model, args=args, train_dataset=TEXTS)
        batches = [*trainer.get_train_dataloader()]
        trainer = AdapterTrainer(model=model, args=args, train_dataset=TEXTS)
        trainer.train()
        mine, hand = language(config)
        optimizer = torch.optim.SGD(hand.parameters("x"), lr=1e-2)
        for step in range(4):
            for batch in batches[step * micro : step * micro + micro]:
                ((mine(**batch).loss + hand.penalty()) / micro).backward()
            optimizer.step()
            hand.after_step(step + 1, 4)
            optimizer.zero_grad()
        found, expected = adapters.state_dict("x"), hand.state_dict("x")
        for key, tensor in expected.items():
            torch.testing.assert_close(found[key], tensor, rtol=1e-4, atol=1e-6, msg=f"{micro}: {key}")
        kept = [int(tensor.sum()) for key, tensor in found.items() if key.endswith("/kept")]
        assert sum(kept) == 2 * len(kept)


def test_rates_of_types_are_groups_and_follow_the_schedule(tmp_path: Path) -> None:
    model, adapters = language(ak.LoRA(rank=2, plus=16.0))
    model.model.norm.requires_grad_(True)
    trainer = AdapterTrainer(model=model, args=arguments(tmp_path, weight_decay=0.1), train_dataset=TEXTS)
    trainer.create_optimizer_and_scheduler(4)
    optimizer: Any = trainer.optimizer
    fast = {id(p) for group in adapters.parameter_groups(lr=1.0) if group["lr"] == 16 for p in group["params"]}
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert groups.keys() == {id(p) for p in model.parameters() if p.requires_grad}
    for key, group in groups.items():
        assert group["lr"] == pytest.approx(0.16 if key in fast else 0.01)
    assert groups[id(model.model.norm.weight)]["weight_decay"] == 0
    assert groups[next(iter(fast))]["weight_decay"] == 0.1
    own = torch.optim.SGD(adapters.parameters(), lr=1.0)
    given = AdapterTrainer(model=model, args=arguments(tmp_path), train_dataset=TEXTS, optimizers=(own, None))
    assert given.create_optimizer() is own
    assert len(own.param_groups) == 1


@pytest.mark.slow
def test_a_trainer_of_ones_own_and_several_adapters(tmp_path: Path) -> None:
    class Own(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
            return (2 * loss, outputs) if return_outputs else 2 * loss

    class Both(AdapterTraining, Own):
        pass

    def train(folder: str, resume: str | None = None) -> Any:
        model, adapters = language(ak.LoRA(rank=2))
        adapters.add("y", ak.Bottleneck(reduction=4))
        adapters.activate(["x", "y"])
        adapters.train("x", "y")
        trainer = Both(model=model, args=arguments(tmp_path / folder), train_dataset=TEXTS)
        trainer.train(resume_from_checkpoint=resume)
        return model

    whole = train("whole")
    assert same(values(whole), values(train("resumed", str(tmp_path / "whole/checkpoint-2"))))


@pytest.mark.slow
def test_a_model_init_makes_models_that_have_adapters(tmp_path: Path) -> None:
    trainer = AdapterTrainer(
        model_init=lambda: language(ak.LoRA(rank=2))[0], args=arguments(tmp_path), train_dataset=TEXTS
    )
    first = trainer.model
    trainer.train()
    assert trainer.model is not first
    assert trainer.adapters.trained == ["x"]
    fresh, adapters = language(ak.LoRA(rank=2), seed=1)
    adapters.load_into("x", tmp_path / "checkpoint-4/adapter.safetensors")
    assert same(values(fresh), values(trainer.model))


def test_the_callback_alone_tells_of_steps_and_leaves_files(tmp_path: Path) -> None:
    model, adapters = language(ak.AdaLoRA(rank=2))
    args = arguments(tmp_path, lr_scheduler_type="constant")
    Trainer(model=model, args=args, train_dataset=TEXTS, callbacks=[AdapterCallback()]).train()
    kept = [int(tensor.sum()) for key, tensor in adapters.state_dict("x").items() if key.endswith("/kept")]
    assert sum(kept) == 2 * len(kept)
    fresh, other = language(ak.AdaLoRA(rank=2), seed=1)
    other.load_into("x", tmp_path / "checkpoint-4/adapter.safetensors")
    assert same(values(fresh), values(model))


@pytest.mark.parametrize("config", [ak.LoRA(rank=2), ak.Compacter(n=2)])  # the latter's points share parameters
def test_a_plain_trainer_has_base_and_adapters_in_its_checkpoints(config: ak.AdapterConfig, tmp_path: Path) -> None:
    def train(folder: str, resume: str | None = None, seed: int = 0) -> Any:
        model, _ = language(config, seed)
        args = arguments(tmp_path / folder, weight_decay=0.1)
        trainer = Trainer(model=model, args=args, train_dataset=TEXTS)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    trainer = train("whole")
    whole = values(trainer.model)
    resumed = train("resumed", str(tmp_path / "whole/checkpoint-2"), seed=1)
    assert same(values(resumed.model), whole)
    with safe_open(tmp_path / "whole/checkpoint-2/model.safetensors", "pt") as file:
        assert {*file.keys()} <= {*whole}
        assert [key for key in file.keys() if "adapterkit" in key]  # noqa: SIM118 - it is no mapping
    decays = {id(p): group["weight_decay"] for group in trainer.optimizer.param_groups for p in group["params"]}
    assert {decays[id(parameter)] for parameter in ak.Adapters(trainer.model).parameters()} == {0.0}


@pytest.mark.slow
def test_two_processes_train_alike_and_resume_exactly(tmp_path: Path) -> None:
    program = """
import sys, torch
from pathlib import Path
from adapterkit.torchvision_ops import ensure_torchvision_ops
ensure_torchvision_ops()
from tests.training.test_transformers import TEXTS, AdapterTrainer, ak, arguments, language, same, values
folder, found = Path(sys.argv[1]), []
for name, resume, seed in (("a", None, 0), ("b", str(folder / "a/checkpoint-2"), 3)):
    model, _ = language(ak.AdaLoRA(rank=2, targets="attn.q mlp.up"), seed)
    trainer = AdapterTrainer(model=model, args=arguments(folder / name, weight_decay=0.1), train_dataset=TEXTS)
    trainer.train(resume_from_checkpoint=resume)
    found.append(values(model))
rank = torch.distributed.get_rank()
torch.save(found[0], folder / f"{rank}.pt")
torch.distributed.barrier()
assert same(*found) and same(found[0], torch.load(folder / f"{1 - rank}.pt"))
assert not (folder / "a/checkpoint-2/model.safetensors").exists()
"""
    (tmp_path / "program.py").write_text(program)
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(tmp_path / "program.py")]
    root = Path(__file__).parents[2]
    paths = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    subprocess.run([*run, str(tmp_path)], check=True, cwd=root, env={**os.environ, "PYTHONPATH": paths}, timeout=110)


@pytest.mark.parametrize("reentrant", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_activations_may_be_computed_twice(reentrant: bool, tmp_path: Path) -> None:
    found = []
    for options in (
        {},
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": reentrant}},
    ):
        model, _ = language(ak.LoRA(rank=2, targets="linear", dropout=0.1))
        args = arguments(tmp_path, save_strategy="no", **options)
        AdapterTrainer(model=model, args=args, train_dataset=TEXTS).train()
        found.append(values(model))
    for key, tensor in found[0].items():
        torch.testing.assert_close(found[1][key], tensor)


def test_what_cannot_train_is_refused_before_the_first_step(tmp_path: Path) -> None:
    model, adapters = language(ak.LoRA(rank=2))
    adapters.freeze()
    model.lm_head.requires_grad_(True)
    trainer = AdapterTrainer(model=model, args=arguments(tmp_path), train_dataset=TEXTS)
    with pytest.raises(errors.StateError, match="no adapter trains"):
        trainer.train()
    adapters.train("x")
    model.is_quantized = True  # as far as the Trainer knows: the base cannot train, and need not
    AdapterTrainer(model=model, args=arguments(tmp_path), train_dataset=TEXTS)
    assert "_hf_peft_config_loaded" not in vars(model)


@pytest.mark.parametrize("spoil", [lambda a: a.activate(None), lambda a: a.merge()], ids=["acts not", "merged"])
def test_what_has_no_part_in_the_loss_is_told(tmp_path: Path, spoil: Callable[[ak.Adapters], None]) -> None:
    model, adapters = language(ak.LoRA(rank=2))
    spoil(adapters)
    with pytest.raises(errors.StateError, match=r"\('x'\) has a part in the loss"):
        AdapterTrainer(model=model, args=arguments(tmp_path), train_dataset=TEXTS).train()


def test_a_trainer_that_would_hide_it_is_refused() -> None:
    with pytest.raises(errors.ConfigError, match="invalid Hidden: a Trainer stands before"):
        type("Hidden", (Trainer, AdapterTraining), {})
    assert issubclass(type("Mine", (AdapterTraining, Trainer), {}), Trainer)
