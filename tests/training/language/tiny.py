"""A tokenizer of words, chat templates of several manners, and small language models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from adapterkit.training.run import Run, load_run

WORDS = [
    "<end>", "<unk>", "<u>", "<a>", "<s>", "\n", " ", ":", "the", "cat", "dog", "sat", "ran", "far", "yes", "no", "why",
    "User", "Assistant", "System", "<think>",
]  # fmt: skip

BY_ROLE = (
    "{% for m in messages %}{{ {'user': '<u>', 'assistant': '<a>', 'system': '<s>'}[m.role] + m.content }}"
    "{% if m.role == 'assistant' %}<end>{% endif %}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)
"""Each message adds to those before it."""

MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<a>{% generation %}{{ m.content }}<end>{% endgeneration %}"
    "{% else %}<u>{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)
"""Answers are marked."""

FORGETFUL = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<a>{% if loop.last %}<think>{% endif %}{{ m.content }}<end>"
    "{% else %}<u>{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)
"""An answer is written otherwise when it is no longer the last."""

STRICT = (
    "{% if messages and messages[0].role != 'user' %}{{ raise_exception('begin with the user') }}{% endif %}"
    "{% for m in messages %}<u>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)
"""Refuses some, and asks otherwise than it answers."""


def tokenizer(template: str | None = None, **special: str) -> Any:
    """Words, single marks and spaces."""
    words = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = Split(Regex(r"<\w+>|\w+|\s|[^\w\s]"), "isolated")
    words.decoder = Fuse()
    made = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", unk_token="<unk>", **special)
    made.chat_template = template
    return made


def llama(folder: Path, template: str | None = None) -> Path:
    """A Llama with random weights, in a folder."""
    tokenizer(template).save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(WORDS), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=64, bos_token_id=None, eos_token_id=0, pad_token_id=None,
            initializer_range=0.3,
        )
    ).save_pretrained(folder)  # fmt: skip
    return folder


def gpt2(folder: Path) -> Path:
    """A GPT-2 with random weights, in a folder."""
    tokenizer().save_pretrained(folder)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(WORDS), n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0,
        initializer_range=0.3,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def run_of(model: Path, data: Path, output: Path, *overrides: str, task: str = "causal-lm", **options: Any) -> Run:
    """A short run."""
    values = {
        "task": task,
        "model": str(model),
        "data": str(data),
        "output": str(output),
        "adapter": {"type": "lora", "rank": 4, "targets": "linear"},
        "options": {"block_size": 32, **options},
        "steps": 40,
        "batch_size": 4,
        "learning_rate": 2e-2,
        "checkpoint_every": 20,
        "export": [],
    }
    return load_run(None, [*(f"{key}={json.dumps(value)}" for key, value in values.items()), *overrides])


def rows_to(path: Path, *rows: Any) -> Path:
    """A JSONL file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
