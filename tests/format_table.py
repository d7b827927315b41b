"""`python -m tests.format_table` writes plugins/FORMATS.md: which format can say which adapter type, and why not.

Every type is saved in every format and read back, so the table says what the code does.
"""

from __future__ import annotations

from adapterkit.torchvision_ops import ensure_torchvision_ops

ensure_torchvision_ops()

import re  # noqa: E402 - only after the lines above
import sys  # noqa: E402
import tempfile  # noqa: E402
import warnings  # noqa: E402
from collections.abc import Mapping, Sequence  # noqa: E402
from pathlib import Path  # noqa: E402
from types import SimpleNamespace  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402

import adapterkit as ak  # noqa: E402
from adapterkit.errors import AdapterKitError, CheckpointError  # noqa: E402
from tests.formats.test_fixtures import UNREADABLE  # noqa: E402

PATH = Path(__file__).parents[1] / "plugins" / "FORMATS.md"
FORMATS = ("native", "peft", "adapterhub", "diffusers", "kohya", "lycoris", "comfy")
_PLUGINS = ("conditioning", "fourierft", "gating", "ia3", "lycoris", "peft-types", "textual-inversion", "vera")
PROVIDERS = frozenset(["adapterkit", *(f"adapterkit-{name}" for name in _PLUGINS)])
"""The distributions whose types have a row: what else is installed must not change the table."""
_NEED_OTHERS = ("union", "fuse", "tied")
"""Types that act as others do."""

VARIANTS: Mapping[str, Sequence[Mapping[str, Any]]] = {
    "boft": [{"block": 2}, {"block": 2, "side": "input"}],
    "dora": [{"targets": "attn.{q,k,v}", "scale_bias": True, "plain_norm": True}],
    "ia3": [{"scale_input": None}],
    "invertible": [{"targets": "tokens"}],
    "lora": [{"targets": "attn.{q,k,v}"}],
    "reft": [{"prefix": 1, "suffix": 1}],
    "input_oft": [{"block": 2}],
    "lily": [{"over": "batch"}],
    "llama_adapter": [{"gate": "layer", "padded": True}],
    "miss": [{"rank": 2}],
    "prefix": [{"counted": True, "padded": True}, {"counted": True}],
    "prompt": [{"padded": True}],
    "psoft": [{"rank": 2}],
    "shira": [{"rank": 1}],
    "supertuning": [{"sparsity": 0.5}],
    "vblora": [{"length": 4}],
}
"""Other fields, where the default does not fit a tiny model, or a format says another one alone."""

_HEAD = """\
# Formats

Which format can say which adapter type, with each type's default config, or with the fields that are named. Generated
by saving and reading back: `python -m tests.format_table`.

- **yes**: what is written is read back as the same type. **as x**: it is read back as another type of the same effect.
- **–**: it cannot be said; the number is that of the reason below. `save` raises it as an error.
- With `approximate=True` what adds to a weight is written as the nearest LoRA, and the error is told.
- `union` is written as what its members are. `fuse` is in files of `native` and `adapterhub` alone.
- `tied` is in files of `native`, and in those of `peft` (`ensure_weight_tying`) where it is LoRA or rows.
- `embeddings` of [adapterkit-textual-inversion](adapterkit-textual-inversion) holds `textual_inversion` alone.
- `native` holds every type, of any package. A type of yours is in other tools' files once it has a codec; see
  [HOOKS.md](HOOKS.md).
"""


def table() -> str:
    """The whole page."""
    reasons: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        tried = _Tried(Path(folder), reasons)
        rows = {name: [tried.cell(name, format) for format in FORMATS] for name in types()}
    lines = [_row(["type", *FORMATS]), _row(["---"] * (1 + len(FORMATS)))]
    lines += [_row([f"`{name}`", *cells]) for name, cells in rows.items()]
    why = [f"{number}. {reason}" for reason, number in reasons.items()]
    codecs = [_row(["codec", "dialect", "what it reads"]), _row(["---"] * 3), *map(_row, _codecs())]
    known = [f"- `{name}`: {reason}" for name, reason in UNREADABLE.items()]
    return "\n".join(
        [
            _HEAD, *lines, "", "## Why not", "", *why, "", "## Codecs", "",
            "What is read, module by module. `peft` and `diffusers` share a dialect, and so do the formats of the UIs.",
            "", *codecs, "", "## Files of other tools that do not give what the tool computed", "",
            "Of 261 that the tools' own code has made, these; all others do, to 1e-5 of the largest output.", "",
            *known, "",
        ]
    )  # fmt: skip


def types() -> list[str]:
    """Those that have a row."""
    specs = ak.get_plugin_manager().adapters().items()
    own = [name for name, spec in specs if spec.origin and spec.origin.distribution in PROVIDERS]
    return sorted(name for name in own if name not in _NEED_OTHERS)


def _codecs() -> list[list[str]]:
    specs = ak.get_plugin_manager().codecs().values()
    own = [spec for spec in specs if spec.origin and spec.origin.distribution in PROVIDERS]
    return sorted([f"`{spec.name}`", f"`{spec.dialect}`", spec.summary] for spec in own)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _language_model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(
        LlamaConfig(**sizes, vocab_size=24, num_key_value_heads=2, tie_word_embeddings=False)
    ).eval()


def _encoder() -> Any:
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return BertModel(BertConfig(**sizes, vocab_size=24)).eval()


def _pipeline() -> Any:
    from tests.formats import pipelines

    return SimpleNamespace(components={"unet": pipelines.unet(), "text_encoder": pipelines.clip(8)})


class _Tried:
    """Saves and reads back."""

    def __init__(self, folder: Path, reasons: dict[str, int]) -> None:
        self._folder, self._reasons = folder, reasons
        language, encoder, pipeline = _language_model(), _encoder(), _pipeline()
        self._models = {
            **{name: [pipeline] for name in FORMATS},
            **{name: [language, pipeline] for name in ("native", "peft")},
            "adapterhub": [language, encoder],
        }

    def cell(self, name: str, format: str) -> str:
        """What the table says."""
        spec = ak.get_plugin_manager().adapters()[name]
        errors: list[AdapterKitError] = []
        for fields in [{}, *VARIANTS.get(name, ())]:
            for model in self._models[format]:
                try:
                    back = self._there_and_back(model, spec.load()(**fields), format)
                except AdapterKitError as error:
                    errors.append(error)
                    continue
                told = "yes" if back == name else f"as {back}"
                return f"{told}, {_fields(fields)}" if fields and self._says(errors) else told
        refused = [error for error in errors if isinstance(error, CheckpointError)]
        return f"– ({self._number(_reason(refused[0] if refused else None, name))})"

    @staticmethod
    def _says(errors: Sequence[AdapterKitError]) -> bool:
        """Whether the format has refused the default, and not the tiny model."""
        return any(isinstance(error, CheckpointError) for error in errors)

    def _there_and_back(self, model: Any, config: ak.AdapterConfig, format: str) -> str:
        adapters = ak.Adapters(model)
        try:
            adapters.add("it", config)
            for parameter in adapters.parameters("it"):
                torch.nn.init.normal_(parameter, std=0.1)
            path = adapters.save("it", self._folder / "it", format=format)
            return adapters.load(path, "back").type
        finally:
            adapters.detach()
            _remove(self._folder / "it")

    def _number(self, reason: str) -> int:
        return self._reasons.setdefault(reason, len(self._reasons) + 1)


def _fields(fields: Mapping[str, Any]) -> str:
    return f"`{', '.join(f'{name}={value}' for name, value in fields.items())}`"


def _reason(error: CheckpointError | None, name: str) -> str:
    if error is None:
        return "there is no such place in the models that such files are for"
    text = str(error)
    if "cannot say" in text:
        return "there is no codec of its dialect for the type"
    if "belong to no module" in text:
        return "it acts at no module's weights, and the format names nothing else"
    if "has no method for" in text:
        return "the tool has no such method"
    told = text.removeprefix(f"{error.path}: ").removeprefix(f"{error.key!r}: ")
    return f"`{name}`: {re.split(r'; (?:native|lycoris)', told)[0]}"


def _remove(path: Path) -> None:
    if path.is_dir():
        for one in path.iterdir():
            _remove(one)
        path.rmdir()
    elif path.exists():
        path.unlink()


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    PATH.write_text(table(), encoding="utf-8")
