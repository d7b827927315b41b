"""Which tokens are learnt: answers, over several turns, by marks in the template or by what each message adds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from adapterkit.errors import ConfigError
from adapterkit.training.language.conversations import Conversation, Exchange, Rendered, asked
from adapterkit.training.language.templates import template_of
from adapterkit.training.language.tokens import Encoder
from tests.training.language.tiny import BY_ROLE, FORGETFUL, MARKED, STRICT, WORDS, tokenizer

TURNS = Conversation(
    tuple(
        {"role": role, "content": content}
        for role, content in [("user", "the cat"), ("assistant", "sat"), ("user", "why"), ("assistant", "the dog")]
    )
)


def learnt(template: str | None, conversation: Conversation, told: str | None = None, **settings: Any) -> list[str]:
    """Every example as text, with brackets around what is learnt."""
    words = tokenizer(template)
    found = template_of(words, told)
    assert found is not None
    shown = []
    for one in Encoder(words, **settings)(found.answers(conversation)):
        parts = [f"[{WORDS[t]}]" if on else WORDS[t] for t, on in zip(one.tokens, one.learnt, strict=True)]
        shown.append("".join(parts).replace("][", ""))
    return shown


@pytest.mark.parametrize("template", [BY_ROLE, MARKED])
def test_every_answer_is_learnt_and_nothing_else(template: str):
    assert learnt(template, TURNS) == ["<u>the cat<a>[sat<end>]<u>why<a>[the dog<end>]"]


def test_an_answer_that_is_written_otherwise_later_is_an_example_of_its_own():
    assert learnt(FORGETFUL, TURNS) == [
        "<u>the cat<a>[<think>sat<end>]",
        "<u>the cat<a>sat<end><u>why<a>[<think>the dog<end>]",
    ]


ENDED = BY_ROLE.replace(
    "{% if add_generation_prompt %}<a>{% endif %}", "{% if add_generation_prompt %}<a>{% else %}<s>{% endif %}"
)


def test_what_is_written_behind_the_last_message_alone_makes_no_examples_of_their_own():
    assert learnt(ENDED, TURNS) == ["<u>the cat<a>[sat<end>]<u>why<a>[the dog<end><s>]"]


@pytest.mark.parametrize("template", [BY_ROLE, MARKED])
def test_only_some_answers_are_learnt(template: str):
    words = tokenizer(template)
    found = template_of(words, None)
    assert found is not None
    first, *rest = TURNS.messages[1:]
    weighed = Conversation((TURNS.messages[0], {**first, "weight": 0}, *rest))
    for conversation, places in ((TURNS, TURNS.learnt(last=True)), (weighed, weighed.learnt(last=False))):
        assert places == [3]
        (one,) = found.answers(conversation, places)
        assert [one.text[slice(*span)] for span in one.learnt] == ["the dog<end>"]
    careless = template_of(tokenizer(MARKED.replace("<a>{% gen", "<a>{% generation %}{% endgeneration %}{% gen")), None)
    assert careless is not None
    with pytest.raises(ValueError, match="is to be learnt in part, and the template marks 4 answers of 2"):
        careless.answers(TURNS, [3])


def test_the_simple_template_ends_answers_with_the_end_mark():
    assert learnt(None, TURNS, "turns") == [
        "User: the cat\nAssistant: [sat<end>]\nUser: why\nAssistant: [the dog<end>]\n"
    ]
    found = template_of(tokenizer(), "turns")
    assert found is not None
    text = found.answers(TURNS)[0].text
    for place in TURNS.answers:
        assert text.startswith(found.render(TURNS.until(place), ask=True))


def test_everything_is_learnt_where_that_is_asked_for():
    assert learnt(BY_ROLE, asked("why", "no"), learn="everything") == ["[<u>why<a>no<end>]"]


def test_a_template_in_a_file(tmp_path: Path):
    (tmp_path / "t.jinja").write_text(MARKED)
    assert learnt(BY_ROLE, asked("why", "no"), str(tmp_path / "t.jinja")) == ["<u>why<a>[no<end>]"]
    with pytest.raises(ConfigError, match=r"(?s)options\.chat_template: cannot be read .*; name a file, or turns"):
        template_of(tokenizer(), str(tmp_path / "none.jinja"))


@pytest.mark.parametrize(
    ("conversation", "reason"),
    [
        (Conversation(TURNS.messages[1:]), r"is not what the chat template takes \(begin with"),
        (asked("why", "no"), "the template writes an answer otherwise than it asks for it"),
    ],
)
def test_what_a_template_cannot_do_is_told(conversation: Conversation, reason: str):
    found = template_of(tokenizer(STRICT), None)
    assert found is not None
    with pytest.raises(ValueError, match=reason):
        found.answers(conversation)


def test_a_token_that_an_answer_shares_with_its_prompt_is_not_learnt_and_told():
    encoder = Encoder(tokenizer())
    text = "the catsat far"
    (one,) = encoder([Rendered(text, [(text.index("sat"), len(text))], framed=True)])
    assert one.learnt.tolist() == [False, False, False, True, True, True]
    assert encoder.shared == 1


def test_a_text_that_stands_alone_has_the_tokenizers_marks_around_it():
    words = tokenizer(bos_token="<s>")
    plain = Encoder(words)
    assert next(plain([Rendered("no", [(0, 2)], framed=True)])).tokens.tolist() == [WORDS.index("no"), 0]
    from tokenizers.processors import TemplateProcessing

    words.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 4)])
    (one,) = plain([Rendered("no", [(0, 2)], framed=True)])
    assert one.tokens.tolist() == [4, WORDS.index("no"), 0]
    assert one.learnt.tolist() == [False, True, True]
    assert len(next(plain([Rendered("no", [(0, 2)])]))) == 1


def test_prompts_are_left_out_only_where_the_tokenizer_tells_places():
    class Slow:
        is_fast = False

        def __call__(self, texts: list[str], **_: Any) -> dict[str, Any]:
            return {"input_ids": [[1] * len(text) for text in texts]}

    slow = Slow()
    with pytest.raises(ConfigError, match=r"the tokenizer Slow does not tell .*options\.learn=everything"):
        list(Encoder(slow)([Rendered("ab", [(1, 2)])]))
    assert len(next(Encoder(slow)([Rendered("ab", [(0, 2)])]))) == 2
    assert next(Encoder(slow, learn="everything")([Rendered("ab", [(1, 2)])])).learnt.tolist() == [True, True]


def test_exchanges_are_turns():
    assert Exchange("why", "no", "the").conversation() == asked("why", "no", "the")
