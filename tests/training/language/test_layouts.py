"""What rows say: columns by their names or as told, conversations of every manner."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adapterkit.errors import DataError
from adapterkit.training.language.conversations import Conversation, Document, Exchange, asked
from adapterkit.training.language.corpus import read_source

CHAT = ({"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes?"})
SHARED = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "yes?"}]


def read(folder: Path, row: dict[str, Any], **columns: str) -> tuple[Any, list[str]]:
    (folder / "a.jsonl").write_text(json.dumps(row), encoding="utf-8")
    source = read_source(folder / "a.jsonl", columns)
    return next(iter(source))[0], source.layouts


@pytest.mark.parametrize(
    ("row", "said", "layout"),
    [
        ({"text": "a"}, Document("a"), "texts (text)"),
        ({"prompt": "a", "completion": "b"}, Exchange("a", "b"), "prompts and completions (prompt, completion)"),
        (
            {"question": "a", "answer": "b", "system": "s", "id": 1},
            Exchange("a", "b", "s"),
            "prompts and completions (prompt from question, completion from answer, system; not read: 1 (id))",
        ),
        (
            {"prompt": [CHAT[0]], "completion": [CHAT[1]]},
            Conversation(CHAT),
            "prompts and completions (prompt, completion)",
        ),
        ({"instruction": "a", "output": "b"}, asked("a", "b"), "instructions (instruction, output)"),
        (
            {"instruction": "a", "input": "", "output": "b"},
            asked("a", "b"),
            "instructions (instruction, output, input)",
        ),
        (
            {"instruction": "a", "input": "c", "output": "b", "text": "a c b"},
            asked("a\n\nc", "b"),
            "instructions (instruction, output, input; not read: 1 (text))",
        ),
        ({"messages": CHAT}, Conversation(CHAT), "conversations (messages)"),
        ({"messages": json.dumps(CHAT)}, Conversation(CHAT), "conversations (messages)"),
        ({"conversations": SHARED}, Conversation(CHAT), "conversations (messages from conversations)"),
        (
            {"conversations": SHARED, "system": "be kind"},
            Conversation(({"role": "system", "content": "be kind"}, *CHAT)),
            "conversations (messages from conversations, system)",
        ),
    ],
)
def test_columns_are_found_and_told(tmp_path: Path, row: dict[str, Any], said: Any, layout: str):
    assert read(tmp_path, row) == (said, [layout])


def test_columns_of_other_names_are_told_by_the_user(tmp_path: Path):
    row = {"frage": "a", "antwort": "b", "text": "c"}
    assert read(tmp_path, row, prompt="frage", completion="antwort")[0] == Exchange("a", "b")
    assert read(tmp_path, row, text="antwort")[0] == Document("b")
    with pytest.raises(DataError, match=r"options\.columns=\{prompt: question"):
        read(tmp_path, row, prompt="frage")


def test_parts_of_contents_tools_and_reasoning_are_kept(tmp_path: Path):
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "plus"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "two", "reasoning_content": "hm", "name": None, "weight": 0},
    ]
    found, _ = read(tmp_path, {"messages": messages, "tools": [{"type": "function"}]})
    assert found.messages == (
        {"role": "user", "content": "one plus"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "two", "reasoning_content": "hm", "weight": 0},
    )
    assert found.tools == [{"type": "function"}]
    assert found.answers == [1, 3]
    assert found.learnt(last=False) == [1]


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "row 1 must hold a list of messages"),
        ("hello", "row 1 must hold a list of messages"),
        (["hello"], "no message with a role and a content"),
        ([{"role": "teacher", "content": "a"}], "of the role 'teacher'; expected one of system, .*gpt"),
        ([{"role": "user"}], "of the role 'user' without text"),
        ([{"role": "user", "content": "a"}], "no message of the role 'assistant', so that nothing"),
        ("[{", "holds a list that is no JSON"),
    ],
)
def test_conversations_that_are_none(tmp_path: Path, messages: Any, reason: str):
    with pytest.raises(DataError, match=reason):
        read(tmp_path, {"messages": messages})
