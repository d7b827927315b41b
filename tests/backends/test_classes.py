"""The classes that the built-in families map: each is named in one place, and that place decides."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path

import adapterkit
from adapterkit.plugins import classes
from adapterkit.plugins.builtin import adapterkit_register_backends

PACKAGE = Path(adapterkit.__file__).parent
LAYOUTS = (
    classes.LANGUAGE,
    classes.SEQ2SEQ,
    classes.STATE_SPACE,
    classes.EXPERTS,
    classes.VISION,
    classes.SIGLIP_TEXT,
)

ADDED = """
from adapterkit.plugins import classes

classes.LANGUAGE["llama"] += ("MadeUpPreTrainedModel",)  # the one edit

from torch import nn
import adapterkit as ak

class MadeUpPreTrainedModel(nn.Module):
    __module__ = "transformers.models.made_up"
    config = None

    def __init__(self):
        super().__init__()
        block = nn.Module()
        block.self_attn = nn.Module()
        block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj = (nn.Linear(4, 4) for _ in range(3))
        block.self_attn.head_dim = 2
        self.layers = nn.ModuleList([block])

print(*ak.points(MadeUpPreTrainedModel(), "attn.*").ids)
"""


def test_another_class_is_one_edit() -> None:
    done = subprocess.run([sys.executable, "-c", ADDED], capture_output=True, text=True, check=False)
    expected = ["attn.k@language.0", "attn.kv@language.0", "attn.q@language.0", "attn.v@language.0"]
    assert sorted(done.stdout.split()) == expected, done.stderr


def test_no_class_is_named_twice() -> None:
    named: Counter[str] = Counter()
    for file in PACKAGE.rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        named.update(
            node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and type(node.value) is str
        )
    ours = [name for layouts in LAYOUTS for names in layouts.values() for name in names]
    assert {name: named[name] for name in ours} == dict.fromkeys(ours, 1)


def test_every_listed_class_is_registered() -> None:
    registered = {model for spec in adapterkit_register_backends() for model in spec.models}
    ours = {f"transformers:{name}" for layouts in LAYOUTS for names in layouts.values() for name in names}
    assert ours <= registered
