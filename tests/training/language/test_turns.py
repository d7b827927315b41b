"""The loss over several turns against an independent formula, with templates in the manner of known ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import adapterkit as ak
from adapterkit.errors import DataError
from adapterkit.training.language.conversations import Conversation
from adapterkit.training.language.templates import Template
from adapterkit.training.task import Setting
from tests.training.language import tiny

MARKS = ("<bos>", "<im>", "</im>", "<h>", "</h>", "<eot>", "[INST]", "[/INST]", "<sot>")
MODEL = {"user": "user", "assistant": "model"}
CHATML = (
    "{% if messages[0].role != 'system' %}<im>system\nthe cat</im>\n{% endif %}"
    "{% for m in messages %}<im>{{ m.role }}\n{{ m.content }}</im>\n{% endfor %}"
    "{% if add_generation_prompt %}<im>assistant\n{% endif %}"
)
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}<h>{{ m.role }}</h>\n\n{{ m.content | trim }}<eot>{% endfor %}"
    "{% if add_generation_prompt %}<h>assistant</h>\n\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if m.role == 'user' %}[INST] {{ m.content | trim }} "
    "[/INST]{% else %} {{ m.content | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}<sot>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<eot>\n"
    "{% endfor %}{% if add_generation_prompt %}<sot>model\n{% endif %}"
)
SAID = [("user", " the cat\n"), ("assistant", " sat "), ("user", "sat"), ("assistant", "sat"), ("user", "why"),
        ("assistant", "the dog\n\nran")]  # fmt: skip


def chatml() -> list[tuple[str, bool]]:
    parts = [("<im>system\nthe cat</im>\n", False)]
    for role, text in SAID:
        parts += [(f"<im>{role}\n", False), (f"{text}</im>\n", role == "assistant")]
    return parts


def llama_3() -> list[tuple[str, bool]]:
    parts = [("<bos>", False)]
    for role, text in SAID:
        parts += [(f"<h>{role}</h>\n\n", False), (f"{text.strip()}<eot>", role == "assistant")]
    return parts


def mistral() -> list[tuple[str, bool]]:
    asked, answered = (lambda text: (f"[INST] {text} [/INST]", False)), (lambda text: (f" {text}<end>", True))
    return [("<bos>", False), *((asked if role == "user" else answered)(text.strip()) for role, text in SAID)]


def gemma() -> list[tuple[str, bool]]:
    parts = [("<bos>", False)]
    for role, text in SAID:
        parts += [(f"<sot>{MODEL[role]}\n", False), (f"{text.strip()}<eot>\n", role == "assistant")]
    return parts


def base(folder: Path, template: str) -> Any:
    """A model, and its tokenizer, to which the marks are single tokens."""
    words = tiny.tokenizer(template, bos_token="<bos>")
    words.add_special_tokens({"additional_special_tokens": list(MARKS)})
    words.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=128, bos_token_id=None, eos_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return words


@pytest.mark.parametrize("packing", ["rows", "documents"])
@pytest.mark.parametrize(
    ("template", "written"), [(CHATML, chatml), (LLAMA_3, llama_3), (MISTRAL, mistral), (GEMMA, gemma)]
)
def test_the_loss_is_the_mean_over_the_tokens_of_the_answers(tmp_path: Path, template: str, written: Any, packing: str):
    words = base(tmp_path / "model", template)
    row = {"messages": [{"role": role, "content": text} for role, text in SAID]}
    data = tiny.rows_to(tmp_path / "rows.jsonl", row)
    options = {"validation_fraction": 0, "validation": str(data), "block_size": 128, "packing": packing}
    run = tiny.run_of(tmp_path / "model", data, tmp_path / "run", **options)
    task: Any = run.make_task()
    task.survey(None)
    model = task.load_model()
    rows = task.prepare(Setting(model, torch.device("cpu"), ak.points(model, adapter=run.adapter)))
    parts = [(words(text, add_special_tokens=False)["input_ids"], learnt) for text, learnt in written()]
    ids = torch.tensor([[token for tokens, _ in parts for token in tokens]])
    kept = torch.tensor([learnt for tokens, learnt in parts for _ in tokens])
    with torch.no_grad():
        logs = model(input_ids=ids).logits[0].double().log_softmax(-1)
        wanted = -sum(float(logs[n - 1, ids[0, n]]) for n in range(1, ids.shape[1]) if kept[n]) / int(kept.sum())
        batch = task.collate([rows.line(0)])
        assert batch["input_ids"][0, : ids.shape[1]].tolist() == ids[0].tolist()
        assert task.weight(batch) == int(kept.sum())
        assert float(task.loss(batch)) == pytest.approx(wanted, rel=1e-5)
        assert task.evaluate()["loss"] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(
    ("template", "roles", "reason"),
    [
        (MISTRAL, ["user", "user", "assistant"], "row 1 is not what the chat template takes (roles must alternate)"),
        (GEMMA, ["system", "user", "assistant"], "row 1 is not what the chat template takes (no system role)"),
    ],
)
def test_a_conversation_that_a_template_refuses_is_named(tmp_path: Path, template: str, roles: list[str], reason: str):
    base(tmp_path / "model", template)
    row = {"messages": [{"role": role, "content": "yes"} for role in roles]}
    task = tiny.run_of(tmp_path / "model", tiny.rows_to(tmp_path / "rows.jsonl", row), tmp_path / "run").make_task()
    with pytest.raises(DataError) as caught:
        task.survey(None)
    assert reason in str(caught.value)


def of(*said: tuple[str, str]) -> Conversation:
    return Conversation(tuple({"role": role, "content": text} for role, text in said))


SYSTEM_LAST = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {% if loop.last and messages[0].role == 'system' %}"
    "{{ messages[0].content }} {% endif %}{{ m.content }} [/INST]{% elif m.role == 'assistant' %} {{ m.content }}</s>"
    "{% endif %}{% endfor %}"
)
"""The system's words stand before the last question, and nowhere once it is answered."""
COUNTING = "{{ messages | length }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
HALF_MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' and loop.last %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (SYSTEM_LAST, "writes an answer otherwise than it asks for it"),
        (COUNTING, "writes an answer otherwise than it asks for it"),
        (HALF_MARKED, "has answers that the template does not mark: 1 answers of 2"),
    ],
)
def test_a_template_of_which_answers_are_not_known_is_refused(template: str, reason: str):
    said = of(("system", "be"), ("user", "why"), ("assistant", "no"), ("user", "why"), ("assistant", "yes"))
    with pytest.raises(ValueError, match=reason):
        Template(template, {}).answers(said)


def test_the_words_of_the_system_before_the_last_question_alone_do_no_harm_where_there_are_none():
    said = of(("user", "why"), ("assistant", "no"), ("user", "why"), ("assistant", "no"))
    (one,) = Template(SYSTEM_LAST, {}).answers(said)
    assert [one.text[slice(*span)] for span in one.learnt] == [" no</s>", " no</s>"]


def test_one_mark_may_cover_all_that_the_assistant_says_in_a_row():
    marked = (
        "{% for m in messages %}{% if m.role == 'user' %}<u>{{ m.content }}{% elif loop.previtem.role == 'user' %}"
        "{% generation %}{{ m.content }}{% for n in messages[loop.index:] %}{% if n.role != 'user' %}{{ n.content }}"
        "{% endif %}{% endfor %}{% endgeneration %}{% endif %}{% endfor %}"
    )
    said = of(("user", "why"), ("assistant", "call"), ("tool", "42"), ("assistant", "so"))
    (one,) = Template(marked, {}).answers(said)
    assert [one.text[slice(*span)] for span in one.learnt] == ["call42so"]
    assert said.replies == 1


CALLING = (
    "{% if tools %}[{% for tool in tools %}{{ tool.name }}{% endfor %}]{% endif %}{% for m in messages %}<{{ m.role }}>"
    "{{ m.content }}{% for call in m.tool_calls or [] %}!{{ call.name }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_calls_of_tools_are_learnt_and_a_template_that_leaves_them_out_is_refused():
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "weather"},
        {"role": "assistant", "content": "", "tool_calls": [{"name": "look"}]},
        {"role": "tool", "content": "sun"},
        {"role": "assistant", "content": "sunny"},
    ]
    said = Conversation(tuple(messages), [{"name": "look"}])
    (one,) = Template(CALLING, {}).answers(said)
    assert one.text == "[look]<user>weather<assistant>!look<tool>sun<assistant>sunny"
    assert [one.text[slice(*span)] for span in one.learnt] == ["!look", "sunny"]
    with pytest.raises(ValueError, match="has 'tools', which the chat template does not write; name one that does"):
        Template(tiny.BY_ROLE.replace("'system': '<s>'", "'tool': '<s>'"), {}).answers(said)
    with pytest.raises(ValueError, match="has 'tool_calls', which the chat template does not write"):
        Template(tiny.BY_ROLE.replace("'system': '<s>'", "'tool': '<s>'"), {}).answers(Conversation(said.messages))
