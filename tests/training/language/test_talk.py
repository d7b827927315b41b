"""Conversations with a model: what it sees, what is kept, and how little room is made do with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from adapterkit.errors import ConfigError
from adapterkit.training.language.generation import Writer
from adapterkit.training.language.talk import Talk
from adapterkit.training.language.templates import template_of
from adapterkit.training.loading import load_causal_lm
from tests.training.language import tiny


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Writer:
    folder = tiny.llama(tmp_path_factory.mktemp("talk"), tiny.BY_ROLE)
    model, words = load_causal_lm(str(folder), "float32")
    return Writer(model.eval(), words, template_of(words, None), torch.device("cpu"))


def test_answers_are_drawn_after_all_that_was_said(writer: Writer):
    talk = Talk(writer, system="yes", tokens=3, temperature=0)
    talk.messages += [{"role": "user", "content": "no"}, {"role": "assistant", "content": "sat"}]
    before = [tiny.WORDS.index(word) for word in ("<s>", "yes", "<u>", "no", "<a>", "sat", "<end>", "<u>")]
    expected: list[str] = []
    for word in ("why", "dog", "cat", "far"):
        drawn: list[int] = []
        before += [tiny.WORDS.index(word), 3]
        with torch.no_grad():
            while len(drawn) < 3 and 0 not in drawn:
                drawn.append(int(writer.model(torch.tensor([before + drawn])).logits[0, -1].argmax()))
        expected.append(writer.text(torch.tensor(drawn)))
        assert talk.answer(word) == expected[-1]
        before = [*before, *writer.tokenizer(expected[-1])["input_ids"], 0, 2]
    assert [message["content"] for message in talk.messages[3::2]] == expected
    assert [message["role"] for message in talk.messages] == ["user", "assistant"] * 5
    said = json.loads(talk.row())["messages"]
    assert said[0] == {"role": "system", "content": "yes"}
    assert said[1:] == talk.messages


def test_what_was_said_can_be_taken_back_and_said_again(writer: Writer):
    talk = Talk(writer, tokens=4, temperature=1.0)
    one = talk.answer("the cat")
    assert talk.undo() == "the cat"
    assert not talk.messages
    talk.seed = 42
    assert talk.answer("the cat") == one
    talk.reset()
    assert talk.undo() == ""


def test_the_oldest_messages_make_room(writer: Writer):
    talk = Talk(writer, system="the", tokens=20, temperature=1.0)
    for _ in range(6):
        talk.answer("the cat sat the dog ran far")
    assert talk.forgotten > 0
    assert talk.forgotten % 2 == 0
    assert len(talk.messages) == 12
    assert len(json.loads(talk.row())["messages"]) == 13
    with pytest.raises(ConfigError, match="the model reads 64 tokens, which are used up"):
        talk.answer("why " * 40)
    assert len(talk.messages) == 12


def test_an_interrupted_answer_leaves_the_conversation_as_it_was(writer: Writer):
    class Stops:
        def put(self, _: Any) -> None:
            raise KeyboardInterrupt

    talk = Talk(writer, tokens=4)
    with pytest.raises(KeyboardInterrupt):
        talk.answer("why", Stops())
    assert not talk.messages
    assert talk.seed == 42


def test_generation_stops_at_the_tokenizers_end_too(writer: Writer):
    config = writer.model.generation_config
    before, config.eos_token_id = config.eos_token_id, [7]
    try:
        assert writer._ends() == [0, 7]
    finally:
        config.eos_token_id = before
    assert writer._ends() == [0]


def test_without_a_template_there_is_no_chat(tmp_path: Path, writer: Writer):
    with pytest.raises(ConfigError, match="the tokenizer has no chat template; name a file of one, or turns"):
        Talk(Writer(writer.model, writer.tokenizer, None, torch.device("cpu"))).answer("why")
