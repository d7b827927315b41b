"""A small Llama that has read the standard library's documentation is adapted to that of scikit-learn.

    python examples/language_domains.py

Both texts are real English that is on this machine: documentation strings, read from source files with `ast`. The
tokenizer and the model are trained here; then LoRA and Prefix adapt the frozen model. Perplexity is measured on files
that no model has seen, in both domains: an adapter that is switched off costs the first domain nothing.
The figures depend on the installed versions of Python and scikit-learn. About two minutes on two cores.
"""

from __future__ import annotations

import ast
import copy
import importlib.util
import math
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.torchvision_ops import ensure_torchvision_ops

ensure_torchvision_ops()
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402 - only after the line above

VOCABULARY = 1024
LENGTH = 96
END = "<|end|>"
ADAPTERS = {"LoRA": (ak.LoRA(rank=8, targets="linear"), 1e-2), "Prefix": (ak.Prefix(length=16), 1e-1)}
"""What is added, and its learning rate: a prefix wants a larger one."""
SKIPPED = frozenset({"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo"})


@dataclass(frozen=True)
class Domain:
    """Texts to learn from, and texts of other files to be measured on."""

    train: list[str]
    held_out: list[str]


def documentation(folder: Path) -> Domain:
    """The documentation strings below a folder; those of every tenth file are held out. Repetitions count once."""
    files = sorted(file for file in folder.rglob("*.py") if not SKIPPED & set(file.relative_to(folder).parts))
    seen: set[str] = set()
    found: tuple[list[str], list[str]] = ([], [])
    for number, file in enumerate(files):
        texts = [text for text in docstrings(file) if text not in seen]
        seen.update(texts)
        found[number % 10 == 0].extend(texts)
    return Domain(*found)


def docstrings(file: Path) -> Iterator[str]:
    """Those of a module, its classes and its functions; none where the file is no Python of this version."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in other people's strings
        try:
            tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError):
            return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text and len(text) > 40:
                yield text


def byte_pairs(texts: Iterable[str]) -> Tokenizer:
    """A byte-level tokenizer, so that no text is unknown to it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def packed(tokenizer: Tokenizer, texts: list[str], limit: int | None = None) -> Tensor:
    """Blocks of tokens [n, LENGTH]: the texts one after the other, with a mark between them."""
    stream = [token for text in tokenizer.encode_batch([f"{text}{END}" for text in texts]) for token in text.ids]
    return torch.tensor(stream[: len(stream) // LENGTH * LENGTH]).view(-1, LENGTH)[:limit]


def fit(model: nn.Module, parameters: Iterable[nn.Parameter], blocks: Tensor, *, steps: int, rate: float) -> None:
    """AdamW on batches of 16 random blocks; the rate rises for a tenth of the steps and then falls to zero."""
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        batch = blocks[torch.randint(len(blocks), (16,), generator=generator)]
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()


@torch.no_grad()
def perplexity(model: nn.Module, blocks: Tensor) -> float:
    """Of a token, given those before it in its block."""
    parts = blocks.split(16)
    total = sum(model(input_ids=part, labels=part, use_cache=False).loss.item() * len(part) for part in parts)
    return math.exp(total / len(blocks))


def sample(model: LlamaForCausalLM, tokenizer: Tokenizer, prompt: str) -> str:
    """How the model goes on, with the keys and values of earlier tokens cached."""
    tokens = torch.tensor([tokenizer.encode(prompt).ids])
    torch.manual_seed(0)
    made = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=48, do_sample=True, temperature=0.7
    )
    return tokenizer.decode(made[0].tolist()).strip()


def small_llama(tokenizer: Tokenizer) -> LlamaForCausalLM:
    """Four layers, and half as many heads for keys and values as for queries."""
    torch.manual_seed(0)
    end = tokenizer.token_to_id(END)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    return LlamaForCausalLM(config)


@dataclass
class Adapted:
    """A copy of the base with an adapter in it, and what its training took."""

    model: LlamaForCausalLM
    adapters: ak.Adapters
    seconds: float

    @property
    def parameters(self) -> int:
        """Numbers in the adapter."""
        return sum(parameter.numel() for parameter in self.adapters.parameters("docs"))


def adapt(base: LlamaForCausalLM, config: ak.AdapterConfig, rate: float, blocks: Tensor) -> Adapted:
    """Trains an adapter on a copy of the base."""
    model = copy.deepcopy(base)
    adapters = ak.Adapters(model)
    adapters.add("docs", config)  # freezes the model
    start = time.perf_counter()
    fit(model, adapters.parameters("docs"), blocks, steps=150, rate=rate)
    return Adapted(model, adapters, time.perf_counter() - start)


@torch.no_grad()
def check(base: LlamaForCausalLM, adapted: Adapted, probe: Tensor, folder: Path) -> int:
    """Disabled is the base, and a file carries all; returns the file's size in KiB.

    Raises:
        RuntimeError: A bit differs.
    """
    with adapted.adapters.disabled():
        if not torch.equal(adapted.model(probe).logits, base(probe).logits):
            raise RuntimeError("with its adapter disabled the model should be the base, bit for bit")
    file = adapted.adapters.save("docs", folder / "docs.safetensors")
    other = copy.deepcopy(base)
    adapters = ak.Adapters(other)
    adapters.load(file)
    adapters.activate("docs")
    if not torch.equal(other(probe).logits, adapted.model(probe).logits):
        raise RuntimeError("a loaded adapter should be the saved one, bit for bit")
    return file.stat().st_size // 1024


def main() -> None:
    """Prints the table of perplexities, and what the models write."""
    python = documentation(Path(sysconfig.get_path("stdlib")))
    sklearn = documentation(Path(importlib.util.find_spec("sklearn").origin).parent)
    tokenizer = byte_pairs(python.train)
    held_out = [packed(tokenizer, domain.held_out, limit=128) for domain in (python, sklearn)]
    blocks = packed(tokenizer, python.train)
    base = small_llama(tokenizer)
    size = sum(parameter.numel() for parameter in base.parameters())
    start = time.perf_counter()
    fit(base, base.parameters(), blocks, steps=600, rate=4e-3)
    base.eval()
    seconds = f"{time.perf_counter() - start:.0f}"

    columns = ("", "trained", "seconds", "standard library", "scikit-learn", "KiB")
    table = Table(*columns, title=f"perplexity on held-out files ({VOCABULARY} byte pairs)")
    table.add_row("base", f"{size:,}", seconds, *(f"{perplexity(base, part):.1f}" for part in held_out))
    other, prompt = packed(tokenizer, sklearn.train), "Parameters\n----------\n"
    texts = {"base": sample(base, tokenizer, prompt)}
    with tempfile.TemporaryDirectory() as folder:
        for name, (config, rate) in ADAPTERS.items():
            adapted = adapt(base, config, rate, other)
            figures = [f"{perplexity(adapted.model, part):.1f}" for part in held_out]
            kib = check(base, adapted, held_out[1][:2], Path(folder))
            table.add_row(name, f"{adapted.parameters:,}", f"{adapted.seconds:.0f}", *figures, f"{kib}")
            texts[name] = sample(adapted.model, tokenizer, prompt)
    console = Console()
    console.print(table)
    for name, text in texts.items():
        console.rule(name, align="left")
        console.print(text, markup=False, highlight=False)


if __name__ == "__main__":
    main()
