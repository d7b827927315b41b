"""`generate` and `chat` on the terminal, with an adapter of a run, of a file, and with the base alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from adapterkit.cli.main import main
from adapterkit.training.loop import train
from tests.training.language import tiny


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An assistant that has learnt what to say."""
    folder = tmp_path_factory.mktemp("chat")
    model = tiny.llama(folder / "model", tiny.BY_ROLE)
    said = [("the cat", "sat"), ("the dog", "ran far")]
    rows = [{"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]} for a, b in said]
    data = tiny.rows_to(folder / "data.jsonl", *rows)
    train(tiny.run_of(model, data, folder / "run", "steps=60", validation_fraction=0), silent=True)
    return folder / "run"


def said(*arguments: object, stdin: str = "") -> str:
    result = CliRunner().invoke(main, [*map(str, arguments)], input=stdin)
    assert result.exit_code == 0, result.output
    return result.output


def test_a_prompt_is_answered_by_the_adapter_and_otherwise_by_the_base(run: Path):
    asked = ["--chat", "--prompt", "the cat", "--prompt", "the dog", "--temperature", 0, "--tokens", 6]
    assert said("generate", run, *asked) == "sat\nran far\n"
    base = said("generate", run, *asked, "--weight", 0)
    assert base != "sat\nran far\n"
    assert said("generate", "--model", run.parent / "model", *asked) == base
    file = run / "adapter.safetensors"
    assert said("generate", file, "--model", run.parent / "model", *asked) == "sat\nran far\n"


def test_a_prompt_is_gone_on_from_where_it_is_no_chat(run: Path):
    arguments = ["--temperature", 0, "--tokens", 4]
    assert said("generate", run, "--prompt", "<u>the cat<a>", *arguments) == "<u>the cat<a>sat\n"
    assert said("generate", run, *arguments, stdin="<u>the cat<a>") == "<u>the cat<a>sat\n"


def test_a_conversation_with_verbs_in_between(run: Path, tmp_path: Path):
    lines = [
        "the cat", "/again", f"/save {tmp_path / 'more.jsonl'}", "/weight 0", "/weight x", "/undo", "/system yes",
        "/temperature nan", "/temperature 0", "/help", "/exit", "the dog",
    ]  # fmt: skip
    output = said("chat", run, "--temperature", 0, "--tokens", 6, stdin="\n".join(lines) + "\n")
    assert output.count("sat\n") == 2
    assert "the adapter acts with weight 0" in output
    assert "/weight: wants a number, such as 0.5, not 'x'" in output
    assert "/temperature: wants a number, such as 0.5, not 'nan'" in output
    assert "taken back: the cat" in output
    assert "/save FILE" in output
    assert "ran far" not in output
    row = json.loads((tmp_path / "more.jsonl").read_text())
    assert row["messages"] == [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]


def test_what_is_no_command_is_told_with_what_is_like_it(run: Path):
    output = said("chat", run, stdin="/temprature 1\n/bogus\n/\n")
    assert "/temprature is no command; did you mean /temperature? /help lists them\n" in output
    assert "/bogus is no command; /help lists them\n" in output
    assert output.count("/weight NUMBER") == 1


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_the_folder_of_a_model_stands_alone(run: Path, command: str, tmp_path: Path):
    said("bake", run, tmp_path / "baked")
    given = ["--chat", "--prompt", "the cat"] if command == "generate" else []
    output = said(command, tmp_path / "baked", *given, "--temperature", 0, "--tokens", 6, stdin="the cat\n")
    assert "sat\n" in output


def test_a_conversation_goes_on_behind_what_cannot_be_done(tmp_path: Path):
    strict = tiny.BY_ROLE.replace(
        "{% for", "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}{% for", 1
    )
    model = tiny.llama(tmp_path / "model", strict)
    lines = ["/weight 0.5", "/system the cat", "why", "/system", "why", "/undo"]
    output = said("chat", model, "--tokens", 2, stdin="\n".join(lines) + "\n")
    assert "there is no adapter that could act with 0.5" in output
    assert "error: invalid run: the conversation is not what the chat template takes (no)" in output
    assert "taken back: why" in output


def test_without_a_chat_template_nobody_is_asked(tmp_path: Path):
    result = CliRunner().invoke(main, ["chat", str(tiny.llama(tmp_path / "model"))], input="why\n")
    assert result.exit_code == 1
    assert "options.chat_template: the tokenizer has no chat template; name a file of one, or turns" in result.stderr
    assert ">" not in result.stdout


def test_a_conversation_ends_with_its_input(run: Path):
    assert "ran far" in said("chat", run, "--temperature", 0, "--tokens", 6, stdin="the dog\n")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["generate", "--prompt", "why"], "name an adapter, or the base with --model"),
        (["chat", "nowhere"], "nowhere"),
    ],
)
def test_what_is_lacking_is_told(arguments: list[str], reason: str):
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code != 0
    assert reason in result.output
