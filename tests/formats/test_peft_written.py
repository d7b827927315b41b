"""What is written as a folder of PEFT is read by the installed PEFT with equal outputs, and read back as it was."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import adapterkit as ak
from adapterkit import errors
from adapterkit.testing import toys
from adapterkit.torchvision_ops import ensure_torchvision_ops
from tests.values import randomize

pytestmark = pytest.mark.filterwarnings(
    "ignore:Found missing adapter keys",
    "ignore:Could not find a config file",
    "ignore:.is_gradient_checkpointing",
    "ignore:.lora_bias",
    "ignore:LoRA adapter added to ConvNd",
    "ignore:Unsupported layer type",
)


class Net(nn.Module):
    """Every kind of layer that PEFT adapts, with names that are ends of others."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 8)
        self.inner = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8, bias=False))
        self.mha = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm, self.prenorm = nn.LayerNorm(8), nn.LayerNorm(8)
        self.conv, self.grouped = nn.Conv1d(8, 6, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1, groups=2)
        self.head, self.other = nn.Linear(4, 3), nn.ModuleDict({"head": nn.Linear(3, 3)})

    def forward(self, ids: Tensor) -> Tensor:
        x = self.prenorm(self.inner(self.embed(ids)))
        x = self.norm(self.mha(x, x, x, need_weights=False)[0]).mT
        x = self.grouped(self.conv(x)[..., None]).squeeze(-1).mT
        return self.other["head"](self.head(x))


IDS = torch.randint(11, (2, 5), generator=torch.Generator().manual_seed(0))


def read_by_peft(folder: Path, base: nn.Module, *inputs: Any) -> Tensor:
    ensure_torchvision_ops()
    peft = pytest.importorskip("peft")
    with torch.no_grad():
        return peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).eval()(*inputs)


def close(one: Tensor, other: Tensor) -> bool:
    return (one - other).abs().max().item() <= 2e-5 * other.abs().max().item()


def check(config: ak.AdapterConfig, path: Path, base: nn.Module | None = None) -> dict[str, Any]:
    """Writes an adapter of random values, and compares PEFT's outputs and those after reading; the written config."""
    base = Net().eval() if base is None else base
    adapters = ak.Adapters(copy.deepcopy(base))
    adapters.add("it", config)
    randomize(adapters, "it")
    adapters.activate("it")
    model: Any = next(iter(adapters._mapped.components.values())).root
    with torch.no_grad():
        wanted = model(IDS)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    adapters.save("it", path / "it", format="peft")
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert close(read_by_peft(path / "it", base, IDS), wanted)
    again = ak.Adapters(base_again := copy.deepcopy(base))
    again.load(path / "it")
    again.activate("it")
    with torch.no_grad():
        assert close(base_again(IDS), wanted)
    return json.loads((path / "it" / "adapter_config.json").read_text())


SAVED: dict[str, dict[str, Any]] = {
    "head@model.head": {},
    "norm@model.norm": {},
    "linear@model.inner.0": {"part": "bias"},
    "embed.tokens@model.embed": {"rows": [3, 7]},
}
GROUPED: dict[str, dict[str, Any]] = {"conv@model.grouped": {}}
INNER: dict[str, dict[str, Any]] = {"linear@model.inner.0": {}, "linear@model.inner.2": {}}

BIASES = ak.Trainable(part="bias", absolute=True, settings=INNER)


@pytest.mark.parametrize(
    "config",
    [
        ak.LoRA("linear conv embed.* head", rank=2, alpha=3.0),
        ak.LoRA("linear conv", rank=2, ranks={"conv": 3}, alphas={"conv": 5.0}, scaling="rank_stabilized"),
        ak.LoRA("attn.v", rank=2, alpha=1.0),
        ak.LoRA("attn.q attn.o", ranks={"attn.o": 3}, rank=2, alphas={"attn.o": 1.0}),
        ak.LoRA("linear", rank=2, init="pissa"),
        ak.LoRA(rank=2, across_groups=True, settings={"conv@model.conv": {}}),
        ak.DoRA(rank=2, settings={**INNER, "embed.tokens@model.embed": {}, "conv@model.conv": {}}),
        ak.AdaLoRA(rank=2, initial=4, alpha=3.0, settings=INNER),
        ak.Union((ak.LoRA(rank=2, settings=INNER), ak.Trainable("linear", part="bias"))),
        ak.Union(
            (ak.LoRA(rank=2, alpha=3.0, settings=INNER), ak.Trainable(part="bias", absolute=True, settings=INNER))
        ),
        ak.Union((ak.LoRA("conv", rank=2), ak.Trainable(settings=SAVED))),
        ak.Trainable("norm"),
        ak.Trainable("head"),
        ak.Trainable("embed.*", rows=(0, 5)),
        ak.Trainable("attn.q", part="weight"),
    ],
    ids=lambda config: f"{type(config).__name__}-{config.targets[:20]}",
)
def test_peft_reads_it(config: ak.AdapterConfig, tmp_path: Path) -> None:
    ensure_torchvision_ops()
    peft = pytest.importorskip("peft")
    written = check(config, tmp_path)
    known = peft.PEFT_TYPE_TO_CONFIG_MAPPING[written["peft_type"]].__dataclass_fields__
    assert {*written} <= {*known}


def test_a_layer_whose_name_is_the_end_of_anothers_is_meant_alone(tmp_path: Path) -> None:
    written = check(ak.LoRA("head", rank=2, settings={"head@model.head": {}}), tmp_path)
    assert written["target_modules"] == "head"  # a pattern for the whole path, and no end of one
    assert check(ak.Trainable(settings={"norm@model.norm": {}}), tmp_path)["peft_type"] == "LN_TUNING"
    biases = check(ak.Trainable("norm", part="bias"), tmp_path)
    assert (biases["peft_type"], biases["bias"]) == ("LORA", "all")  # a norm of LN_TUNING has both
    saved = check(ak.Trainable(settings={"norm@model.norm": {}, "head@model.head": {}}), tmp_path)
    assert saved["modules_to_save"] == ["head", "norm"]  # whose names end those of others, which are saved as they are


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (ak.Union((ak.LoRA("conv", rank=2), ak.AdaLoRA(rank=2, settings=INNER))), "one for all"),
        (ak.DoRA("attn.q", rank=2), "'mha': DoRA acts on a part of a fused projection"),
        (ak.DoRA("fused.attn attn.o", rank=2), "'mha': PEFT has no DoRA of torch's attentions"),
        (ak.AdaLoRA("attn.q", rank=1, initial=2), "'mha': AdaLoRA acts on a part of a fused projection"),
        (ak.LoRA(rank=2, across_groups=True, settings=GROUPED), "'grouped': every rank reaches all groups"),
        (ak.DoRA(rank=2, settings=GROUPED), "'grouped': DoRA of a grouped convolution"),
        (ak.DoRA(rank=2, over="outputs", settings=INNER), "'inner.0': PEFT's DoRA has norms over the inputs"),
        (ak.DoRA(rank=2, scale_bias=True, settings=INNER), "'inner.0': PEFT's DoRA scales no bias"),
        (ak.Union((ak.LoRA(rank=2, settings=INNER), ak.DoRA(rank=2, settings=INNER))), "has LoRA and DoRA"),
        (ak.Union((ak.DoRA(rank=2, settings=INNER), ak.LoRA(rank=2, settings=INNER))), "has LoRA and DoRA"),
        (ak.Union((ak.DoRA(rank=2, settings=INNER), ak.DoRA(rank=1, settings=INNER))), "'inner.0': has DoRA twice"),
        (ak.Union((ak.LoRA("embed.*", rank=2), ak.Trainable(part="bias", absolute=True, settings=INNER))), "bias"),
        (ak.Trainable(part="bias", absolute=True, settings=INNER), "'inner.2': has a bias .*and nothing else"),
        (ak.Union((ak.DoRA(rank=2, settings=INNER), BIASES)), "'inner.[02]': has a bias .*beside DoRA or experts"),
        (ak.Union((ak.LoRA(rank=2, alpha=0.0, settings=INNER), BIASES)), "'inner.2': with an alpha of 0 a bias"),
        (ak.AdaLoRA("attn.o", rank=1, initial=2), "'mha': of torch's attentions PEFT adapts both .*LoRA alone"),
        (ak.DoRA("attn.o", rank=2), "'mha': PEFT has no DoRA of torch's attentions"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_peft_cannot_say_is_refused_and_nothing_is_written(
    config: ak.AdapterConfig, told: str, tmp_path: Path
) -> None:
    model = Net().eval()
    adapters = ak.Adapters(model)
    adapters.add("it", config)
    randomize(adapters, "it")
    with pytest.raises(errors.CheckpointError, match=told):
        adapters.save("it", tmp_path / "it", format="peft")
    assert not (tmp_path / "it").exists()


@pytest.mark.parametrize(("targets", "said"), [("linear", "lora_only"), ("conv", "all")])
def test_biases_are_of_the_adapted_layers_or_of_all(targets: str, said: str, tmp_path: Path) -> None:
    adapters = ak.Adapters(Net().eval())
    bias = ak.Trainable(part="bias", absolute=True, settings={"linear@model.inner.0": {}})
    adapters.add("it", ak.Union((ak.LoRA(targets, rank=2), bias)))
    adapters.save("it", tmp_path / "it", format="peft")
    assert json.loads((tmp_path / "it" / "adapter_config.json").read_text())["bias"] == said


def test_an_adapter_of_two_models_is_none_of_peft(tmp_path: Path) -> None:
    toys.register()
    adapters = ak.Adapters(SimpleNamespace(components={"one": toys.ToyModel(), "two": toys.ToyModel()}))
    adapters.add("it", ak.LoRA("attn.q", rank=2))
    with pytest.raises(
        errors.CheckpointError, match=r"an adapter of PEFT is one model's, and this one acts in one, two"
    ):
        adapters.save("it", tmp_path / "it", format="peft")
    assert not (tmp_path / "it").exists()


@pytest.mark.parametrize(("alpha", "scaling"), [(None, "standard"), (3.0, "standard"), (3.0, "rank_stabilized")])
def test_across_groups_of_factors_that_each_reach_one_group(alpha: float | None, scaling: Any, tmp_path: Path) -> None:
    adapters = ak.Adapters(base := Net().eval())
    plain = copy.deepcopy(base)
    adapters.add("it", ak.LoRA(rank=2, alpha=alpha, scaling=scaling, across_groups=True, settings=GROUPED))
    randomize(adapters, "it")
    [module] = adapters.modules("it").values()
    module.B.data *= torch.block_diag(*torch.ones(2, 2, 1))  # type: ignore[operator,union-attr]
    with torch.no_grad():
        wanted = base(IDS)
    adapters.save("it", tmp_path / "it", format="peft")
    written = load_file(str(tmp_path / "it" / "adapter_model.safetensors"))
    assert written["base_model.model.grouped.lora_B.weight"].shape == (4, 1, 1, 1)
    assert close(read_by_peft(tmp_path / "it", plain, IDS), wanted)


def test_several_adapters_have_folders_of_their_names(tmp_path: Path) -> None:
    ensure_torchvision_ops()
    peft = pytest.importorskip("peft")
    base = Net().eval()
    adapters = ak.Adapters(model := copy.deepcopy(base))
    outputs: dict[str, Tensor] = {}
    for name, rank in (("one", 2), ("two", 3)):
        adapters.add(name, ak.LoRA("linear", rank=rank))
        randomize(adapters, name)
        adapters.activate(name)
        with torch.no_grad():
            outputs[name] = model(IDS)
    adapters.save(["one", "two"], tmp_path / "both", format="peft")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "both" / "one"), adapter_name="one")
    theirs.load_adapter(str(tmp_path / "both" / "two"), adapter_name="two")
    again = ak.Adapters(second := copy.deepcopy(base))
    assert {*again.load_all(tmp_path / "both")} == {"one", "two"}
    for name, wanted in outputs.items():
        theirs.set_adapter(name)
        again.activate(name)
        with torch.no_grad():
            assert close(theirs.eval()(IDS), wanted)
            assert close(second(IDS), wanted)
    with pytest.raises(errors.CheckpointError, match="several adapters"):
        again.load(tmp_path / "both", "x")


def test_dtype_and_metadata_are_kept(tmp_path: Path) -> None:
    adapters = ak.Adapters(Net().eval())
    adapters.add("it", ak.LoRA("linear", rank=2))
    adapters.save(
        "it",
        tmp_path / "it",
        format="peft",
        dtype=torch.float16,
        metadata={"base_model_name_or_path": "me/base", "a": "b"},
    )
    tensors = load_file(str(tmp_path / "it" / "adapter_model.safetensors"))
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert json.loads((tmp_path / "it" / "adapter_config.json").read_text())["base_model_name_or_path"] == "me/base"
    report = adapters.load(tmp_path / "it", "again")
    assert report.metadata["a"] == "b"
    assert "me/base" in report.read.base


@pytest.mark.parametrize("kind", ["prompt", "prefix", "network"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_prompts_and_prefixes_of_language_models(name: str, kind: str, tmp_path: Path) -> None:
    ensure_torchvision_ops()
    peft = pytest.importorskip("peft")
    import transformers as tf

    torch.manual_seed(0)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    inputs = {"input_ids": torch.randint(3, 20, (2, 5)), "attention_mask": mask}
    ends = {"vocab_size": 20, "bos_token_id": 0, "eos_token_id": 1}
    if name == "gpt2":
        base: Any = tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=8, n_layer=2, n_head=2, n_positions=16, **ends))
    else:
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        base = tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, intermediate_size=8, **ends))
    base.eval()
    config = {
        "prompt": ak.Prompt(length=3, padded=True),
        "prefix": ak.Prefix(length=3, counted=True, padded=True),
        "network": ak.Prefix(length=3, counted=True, padded=True, reparam=4),
    }[kind]
    adapters = ak.Adapters(own := copy.deepcopy(base))
    adapters.add("it", config)
    randomize(adapters, "it")
    adapters.activate("it")
    adapters.save("it", tmp_path / "it", format="peft")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "it")).eval()
    again = ak.Adapters(second := copy.deepcopy(base))
    again.load(tmp_path / "it")
    again.activate("it")
    with torch.no_grad():
        wanted = own(**inputs).logits
        assert close(theirs(**inputs).logits[:, -5:], wanted)
        assert close(second(**inputs).logits, wanted)
    adapters.add("other", ak.Prompt() if kind == "prompt" else ak.Prefix())
    with pytest.raises(errors.CheckpointError, match="native holds this one"):
        adapters.save("other", tmp_path / "other", format="peft")
