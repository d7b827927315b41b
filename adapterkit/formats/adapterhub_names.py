"""How AdapterHub calls the places of a model: its module paths, by family, beside our roles.

A family is data: where the blocks lie, and what each role is called inside a block. The paths are those of
transformers 4, which the tool is bound to; a place is found again by role and block, whatever its path is today.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from adapterkit.points import InjectionPoint, Points, WeightPoint

FUSED = "attn.qkv"
"""One layer that makes queries, keys and values, which are points of their own here."""
FUSED_PARTS = ("attn.q", "attn.k", "attn.v")
HIDDEN = "hidden"


@dataclass(frozen=True)
class Stack:
    """Blocks of one kind, one after the other.

    Attributes:
        path: Of the list of blocks, below the base model.
        names: Role -> path below a block; several where releases or sizes differ, the first is written.
        site: What stands in front of a block's number in our sites; "" where there is one stack.
        prefix: The tool's word for the prefixes of these blocks' own attention.
    """

    path: str
    names: Mapping[str, tuple[str, ...]]
    site: str = ""
    prefix: str = "self_prefix"

    def role(self, rest: str, roles: Iterable[str]) -> str | None:
        """Which of these roles a path below a block is."""
        return next((role for role in roles if rest in self.names.get(role, ())), None)


@dataclass(frozen=True)
class Family:
    """A family of models that the tool knows.

    Attributes:
        base: Name of the base model inside one with a head.
        stacks: Its blocks; those of an encoder are counted before those of a decoder.
        swapped: Whether the tool takes the feed-forward's last layer for its first, and the first for its last.
        invertible: Path, below the base model, of the part that has the embeddings.
        embeds: Whether the points of its embedded sequence are where the tool acts.
        relative: Whether its attention adds a bias of relative positions, in which the tool counts prefixes.
        hooked: Whether the tool knows its modules by hooks alone, and so reaches its head.
        prompts: Whether the tool puts prompts in front.
        inverts: Whether it transforms the embedded sequence.
    """

    base: str
    stacks: tuple[Stack, ...]
    swapped: bool = False
    invertible: str = ""
    embeds: bool = True
    relative: bool = False
    hooked: bool = False
    prompts: bool = False
    inverts: bool = True

    @property
    def intermediate(self) -> str:
        """The role that the tool calls the intermediate projection."""
        return "mlp.down" if self.swapped else "mlp.up"

    @property
    def output(self) -> str:
        """The role that the tool calls the output projection."""
        return "mlp.up" if self.swapped else "mlp.down"


def _names(**paths: str) -> Mapping[str, tuple[str, ...]]:
    """Roles by Python names (`attn_q` is attn.q), each with paths that are separated by blanks."""
    return MappingProxyType({role.replace("_", "."): tuple(text.split()) for role, text in paths.items()})


def _attention(where: str, query: str, key: str, value: str, role: str = "attn") -> dict[str, str]:
    parts = {"q": query, "k": key, "v": value}
    return {f"{role}_kv": where, **{f"{role}_{part}": f"{where}.{name}" for part, name in parts.items()}}


_APART = {"attn": "attention_adapters", "mlp": "output_adapters", "cross": "cross_attention_adapters"}
_WORDS = ("query", "key", "value")
_PROJECTIONS = ("q_proj", "k_proj", "v_proj")

_BERT = _names(
    attn="attention.output",
    mlp="output",
    mlp_up="intermediate.dense",
    mlp_down="output.dense",
    **_attention("attention.self", *_WORDS),
    **_attention("crossattention.self", *_WORDS, role="cross"),
)
_DEBERTA = _names(
    attn="attention.output",
    mlp="output",
    mlp_up="intermediate.dense",
    mlp_down="output.dense",
    **_attention("attention.self", "query_proj", "key_proj", "value_proj"),
)
_LLAMA = _names(**_APART, mlp_up="mlp.up_proj", mlp_down="mlp.down_proj", **_attention("self_attn", *_PROJECTIONS))
_BART = _names(
    **_APART,
    mlp_up="fc1",
    mlp_down="fc2",
    **_attention("self_attn", *_PROJECTIONS),
    **_attention("encoder_attn", *_PROJECTIONS, role="cross"),
)
_VIT = {
    "attn": "attention_adapters",
    "mlp_up": "intermediate.dense",
    "mlp_down": "output.dense",
    **_attention("attention.attention", *_WORDS),
}
_T5 = {"mlp_up": "DenseReluDense.wi DenseReluDense.wi_1", "mlp_down": "DenseReluDense.wo"}


def _t5(feed_forward: int, **others: str) -> Mapping[str, tuple[str, ...]]:
    below = f"layer.{feed_forward}"
    inner = {role: " ".join(f"{below}.{path}" for path in paths.split()) for role, paths in _T5.items()}
    return _names(attn="layer.0", mlp=below, **inner, **_attention("layer.0.SelfAttention", "q", "k", "v"), **others)


def _seq2seq(encoder: str, decoder: str, names: tuple[Mapping[str, tuple[str, ...]], ...]) -> tuple[Stack, ...]:
    return (Stack(encoder, names[0], "encoder", "encoder_prefix"), Stack(decoder, names[-1], "decoder"))


_T5_STACKS = _seq2seq(
    "encoder.block",
    "decoder.block",
    (_t5(1), _t5(2, cross="layer.1", **_attention("layer.1.EncDecAttention", "q", "k", "v", role="cross"))),
)
_BART_STACKS = _seq2seq("encoder.layers", "decoder.layers", (_BART,))
_LAYERS = Stack("layers", _LLAMA)
_BERT_STACKS = (Stack("encoder.layer", _BERT),)

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        **{name: Family(name, _BERT_STACKS, prompts=True) for name in ("bert", "roberta", "electra")},
        "xlm-roberta": Family("roberta", _BERT_STACKS, prompts=True),
        "bert-generation": Family("bert", _BERT_STACKS, prompts=True),
        "deberta-v2": Family("deberta", (Stack("encoder.layer", _DEBERTA),), embeds=False, prompts=True),
        "distilbert": Family(
            "distilbert",
            (
                Stack(
                    "transformer.layer",
                    _names(
                        **_APART,
                        mlp_up="ffn.lin1",
                        mlp_down="ffn.lin2",
                        **_attention("attention", "q_lin", "k_lin", "v_lin"),
                    ),
                    prefix="self",
                ),
            ),
            prompts=True,
        ),
        "gpt2": Family(
            "transformer",
            (
                Stack(
                    "h",
                    _names(**_APART, attn_qkv="attn.c_attn", attn_kv="attn", mlp_up="mlp.c_fc", mlp_down="mlp.c_proj"),
                ),
            ),
        ),
        "gptj": Family(
            "transformer",
            (
                Stack(
                    "h",
                    _names(**_APART, mlp_up="mlp.fc_in", mlp_down="mlp.fc_out", **_attention("attn", *_PROJECTIONS)),
                ),
            ),
        ),
        **{name: Family("model", (_LAYERS,), swapped=True) for name in ("llama", "mistral")},
        **{name: Family("model", (_LAYERS,), hooked=True) for name in ("qwen2", "qwen3")},
        **{name: Family("transformer", _T5_STACKS, invertible="encoder", relative=True) for name in ("t5", "mt5")},
        # Its transform acts behind the norm of the embedded sequence (Whisper's behind the last), where no point is.
        **{
            name: Family("model", _BART_STACKS, invertible="encoder", embeds=False)
            for name in ("bart", "mbart", "plbart", "whisper")
        },
        "vit": Family(
            "vit", (Stack("encoder.layer", _names(**_VIT, mlp="output.output_adapters")),), prompts=True, inverts=False
        ),
        # What Beit scales behind a sublayer, before the tool's bottlenecks, is no part of our points.
        "beit": Family("beit", (Stack("encoder.layer", _names(**{**_VIT, "attn": ""})),), prompts=True, inverts=False),
    }
)
"""The tool's model types, and what each calls its places. Of the rest nothing is read or written."""


@dataclass(frozen=True)
class Block:
    """A block: its stack, its number there, and its number in the whole model, which is the tool's layer id."""

    stack: Stack
    number: int
    layer: int

    @property
    def site(self) -> str:
        """The block in our words: `3`, `decoder.3`."""
        return f"{self.stack.site}.{self.number}" if self.stack.site else str(self.number)


class Places:
    """The blocks of a model with what lies in them.

    Args:
        family: How the tool calls them.
        points: Those of the model. Where there is no model, the blocks are those that the file's paths name, and ids
            are made from role and site.
        paths: Those of the file.
    """

    def __init__(self, family: Family, points: Points, paths: Iterable[str] = ()) -> None:
        self.family, self.points = family, points
        self._by_place = {(point.role, point.site): point for point in reversed(points)}
        self._by_path = {point.path: point for point in points if isinstance(point, WeightPoint) and point.span is None}
        stacks = [rf"(?P<s{i}>{re.escape(stack.path)})" for i, stack in enumerate(family.stacks)]
        self._inside = re.compile(rf"(?:\w+\.){{0,2}}?(?:{'|'.join(stacks)})\.(?P<number>\d{{1,4}})(?:\.(?P<rest>.+))?")
        named = self._named(paths)
        self.blocks: list[Block] = []
        for stack in family.stacks:
            count = self._count(stack) or self._named(self._by_path).get(stack.path, 0) if points else named[stack.path]
            self.blocks += [Block(stack, number, len(self.blocks) + number) for number in range(count)]

    def _count(self, stack: Stack) -> int:
        """How many blocks of a stack the model has."""
        numbers = itertools.count()
        return next(i for i in numbers if (HIDDEN, Block(stack, i, 0).site) not in self._by_place)

    def _named(self, paths: Iterable[str]) -> dict[str, int]:
        """How many the paths name."""
        counts = dict.fromkeys((stack.path for stack in self.family.stacks), 0)
        for stack, number, _ in filter(None, map(self._found, paths)):
            counts[stack.path] = max(counts[stack.path], number + 1)
        return counts

    def _found(self, path: str) -> tuple[Stack, int, str] | None:
        found = self._inside.fullmatch(path)
        if found is None:
            return None
        place = next(i for i in range(len(self.family.stacks)) if found[f"s{i}"] is not None)
        return self.family.stacks[place], int(found["number"]), found["rest"] or ""

    def place(self, path: str) -> tuple[Block, str] | None:
        """The block that a path of the file leads into, and the rest of the path; None where it is in none."""
        found = self._found(path)
        if found is None:
            return None
        stack, number, rest = found
        block = next((one for one in self.blocks if one.stack is stack and one.number == number), None)
        return None if block is None else (block, rest)

    def point(self, role: str, block: Block) -> InjectionPoint | None:
        """The point of a role in a block; None where the model has none, or there is no model.

        That of a weight in a model of no family of ours is found by the tool's path.
        """
        if found := self._by_place.get((role, block.site)):
            return found
        paths = [f"{block.stack.path}.{block.number}.{name}" for name in block.stack.names.get(role, ())]
        whole = [f"{base}{path}" for path in paths for base in ("", f"{self.family.base}.")]
        return next((self._by_path[path] for path in whole if path in self._by_path), None)

    def id(self, role: str, block: Block) -> str | None:
        """The point's id, one that says the same where there is no model, or None where the model has no such point."""
        point = self.point(role, block)
        return point.id if point else None if self.points else f"{role}@{block.site}"

    def outside(self, role: str, site: str = "") -> InjectionPoint | None:
        """The point of a role outside of all blocks."""
        return self._by_place.get((role, site))

    def each(self, role: str, leave_out: Sequence[int] = ()) -> Iterator[tuple[Block, str]]:
        """The blocks in which a role is, but for those that are left out, each with the point's id."""
        for block in self.blocks:
            if block.layer not in leave_out and (key := self.id(role, block)):
                yield block, key
