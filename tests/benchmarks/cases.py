"""What is measured. Each case asserts parity first, and returns its timings by name.

The limits, by which a figure should be read:

- A training step cannot be quicker than its *floor*, the frozen model's forward and its backward to the input:
  4 N i o multiplications and additions for a linear layer [o, i] and N tokens, since no weight needs a gradient. LoRA
  of rank r adds at least 6 N r (i + o): in a square layer, 3 r / i of the floor.
- Adding an adapter cannot be quicker than making its tensors; loading one, than reading its file.
- A switch need not touch a module. A merge reads and writes every adapted weight once, and multiplies the factors.
"""

from __future__ import annotations

import copy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import peft
import torch
from safetensors.torch import load_file

import adapterkit as ak
from tests.benchmarks import algebra, calls, rivals, routes, settings, ui_files
from tests.benchmarks.measure import Side, Timing, measure

Case = Callable[[int], Mapping[str, Timing]]

NAMES = [f"a{number}" for number in range(10)]


def train_step(rounds: int) -> Mapping[str, Timing]:
    """LoRA, rank 16 on all 42 linear layers of a Llama (hidden 384, 6 layers), 4 x 128 tokens, float32."""
    base = rivals.llama(hidden=384, layers=6)
    both, ids = rivals.pair(base, ["a"]), rivals.tokens(4, 128)
    rivals.require_parity(both, "a", ids)
    base.requires_grad_(False)
    embedded = base.get_input_embeddings()(ids).detach().requires_grad_(True)

    def floor(_: object) -> None:
        base(inputs_embeds=embedded, use_cache=False).logits.float().logsumexp(-1).sum().backward()

    def side(model: torch.nn.Module) -> Side:
        return Side(lambda _: rivals.step(model, ids), after=lambda _: rivals.clear(model))

    return measure({"floor": Side(floor), "adapterkit": side(both.ours), "peft": side(both.theirs)}, rounds)


def adding(rounds: int) -> Mapping[str, Timing]:
    """An adapter onto a Llama with 224 linear layers (hidden 64): the first, and the tenth beside nine others."""
    base = rivals.llama(hidden=64, layers=32)
    both = rivals.pair(base, NAMES[:9])
    rivals.require_parity(both, NAMES[0], rivals.tokens(1, 8))

    def first_of_theirs(model: torch.nn.Module) -> None:
        peft.get_peft_model(model, rivals.peft_config(), adapter_name="new")

    def fresh() -> torch.nn.Module:
        return copy.deepcopy(base)

    sides = {
        "adapterkit, first": Side(lambda model: ak.Adapters(model).add("new", rivals.CONFIG), prepare=fresh),
        "peft, first": Side(first_of_theirs, prepare=fresh),
        "adapterkit, tenth": Side(
            lambda _: both.adapters.add("new", rivals.CONFIG), after=lambda _: both.adapters.remove("new")
        ),
        "peft, tenth": Side(
            lambda _: both.theirs.add_adapter("new", rivals.peft_config()),
            after=lambda _: both.theirs.delete_adapter("new"),
        ),
    }
    return measure(sides, max(5, rounds // 2), warmup=1)


def switching(rounds: int) -> Mapping[str, Timing]:
    """Ten switches, once through ten adapters at 224 points. PEFT's moves requires_grad too, as train() does."""
    both, ids = rivals.pair(rivals.llama(hidden=64, layers=32), NAMES), rivals.tokens(1, 8)
    for name in NAMES[:3]:
        both.adapters.activate(name)
        both.theirs.set_adapter(name)
        with torch.no_grad():
            ours, theirs = (model(input_ids=ids).logits for model in both.models)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)

    def through(switch: Callable[[str], object]) -> Side:
        return Side(lambda _: [switch(name) for name in NAMES])

    def activate_and_train(name: str) -> None:
        both.adapters.activate(name)
        both.adapters.train(name)

    sides = {
        "adapterkit, activate alone": through(both.adapters.activate),
        "adapterkit": through(activate_and_train),
        "peft": through(both.theirs.set_adapter),
    }
    return measure(sides, rounds)


def loading(rounds: int) -> Mapping[str, Timing]:
    """A second adapter from disk onto 224 points (hidden 64); the floor reads the file and does nothing with it."""
    base = rivals.llama(hidden=64, layers=32)
    both, ids = rivals.pair(base, ["a", "b"]), rivals.tokens(1, 8)
    both.adapters.activate("b")
    both.theirs.set_adapter("b")
    with torch.no_grad():
        expected = both.ours(input_ids=ids).logits
    with tempfile.TemporaryDirectory() as folder:
        ours = both.adapters.save("b", Path(folder) / "ours.safetensors")
        both.theirs.save_pretrained(folder, selected_adapters=["b"])
        theirs = Path(folder) / "b"
        both.adapters.load(ours, "new")
        both.adapters.activate("new")
        both.theirs.load_adapter(str(theirs), "new")
        both.theirs.set_adapter("new")
        for model in both.models:
            with torch.no_grad():
                torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
        both.adapters.remove("new")
        both.theirs.delete_adapter("new")
        sides = {
            "floor": Side(lambda _: load_file(ours)),
            "adapterkit": Side(lambda _: both.adapters.load(ours, "new"), after=lambda _: both.adapters.remove("new")),
            "peft": Side(
                lambda _: both.theirs.load_adapter(str(theirs), "new"),
                after=lambda _: both.theirs.delete_adapter("new"),
            ),
        }
        return measure(sides, rounds, warmup=1)


def merging(rounds: int) -> Mapping[str, Timing]:
    """Rank 16 into 42 weights (hidden 384) and out again. adapterkit gives back the very bits; PEFT subtracts."""
    both, ids = rivals.pair(rivals.llama(hidden=384, layers=6), ["a"]), rivals.tokens(1, 32)
    rivals.require_parity(both, "a", ids)
    merge, unmerge = both.theirs.base_model.merge_adapter, both.theirs.base_model.unmerge_adapter
    with torch.no_grad():
        expected = both.ours(input_ids=ids).logits
        both.adapters.merge()
        merge()
        for model in both.models:
            torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
        both.adapters.unmerge()
        unmerge()
    sides = {
        "adapterkit, merge": Side(lambda _: both.adapters.merge(), after=lambda _: both.adapters.unmerge()),
        "peft, merge": Side(lambda _: merge(), after=lambda _: unmerge()),
        "adapterkit, unmerge": Side(lambda _: both.adapters.unmerge(), prepare=both.adapters.merge),
        "peft, unmerge": Side(lambda _: unmerge(), prepare=merge),
    }
    return measure(sides, rounds)


def importing(rounds: int) -> Mapping[str, Timing]:
    """Whole processes, whose CPU time is not counted here; the floor is an interpreter that does nothing."""
    code = {
        "floor": "pass",
        "import adapterkit": "import adapterkit",
        "adapterkit --help": "from adapterkit.cli.main import main; main(['--help'])",
        "import torch": "import torch",
    }

    def start(text: str) -> Side:
        return Side(lambda _: subprocess.run([sys.executable, "-c", text], check=True, capture_output=True))

    return measure({name: start(text) for name, text in code.items()}, max(5, rounds // 2), warmup=1)


CASES: Mapping[str, Case] = {
    "LoRA step": train_step,
    "add": adding,
    "switch": switching,
    "switch, many points": calls.switching_points,
    "decode": calls.decoding,
    "idle": calls.idling,
    "load": loading,
    "load many": settings.loading_many,
    "add settings": settings.adding_settings,
    "merge": merging,
    "import": importing,
    "route 8": routes.eight,
    "route 32": routes.thirty_two,
    "route in a pool": routes.pools,
    "recompress": algebra.recompressing,
    "combine": algebra.combining,
    "extract": algebra.extracting,
    "file of SD 1.5": ui_files.sd15,
    "file of SDXL": ui_files.sdxl,
    "file of Flux": ui_files.flux,
}
