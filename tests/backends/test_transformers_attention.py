"""The seam alone: what it shows a module, what it asks of the extension, what it calls, and what it leaves behind."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention
from transformers.models.llama.modeling_llama import LlamaAttention

import adapterkit as ak
from adapterkit.backend import SITE
from adapterkit.backends.transformers_attention import ConfigView, TransformersAttentionSeam
from adapterkit.errors import AttachError, IncompatibleTargetError
from tests.backends.language_models import adapted, build, output, padded, tokens

PREFIX = ak.Prefix(length=3, init_std=1.0)
SEAM = TransformersAttentionSeam()


class Recorder:
    """An extension that notes what it is asked, and puts one position in front when told to."""

    counted = False

    def __init__(self, extends: bool = True) -> None:
        self.extends = extends
        self.asked: dict[str, Any] = {}

    def extend(self, keys: Tensor, values: Tensor, mask: Tensor | None, **asked: Any) -> tuple[Any, Any, Any]:
        self.asked = {"mask": mask, **asked}
        if not self.extends:
            return keys, values, mask
        return torch.cat([keys[:, :, :1], keys], 2), torch.cat([values[:, :, :1], values], 2), mask

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, output: Tensor, **asked: Any) -> Tensor:
        return output


def installed(attention: str = "sdpa", extends: bool = True) -> tuple[Any, Recorder]:
    """An attention module with the seam in it and a recorder behind."""
    module = build("Llama", attention=attention).model.layers[0].self_attn
    SEAM.install(module)
    recorder = module.__dict__[SITE] = Recorder(extends)
    return module, recorder


def attend(module: Any, queries: int, length: int, mask: Tensor | None = None, **options: Any) -> Tensor:
    """Calls the function that the module would find by its config's name."""
    query, key = torch.randn(1, 4, queries, 12), torch.randn(1, 2, length, 12)
    function = AttentionInterface()[module.config._attn_implementation]
    return function(module, query, key, key, mask, **options)[0]


# --- the view of the config ------------------------------------------------------------------------------------------


def test_the_view_differs_in_one_name_and_writes_through() -> None:
    model = build("Llama")
    module, config = model.model.layers[0].self_attn, model.config
    before = config.to_dict()
    assert SEAM.install(module) is config
    view = module.config
    assert view._attn_implementation == "adapterkit"
    assert config._attn_implementation == "sdpa"
    assert config.to_dict() == before
    assert view.head_dim == 12
    assert getattr(view, "nothing", None) is None
    config.rms_norm_eps = 0.5
    assert view.rms_norm_eps == 0.5
    view.rms_norm_eps = 0.25
    assert config.rms_norm_eps == 0.25
    SEAM.remove(module, config)
    assert module.config is config


def test_other_models_with_the_same_config_see_nothing() -> None:
    model, _ = adapted("Llama", PREFIX)
    twin = type(model)(model.config).to(torch.float64).eval()
    assert twin.model.layers[0].self_attn.config._attn_implementation == "sdpa"
    assert model.model.config is model.config
    assert model.config._attn_implementation == "sdpa"


def test_a_saved_config_is_the_bases(tmp_path: Path) -> None:
    build("Llama").config.save_pretrained(tmp_path / "base")
    adapted("Llama", PREFIX)[0].config.save_pretrained(tmp_path / "adapted")
    texts = [(tmp_path / name / "config.json").read_text() for name in ("base", "adapted")]
    assert json.loads(texts[0]) == json.loads(texts[1])
    assert "adapterkit" not in texts[1]


def test_the_implementation_may_change_while_a_prefix_acts() -> None:
    model, adapters = adapted("Llama", PREFIX)
    inputs = padded("right")
    real = inputs["attention_mask"].bool()
    by_sdpa = output(model, **inputs)[real]
    model.set_attn_implementation("eager")
    torch.testing.assert_close(output(model, **inputs)[real], by_sdpa, rtol=1e-5, atol=1e-5)
    with adapters.disabled():
        assert torch.equal(output(model, **inputs), output(build("Llama", attention="eager"), **inputs))
    adapters.detach()
    assert model.model.layers[0].self_attn.config._attn_implementation == "eager"


# --- what is asked and what is called ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attention", "queries", "options", "causal"),
    [
        ("sdpa", 5, {}, True),  # the module's own flag
        ("sdpa", 5, {"is_causal": False}, False),  # what the caller says outweighs it
        ("sdpa", 5, {"is_causal": True}, True),
        ("sdpa", 1, {}, False),  # one query sees the whole cache
        ("eager", 5, {}, False),  # eager attention never guesses
    ],
)
def test_a_missing_mask_means_what_it_means_to_the_original(
    attention: str, queries: int, options: dict[str, Any], causal: bool
) -> None:
    module, recorder = installed(attention)
    attend(module, queries, 7, scaling=1.0, **options)
    assert recorder.asked == {"mask": None, "queries": queries, "causal": causal}


@pytest.mark.parametrize("extends", [True, False])
def test_whoever_makes_the_mask_is_the_only_one_to_say_causal(monkeypatch: pytest.MonkeyPatch, extends: bool) -> None:
    module, _ = installed(extends=extends)
    called: dict[str, Any] = {}
    monkeypatch.setitem(
        AttentionInterface._global_mapping, "sdpa", lambda *args, **options: called.update(options) or (args[1].mT,)
    )
    attend(module, 5, 7, is_causal=True, scaling=1.0)
    assert called == {"is_causal": not extends, "scaling": 1.0}


def test_a_given_mask_is_never_called_causal() -> None:
    module, recorder = installed()
    mask = torch.ones(1, 1, 5, 8, dtype=torch.bool)
    attend(module, 5, 7, mask)
    assert recorder.asked["causal"] is False
    assert recorder.asked["mask"] is mask


def test_a_paged_cache_is_refused_only_while_something_acts() -> None:
    with pytest.raises(IncompatibleTargetError, match="a paged cache"):
        attend(installed()[0], 5, 7, cache=object())
    attend(installed(extends=False)[0], 5, 7, cache=object())


@pytest.mark.parametrize("extends", [True, False])
def test_a_bias_on_positions_is_widened_by_nothing_for_those_in_front(
    monkeypatch: pytest.MonkeyPatch, extends: bool
) -> None:
    module, _ = installed(extends=extends)
    called: dict[str, Any] = {}
    monkeypatch.setitem(
        AttentionInterface._global_mapping, "sdpa", lambda *args, **options: called.update(options) or (args[1].mT,)
    )
    bias = torch.randn(1, 4, 5, 7)
    attend(module, 5, 7, position_bias=bias)
    assert torch.equal(called["position_bias"][..., 1:] if extends else called["position_bias"], bias)
    assert not extends or not called["position_bias"][..., 0].any()


def test_an_implementation_set_later_is_refused_when_it_is_called() -> None:
    module, _ = installed()
    module.config._config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(IncompatibleTargetError, match=r"'flash_attention_2'.*'sdpa' and 'eager'"):
        attend(module, 5, 7)


def test_a_mask_of_more_keys_than_queries_is_right_when_none_is_given() -> None:
    """As in the prefill of a static cache: sdpa itself looks at the first keys only."""
    model, _ = adapted("Llama", PREFIX)
    module: Any = model.model.layers[0].self_attn
    query, key, value = torch.randn(1, 4, 5, 12), torch.randn(1, 2, 9, 12), torch.randn(1, 2, 9, 12)
    function = AttentionInterface()[module.config._attn_implementation]
    whole = function(module, query, key, value, None, scaling=0.3)[0]
    part = function(module, query, key[:, :, :5], value[:, :, :5], None, scaling=0.3)[0]
    torch.testing.assert_close(whole, part)


def test_the_attention_weights_of_eager_count_the_prefix() -> None:
    model, _ = adapted("Llama", PREFIX, attention="eager")
    weights = model(tokens(), output_attentions=True).attentions[0]
    assert weights.shape == (2, 4, 7, 10)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 7, dtype=weights.dtype))
    assert weights[:, :, :, 3:].triu(1).abs().max() == 0


def test_gpt2_still_takes_its_upcast_path(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    path = GPT2Attention._upcast_and_reordered_attn

    def counted(self: GPT2Attention, query: Tensor, key: Tensor, *rest: Any) -> Any:
        taken.append(key.shape[2])
        return path(self, query, key, *rest)

    monkeypatch.setattr(GPT2Attention, "_upcast_and_reordered_attn", counted)
    upcast: dict[str, Any] = {"attention": "eager", "reorder_and_upcast_attn": True, "dtype": torch.float32}
    base = output(build("GPT2", **upcast), tokens())
    model, adapters = adapted("GPT2", PREFIX, **upcast)
    with adapters.disabled():
        assert torch.equal(output(model, tokens()), base)
    extended = output(model, tokens())
    assert taken == [7, 7, 7, 7, 10, 10]
    expected = output(adapted("GPT2", PREFIX, dtype=torch.float32)[0], tokens())
    torch.testing.assert_close(extended, expected, rtol=1e-4, atol=1e-4)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["flash_attention_2", "flex_attention", "paged|sdpa"])
def test_unreachable_implementations_are_refused_before_anything_changes(name: str) -> None:
    model = build("Llama")
    model.config._attn_implementation_internal = name
    with pytest.raises(AttachError, match="supported are 'sdpa' and 'eager'"):
        ak.Adapters(model).add("a", PREFIX)
    assert all(module.__dict__.get("config", model.config) is model.config for module in model.modules())
    assert all("adapterkit" not in key for key in model.state_dict())


def test_modules_that_never_ask_the_interface_are_refused() -> None:
    stranger = nn.MultiheadAttention(4, 2)
    assert "does not call transformers' attention interface" in str(SEAM.refusal(stranger))
    stranger.config = SimpleNamespace(_attn_implementation="sdpa")  # type: ignore[assignment]
    assert "does not call transformers' attention interface" in str(SEAM.refusal(stranger))
    with pytest.raises(IncompatibleTargetError, match="MultiheadAttention"):
        SEAM.install(stranger)


def test_subclasses_from_other_files_are_reached() -> None:
    class Mine(LlamaAttention):
        pass

    module = Mine(build("Llama").config, 0)
    assert SEAM.refusal(module) is None
    SEAM.install(module)
    assert isinstance(module.config, ConfigView)


# --- copies ----------------------------------------------------------------------------------------------------------


def test_a_deep_copy_is_independent() -> None:
    model, adapters = adapted("Llama", PREFIX)
    expected = output(model, tokens())
    twin = copy.deepcopy(model)
    assert twin.model.layers[0].self_attn.config._config is twin.config
    assert twin.config is not model.config
    adapters.detach()
    assert torch.equal(output(twin, tokens()), expected)
    ak.Adapters(twin).detach()
    assert torch.equal(output(twin, tokens()), output(model, tokens()))
    assert twin.model.layers[0].self_attn.config is twin.config


def test_unpickling_registers_the_attention_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = adapted("Llama", PREFIX)
    expected, data = output(model, tokens()), pickle.dumps(model)
    monkeypatch.delitem(AttentionInterface._global_mapping, "adapterkit")
    assert torch.equal(output(pickle.loads(data), tokens()), expected)


@pytest.mark.slow
def test_a_fresh_process_unpickles_and_runs(tmp_path: Path) -> None:
    model, _ = adapted("Llama", PREFIX)
    (tmp_path / "model.pickle").write_bytes(pickle.dumps((model, tokens(), output(model, tokens()).detach())))
    code = (
        "import pickle, sys, torch\n"
        "from adapterkit.torchvision_ops import ensure_torchvision_ops\n"
        "ensure_torchvision_ops()\n"
        "model, ids, expected = pickle.load(open(sys.argv[1], 'rb'))\n"
        "assert torch.equal(model(ids).logits, expected)\n"
        "import adapterkit as ak\n"
        "ak.Adapters(model).detach()\n"
        "assert not torch.equal(model(ids).logits, expected)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "model.pickle")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(ak.__file__).parents[1])
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["Llama", "GPT2", "Bert"])
def test_dynamo_traces_a_prefix_without_a_break(layout: str) -> None:
    model, adapters = adapted(layout, PREFIX, dtype=torch.float32)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    inputs = padded("left")
    with torch.no_grad():
        torch.testing.assert_close(output(compiled, **inputs), output(model, **inputs))
        adapters.activate(None)
        torch.testing.assert_close(output(compiled, **inputs), output(model, **inputs))
