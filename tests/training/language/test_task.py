from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import adapterkit as ak
from adapterkit.cli.main import main
from adapterkit.errors import ConfigError, DataError, StateError
from adapterkit.training.checked import CheckedTask
from adapterkit.training.loop import train
from adapterkit.training.plan import plan_of
from adapterkit.training.run import Run, load_run
from adapterkit.training.task import Sample, Setting
from tests.training.language import tiny

WORDS = ["<end>", "<unk>", "the", "cat", "dog", "sat", "ran", "far"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    words = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", unk_token="<unk>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, bos_token_id=None, eos_token_id=0, pad_token_id=None,
        initializer_range=0.3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.txt"
    path.write_text("the cat sat the dog ran far " * 40, encoding="utf-8")
    return path


def make_run(model: Path, data: Path, output: Path, *overrides: str, **options: Any) -> Run:
    values = {
        "task": "causal-lm",
        "model": str(model),
        "data": str(data),
        "output": str(output),
        "adapter": {"type": "lora", "rank": 4, "targets": "linear", "dropout": 0.1},
        "options": {"block_size": 8, "prompts": ["the cat"], "sample_tokens": 5, **options},
        "steps": 60,
        "batch_size": 4,
        "learning_rate": 2e-2,
        "checkpoint_every": 30,
        "export": [],
        "strengths": [],
    }
    return load_run(None, [*(f"{key}={json.dumps(value)}" for key, value in values.items()), *overrides])


def test_perplexity_falls_samples_are_written_and_resume_is_bitwise(model: Path, data: Path, tmp_path: Path):
    result = train(make_run(model, data, tmp_path / "whole", "export=null"), silent=True)
    assert " agrees (0.0% of the effect apart) |" in (tmp_path / "whole/README.md").read_text()
    assert "| peft | adapterkit" in (tmp_path / "whole/README.md").read_text()
    assert (tmp_path / "whole/export/peft/adapter_config.json").is_file()
    assert result.figures["perplexity"] < 2 < 5 < result.figures["base perplexity"]
    for step in (0, 60):
        assert (tmp_path / f"whole/samples/step_{step:06d}_p0_s42.txt").read_text().startswith("the cat ")
    train(make_run(model, data, tmp_path / "parts", "steps=30"), silent=True)
    train(make_run(model, data, tmp_path / "parts"), resume=True, silent=True)
    one, other = (load_file(tmp_path / name / "adapter.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_documents_are_joined_with_an_end_mark_cut_and_split(model: Path, tmp_path: Path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a.jsonl").write_text('{"text": "the cat"}\n\n{"text": "dog", "x": 1}\n', encoding="utf-8")
    (tmp_path / "data/b.txt").write_text("sat ran far the cat dog the", encoding="utf-8")
    run = make_run(model, tmp_path / "data", tmp_path / "run", block_size=4, validation_fraction=0.3)
    task: Any = run.make_task()
    loaded = task.load_model()
    blocks = task.prepare(Setting(loaded, torch.device("cpu"), ak.points(loaded, adapter=run.adapter)))
    stream = [2, 3, 0, 4, 0, 5, 6, 7, 2, 3, 4, 2, 0]
    assert [blocks.line(number).tokens.tolist() for number in range(len(blocks))] == [stream[0:4], stream[4:8]]
    assert [one.tokens.tolist() for one in task.held_out] == [stream[8:12]]


def test_loss_and_perplexity_are_those_of_the_next_token(model: Path, data: Path, tmp_path: Path):
    run = make_run(model, data, tmp_path / "run")
    task: Any = run.make_task()
    loaded = task.load_model()
    task.prepare(Setting(loaded, torch.device("cpu"), ak.points(loaded, adapter=run.adapter)))
    blocks = torch.stack([one.tokens for one in task.held_out]).long()
    batch = {"input_ids": blocks, "labels": blocks}
    with torch.no_grad():
        logs = F.log_softmax(loaded(blocks).logits[:, :-1].double(), -1)
        expected = -logs.gather(-1, blocks[:, 1:, None]).mean().item()
        assert task.loss(batch).item() == pytest.approx(expected, rel=1e-5)
        assert task.loss(batch).item() == pytest.approx(loaded(blocks, labels=blocks).loss.item(), rel=1e-5)
        assert task.evaluate()["perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)


def test_a_sample_depends_on_its_seed_alone(model: Path, data: Path, tmp_path: Path):
    task: Any = make_run(model, data, tmp_path / "run", sample_tokens=20).make_task()
    task.prepare_generation(task.load_model(), torch.device("cpu"))
    state = torch.get_rng_state()
    texts = []
    for number, seed in enumerate((1, 1, 2)):
        task.generate(Sample("the", seed), tmp_path / f"{number}.txt")
        texts.append((tmp_path / f"{number}.txt").read_text())
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(torch.get_rng_state(), state)


def test_a_prompt_without_a_token_begins_after_the_end_mark(model: Path, data: Path, tmp_path: Path):
    task: Any = make_run(model, data, tmp_path / "run").make_task()
    task.prepare_generation(task.load_model(), torch.device("cpu"))
    for number, prompt in enumerate(("", "<end>")):
        task.generate(Sample(prompt, 3), tmp_path / f"{number}.txt")
    assert (tmp_path / "0.txt").read_text() == (tmp_path / "1.txt").read_text()


def test_the_command_samples_from_a_run(model: Path, data: Path, tmp_path: Path):
    train(make_run(model, data, tmp_path / "run", "steps=5"), silent=True)
    arguments = ["sample", str(tmp_path / "run"), "--prompt", "the cat", "-o", str(tmp_path / "out.txt")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    expected = tmp_path / "run/samples/step_000005_p0_s42.txt"
    assert (tmp_path / "out.txt").read_text() == expected.read_text()
    assert result.stdout == f"{tmp_path}/out.txt\n{expected.read_text()}"


def test_gradient_checkpointing(model: Path, data: Path, tmp_path: Path):
    for saving in ("false", "true"):
        train(make_run(model, data, tmp_path / saving, f"gradient_checkpointing={saving}", "steps=3"), silent=True)
    one, other = (load_file(tmp_path / s / "adapter.safetensors") for s in ("false", "true"))
    assert all(torch.allclose(one[key], other[key], atol=1e-6) for key in one)


def test_blocks_that_do_not_fit(model: Path, data: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"reads at most 32 tokens, not 64; set options.block_size=32"):
        plan_of(make_run(model, data, tmp_path / "run", block_size=64))
    data.write_text("the cat sat")
    with pytest.raises(DataError, match="fills 0 block of 8 tokens; two are needed"):
        train(make_run(model, data, tmp_path / "run"), silent=True)


@pytest.mark.parametrize("inside", ["run", ".", "link/run"])
def test_a_run_does_not_write_among_its_data(model: Path, tmp_path: Path, inside: str):
    folder = tmp_path / "texts"
    folder.mkdir()
    (tmp_path / "link").symlink_to(folder)
    output = tmp_path / inside if inside.startswith("link") else folder / inside
    with pytest.raises(StateError, match=r"lies in the data folder .*texts, where what the run writes would be data"):
        train(make_run(model, folder, output), silent=True)
    assert not list(folder.iterdir())


def chats(folder: Path) -> Path:
    """Conversations of two turns; in each, the answers say the animal that was asked about."""
    rows = []
    for number in range(40):
        one, other = ("cat", "dog") if number % 2 else ("dog", "cat")
        said = [("user", f"the {one}"), ("assistant", f"{one} ran"), ("user", f"why {other}"), ("assistant", other)]
        rows.append({"messages": [{"role": role, "content": content} for role, content in said]})
    return tiny.rows_to(folder / "chats.jsonl", *rows)


@pytest.mark.parametrize("packing", ["rows", "documents"])
def test_conversations_are_learnt_by_their_answers(tmp_path: Path, packing: str):
    model = tiny.llama(tmp_path / "model", tiny.BY_ROLE)
    run = tiny.run_of(model, chats(tmp_path), tmp_path / "run", packing=packing, validation_fraction=0.1)
    record = CheckedTask(run).survey(None)
    assert record.facts["rows"] == "40, conversations (messages)"
    assert record.facts["tokens"] == "640, of which 240 are learnt"
    assert record.facts["longest"] == "16 tokens"
    result = train(run, silent=True)
    assert result.figures["perplexity"] < 1.5 < 5 < result.figures["base perplexity"]
    assert math.exp(result.figures["loss"]) == pytest.approx(result.figures["perplexity"])


def test_a_tokenizer_without_a_template_says_what_to_do(model: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"has no chat template, and the data holds conversations.*turns for"):
        train(tiny.run_of(model, chats(tmp_path), tmp_path / "run"), silent=True)
    gpt2 = tiny.gpt2(tmp_path / "gpt2")
    run = tiny.run_of(gpt2, chats(tmp_path), tmp_path / "run", "steps=1", "bake=true", chat_template="turns")
    assert math.isfinite(train(run, silent=True).loss)
    words = AutoTokenizer.from_pretrained(tmp_path / "run/model")  # whoever loads the model asks it as it was trained
    asked = words.apply_chat_template([{"role": "user", "content": "why"}], tokenize=False, add_generation_prompt=True)
    assert asked == "User: why\nAssistant: "


def test_prompts_are_plain_without_a_template_and_a_file_of_its_own_measures(tmp_path: Path):
    model = tiny.llama(tmp_path / "model")
    data = tmp_path / "data.csv"
    data.write_text("question,answer\nthe cat ,dog\nwhy,no\n")
    measure = tiny.rows_to(tmp_path / "measure.jsonl", {"prompt": "the cat ", "completion": "dog"})
    run = tiny.run_of(model, data, tmp_path / "run", "steps=1", validation=str(measure))
    task: Any = run.make_task()
    record = task.survey(None)
    assert set(record.files) == {"data.csv", "validation/measure.jsonl"}
    first = task.examples.training.line(0)
    assert first.tokens.tolist() == [tiny.WORDS.index(word) for word in ("the", " ", "cat", " ", "dog", "<end>")]
    assert first.learnt.tolist() == [False] * 4 + [True, True]
    loaded = task.load_model()
    task.prepare(Setting(loaded, torch.device("cpu"), ak.points(loaded, adapter=run.adapter)))
    with torch.no_grad():
        logs = F.log_softmax(loaded(first.tokens[None]).logits[0].double(), -1)
        loss = -(logs[3, first.tokens[4]] + logs[4, 0]) / 2
    assert task.evaluate()["loss"] == pytest.approx(loss.item(), rel=1e-6)


def test_every_token_of_a_step_counts_alike_however_it_is_cut_into_batches(model: Path, tmp_path: Path):
    rows = [{"prompt": "the ", "completion": "cat " * count} for count in (1, 9, 2, 5)]
    data = tiny.rows_to(tmp_path / "rows.jsonl", *rows)
    found = []
    for size in (1, 2, 4):
        given = ["steps=3", f"batch_size={size}", f"gradient_accumulation={4 // size}", "optimizer={type: sgd}"]
        run = tiny.run_of(model, data, tmp_path / str(size), *given, "learning_rate=1", validation_fraction=0)
        train(run, silent=True)
        found.append(load_file(tmp_path / str(size) / "adapter.safetensors"))
    assert all(torch.allclose(found[2][key], one[key], atol=1e-5) for one in found[:2] for key in one)
