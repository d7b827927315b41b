"""A file of text that is larger than memory is read in parts, and has the tokens that it has as a whole."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from adapterkit.training.language import rows as rows_module
from adapterkit.training.language.conversations import Rendered
from adapterkit.training.language.corpus import read_source, rendered
from adapterkit.training.language.encoded import Counts, Tokens, blocks, fitted, put
from adapterkit.training.language.lengths import Fitting
from adapterkit.training.language.rows import rows_in
from adapterkit.training.language.shelf import Shelf
from adapterkit.training.language.tokens import Encoder
from adapterkit.training.text_files import parts_of


def written(length: int) -> str:
    draw = random.Random(length)
    words = ["".join(draw.choices("aeinorst", k=draw.randint(1, 9))) for _ in range(60)] + ["don't", "12345", "é", "😀"]
    marks = [" ", " ", " ", "  ", ", ", ".\n", "\n\n", "\n\n\n  ", "\t", " (", ") ", "-"]
    return "".join(draw.choice(words) + draw.choice(marks) for _ in range(length))


def byte_level() -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator([written(3000)], trainers.BpeTrainer(vocab_size=500, special_tokens=["<s>", "</s>"]))
    return made


def one_word() -> Tokenizer:
    """As of Llama 2: the whole text is a word, with a space in front."""
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>", "<unk>"], max_token_length=8)
    made.train_from_iterator([line + "\n" for line in written(2000).split("\n")], trainer)
    return made


def pieces() -> Tokenizer:
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=["<s>", "</s>", "<unk>"], unk_token="<unk>")
    made.train_from_iterator([written(2000)], trainer)
    return made


TOKENIZERS = {"byte level": byte_level, "one word": one_word, "pieces": pieces}


def tokens_of(path: Path, tokenizer: Any) -> Tokens:
    texts: list[tuple[int, Rendered]] = list(rendered(read_source(path, {}), None, ""))
    shelf = Shelf.temporary(path)
    counts = put([(row, text, text.whole) for row, text in texts], Encoder(tokenizer), shelf)
    return Tokens(shelf.finish(), Counts(**counts))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_parts_have_the_tokens_of_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    made = PreTrainedTokenizerFast(tokenizer_object=TOKENIZERS[name](), bos_token="<s>", eos_token="</s>")
    (tmp_path / "a.txt").write_text(written(900), encoding="utf-8", newline="")
    (tmp_path / "b.txt").write_text("short", encoding="utf-8")
    whole = tokens_of(tmp_path, made)
    monkeypatch.setattr(rows_module, "_LONG", 300)
    monkeypatch.setattr(rows_module, "_BESIDE", 60)
    assert len(list(rows_in(tmp_path / "a.txt"))) > 10
    parts = tokens_of(tmp_path, made)
    assert parts.counts == whole.counts
    assert parts.counts.examples == read_source(tmp_path, {}).rows == len(parts) == 2
    for place in range(2):
        one, other = whole.example(place), parts.example(place)
        assert torch.equal(one.tokens, other.tokens)
        assert torch.equal(one.learnt, other.learnt)
    assert parts.shelf.tags.tolist() == whole.shelf.tags.tolist() == [1, 3]
    assert parts.example(0).tokens[-1] == made.eos_token_id
    assert fitted(parts, None, Fitting(16)).spans.tolist() == fitted(whole, None, Fitting(16)).spans.tolist()
    assert blocks(parts, 16).spans.tolist() == blocks(whole, 16).spans.tolist()


@pytest.mark.parametrize("text", [written(200), "x" * 1000, "a\r\nb" * 200, "", "\ufeffone", "one\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_parts_are_the_text(tmp_path: Path, text: str, encoding: str):
    path = tmp_path / "a.txt"
    path.write_text(text, encoding=encoding, newline="")
    parts = list(parts_of(path, 100))
    assert "".join(parts) == text.replace("\r\n", "\n").replace("\ufeff", "")
    assert all(0 < len(part) < 300 for part in parts)


def test_no_part_is_so_short_that_its_neighbours_do_not_know_what_is_beside_them(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_text("a " * 49 + "b\n" + "\n" + "c" * 350, encoding="utf-8")
    parts = list(parts_of(path, 100))
    assert all(len(part) >= 50 for part in parts[:-1])
