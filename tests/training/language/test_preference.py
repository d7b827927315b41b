"""Preferences: every loss against its formula, with the base as the reference; rows of every manner."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import adapterkit as ak
from adapterkit.errors import ConfigError, DataError
from adapterkit.training.checked import CheckedTask
from adapterkit.training.loop import train
from adapterkit.training.parts import inference
from adapterkit.training.task import Setting
from tests.training.language import tiny

PAIRS = [
    {"prompt": "why ", "chosen": "yes ran far", "rejected": "no"},
    {"prompt": "the cat ", "chosen": "sat", "rejected": "ran the dog"},
    {"prompt": "the ", "chosen": "dog", "rejected": "cat"},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("preference"))


def log_probability(model: Any, prompt: str, answer: str) -> tuple[Tensor, int]:
    """Of an answer and its end mark, token by token in float64; and how many they are."""
    words = tiny.tokenizer()
    before, tokens = words(prompt)["input_ids"], [*words(prompt + answer)["input_ids"], 0]
    logs = model(torch.tensor([tokens])).logits[0].double().log_softmax(-1)
    places = range(len(before), len(tokens))
    return torch.stack([logs[place - 1, tokens[place]] for place in places]).sum(), len(places)


def prepared(model: Path, data: Path, output: Path, **options: Any) -> tuple[Any, Any, ak.Adapters]:
    """A task with an adapter on its model that changes it."""
    run = tiny.run_of(model, data, output, task="preference", validation_fraction=0, **options)
    task: Any = run.make_task()
    loaded = task.load_model()
    adapters = ak.Adapters(loaded)
    task.prepare(Setting(loaded, torch.device("cpu"), ak.points(loaded, adapter=run.adapter)))
    adapters.add("a", run.adapter)
    with torch.no_grad():
        for parameter in adapters.parameters("a"):
            parameter.normal_(0, 0.2)
    return task, loaded, adapters


def expected(objective: str, policy: list[Any], reference: list[Any]) -> Any:
    """Loss and margin of one pair by the papers' equations: beta 0.3, label smoothing 0.1, margin 0.4."""
    (c, n), (r, m) = policy
    (c0, _), (r0, _) = reference
    if objective == "dpo":
        h = 0.3 * math.log(math.exp(c - c0) / math.exp(r - r0))
        return -0.9 * math.log(1 / (1 + math.exp(-h))) - 0.1 * math.log(1 / (1 + math.exp(h))), h
    if objective == "ipo":
        h = (c - c0) / n - (r - r0) / m
        return (h - 1 / 0.6) ** 2, h
    if objective == "simpo":
        h = 0.3 / n * c - 0.3 / m * r
        return math.log(1 + math.exp(0.4 - h)), h
    odds = [math.exp(x / k) / (1 - math.exp(x / k)) for x, k in ((c, n), (r, m))]
    h = math.log(odds[0] / odds[1])
    return -c / n + 0.3 * math.log(1 + odds[1] / odds[0]), h


@pytest.mark.parametrize("objective", ["dpo", "ipo", "simpo", "orpo"])
def test_losses_of_pairs_are_those_of_the_papers(model: Path, tmp_path: Path, objective: str):
    data = tiny.rows_to(tmp_path / "pairs.jsonl", *PAIRS)
    constants = {"beta": 0.3, "label_smoothing": 0.1, "margin": 0.4}
    task, loaded, adapters = prepared(model, data, tmp_path / "run", objective=objective, **constants)
    batch = task.collate([task.preferences.training.item(number) for number in range(3)])
    with torch.no_grad():
        outcome = task.outcome(batch)
    for number, row in enumerate(PAIRS):
        sides = [(row["prompt"], row["chosen"]), (row["prompt"], row["rejected"])]
        with torch.no_grad():
            policy = [log_probability(loaded, *side) for side in sides]
            with adapters.disabled():
                reference = [log_probability(loaded, *side) for side in sides]
        loss, margin = expected(objective, policy, reference)
        assert outcome.losses[number].item() == pytest.approx(float(loss), rel=1e-4)
        assert outcome.margins[number].item() == pytest.approx(float(margin), rel=1e-3, abs=1e-5)
    assert task.loss(batch).item() == pytest.approx(outcome.losses.mean().item())
    gradients = torch.autograd.grad(task.loss(batch), list(adapters.parameters("a")))
    assert all(gradient.abs().max() > 0 for gradient in gradients)


def test_kto_is_that_of_its_paper(model: Path, tmp_path: Path):
    rows = [{"prompt": row["prompt"], "completion": row["chosen"], "label": n != 1} for n, row in enumerate(PAIRS)]
    data = tiny.rows_to(tmp_path / "judged.jsonl", *rows)
    constants = {"beta": 0.3, "good_weight": 1.5, "bad_weight": 0.5}
    task, loaded, adapters = prepared(model, data, tmp_path / "run", objective="kto", **constants)
    outcome = task.outcome(task.collate([task.preferences.training.item(number) for number in range(3)]))

    def ratio(prompt: str, answer: str) -> float:
        with torch.no_grad():
            own = log_probability(loaded, prompt, answer)[0]
            with adapters.disabled():
                return (own - log_probability(loaded, prompt, answer)[0]).item()

    following = [(rows[n]["prompt"], rows[(n + 1) % 3]["completion"]) for n in range(3)]
    z = max(0.0, sum(ratio(*one) for one in following) / 3)
    for number, row in enumerate(rows):
        r = ratio(row["prompt"], row["completion"])
        sign, weight = (1, 1.5) if row["label"] else (-1, 0.5)
        loss = weight * (1 - 1 / (1 + math.exp(-0.3 * sign * (r - z))))
        assert outcome.losses[number].item() == pytest.approx(loss, rel=1e-4)


def test_the_reference_is_the_base_and_leaves_the_model_in_training(model: Path, tmp_path: Path):
    data = tiny.rows_to(tmp_path / "pairs.jsonl", *PAIRS)
    task, loaded, adapters = prepared(model, data, tmp_path / "run")
    fresh: Any = task.__class__(task.config, task.options).load_model()
    loaded.train()
    batch = task.collate([task.preferences.training.item(0)])["answers"]
    found = task._reference(batch).total
    assert loaded.training
    assert not found.requires_grad
    told = {key: value for key, value in batch.items() if key != "labels"}
    logs = fresh(**told).logits.log_softmax(-1)[:, :-1]
    labels = batch["labels"][:, 1:]
    own = logs.gather(-1, labels.clamp(min=0)[..., None])[..., 0].masked_fill(labels < 0, 0).sum(1)
    assert torch.allclose(found, own, atol=1e-5)
    assert adapters.active is not None


@pytest.mark.parametrize("objective", ["dpo", "orpo", "kto"])
def test_the_better_answer_becomes_likelier(tmp_path: Path, objective: str):
    folder = tiny.llama(tmp_path / "model", tiny.BY_ROLE)
    before = [{"role": "user", "content": "why"}]
    good, bad = ([*before, {"role": "assistant", "content": content}] for content in ("yes", "no"))
    data = tiny.rows_to(tmp_path / "pairs.jsonl", *({"chosen": good, "rejected": bad} for _ in range(8)))
    values = {"objective": objective, "validation_fraction": 0.25, "prompts": ["why"], "sample_as": "chat"}
    run = tiny.run_of(folder, data, tmp_path / "run", "steps=20", task="preference", **values)
    record = CheckedTask(run).survey(None)
    assert record.facts["rows"] == "8, preferences (chosen, rejected)"
    result = train(run, silent=True)
    assert result.figures["accuracy"] == 1
    assert result.figures["loss"] < result.figures["base loss"]
    assert (tmp_path / "run/samples/step_000020_p0_s42.txt").read_text().startswith("why\n\n")
    task: Any = run.make_task()
    loaded = task.load_model()
    ak.Adapters(loaded).load(tmp_path / "run/adapter.safetensors", "a")
    ak.Adapters(loaded).activate("a")
    with inference(loaded):
        chances = loaded(torch.tensor([[2, tiny.WORDS.index("why"), 3]])).logits[0, -1].softmax(-1)
    assert chances[tiny.WORDS.index("yes")] > chances[tiny.WORDS.index("no")]


def test_a_reference_in_between_leaves_checkpointed_activations_as_they_are(tmp_path: Path, model: Path):
    data = tiny.rows_to(tmp_path / "pairs.jsonl", *PAIRS)
    found = []
    for saving in ("false", "true"):
        given = ["steps=3", f"gradient_checkpointing={saving}"]
        train(tiny.run_of(model, data, tmp_path / saving, *given, task="preference"), silent=True)
        found.append(load_file(tmp_path / saving / "adapter.safetensors"))
    assert all(torch.allclose(found[0][key], found[1][key], atol=1e-6) for key in found[0])


CHAT = [{"role": "user", "content": "why"}]
YES, NO = ({"role": "assistant", "content": content} for content in ("yes", "no"))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "why", "chosen": "yes", "rejected": "no"},
        {"prompt": CHAT, "chosen": [YES], "rejected": [NO]},
        {"prompt": "why", "chosen": [YES], "rejected": [NO]},
        {"prompt": CHAT, "chosen": [*CHAT, YES], "rejected": [*CHAT, NO]},
        {"chosen": [*CHAT, YES], "rejected": [*CHAT, NO]},
    ],
)
@pytest.mark.parametrize("template", [tiny.BY_ROLE, tiny.MARKED])
def test_rows_of_every_manner_are_the_same_pair(tmp_path: Path, row: dict[str, Any], template: str):
    words = tiny.tokenizer(template)
    data = tiny.rows_to(tmp_path / "pairs.jsonl", row)
    task: Any = tiny.run_of(tmp_path, data, tmp_path / "run", task="preference", validation_fraction=0).make_task()
    task.tokenizer = words
    chosen, rejected = task.preferences.training.item(0)
    for line, word in ((chosen, "yes"), (rejected, "no")):
        assert [tiny.WORDS[token] for token in line.tokens] == ["<u>", "why", "<a>", word, "<end>"]
        assert line.learnt.tolist() == [False, False, False, True, True]


@pytest.mark.parametrize(
    ("row", "options", "error", "reason"),
    [
        ({"chosen": "a", "rejected": "b"}, {}, DataError, "row 1 has no prompt"),
        ({"prompt": "a", "completion": "b", "label": True}, {}, DataError, "for options.objective=kto"),
        ({"prompt": "a", "completion": "b", "label": 3}, {"objective": "kto"}, DataError, "true or false as 'label'"),
        ({"prompt": CHAT, "chosen": [YES], "rejected": [NO]}, {}, ConfigError, "options.chat_template: there is none"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, {"too_long": "split"}, ConfigError, "cannot be split"),
        (
            {"prompt": "the", "chosen": " cat", "rejected": " cat"},
            {},
            DataError,
            "nothing to learn .*pairs of one answer: 1",
        ),
    ],
)
def test_rows_that_are_no_preference(
    tmp_path: Path, row: dict[str, Any], options: dict[str, Any], error: type[Exception], reason: str
):
    data = tiny.rows_to(tmp_path / "pairs.jsonl", row)
    options = {"validation_fraction": 0, **options}
    task: Any = tiny.run_of(tmp_path, data, tmp_path / "run", task="preference", **options).make_task()
    task.tokenizer = tiny.tokenizer()
    with pytest.raises(error, match=reason):
        task.survey(None)
