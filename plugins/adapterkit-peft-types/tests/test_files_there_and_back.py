"""Files of PEFT: what PEFT saves is read as what it computes, and what is written PEFT reads, bit for bit."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import adapterkit as ak
from adapterkit import errors

pytestmark = pytest.mark.filterwarnings("ignore")


class Net(nn.Module):
    """Layers of several shapes, with and without a bias."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb = nn.Embedding(20, 12)
        self.first, self.second = nn.Linear(12, 16), nn.Linear(16, 12, bias=False)
        self.third = nn.Linear(12, 12)
        self.conv = nn.Conv1d(12, 6, 3, padding=1)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.second(self.first(self.emb(ids)).tanh())
        return self.conv(self.third(x).mT)


def neox() -> nn.Module:
    """Queries, keys and values in one layer, head by head."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(vocab_size=20, **size))


def gpt2() -> nn.Module:
    """The same in layers that are stored transposed."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=20, n_embd=16, n_layer=2, n_head=2))


LINEAR = ["first", "second", "third"]
IDS = torch.tensor([[1, 2, 3, 4], [5, 19, 0, 7]])
CASES: dict[str, tuple[str, dict[str, Any], Any]] = {
    "delora": ("DeloraConfig", {"r": 3, "target_modules": LINEAR, "rank_pattern": {"second": 2}}, Net),
    "delora_dropout": ("DeloraConfig", {"target_modules": LINEAR, "delora_lambda": 7, "module_dropout": 0.1}, Net),
    "delora_fused": ("DeloraConfig", {"r": 3, "target_modules": ["query_key_value"]}, neox),
    "gralora": ("GraloraConfig", {"r": 4, "target_modules": LINEAR, "alpha": 6}, Net),
    "gralora_hybrid": ("GraloraConfig", {"r": 6, "gralora_k": 3, "hybrid_r": 2, "target_modules": ["third"]}, Net),
    "gralora_fused": ("GraloraConfig", {"r": 4, "target_modules": ["c_attn"]}, gpt2),
    "hira": ("HiraConfig", {"r": 3, "target_modules": LINEAR, "rank_pattern": {"second": 2}}, Net),
    "hira_all": ("HiraConfig", {"r": 2, "target_modules": ["emb", "conv"], "hira_dropout": 0.2}, Net),
    "hira_fused": ("HiraConfig", {"r": 2, "target_modules": ["c_attn"]}, gpt2),
    "glora": ("GloraConfig", {"r": 3, "target_modules": LINEAR}, Net),
    "glora_vectors": (
        "GloraConfig",
        {"r": 3, "target_modules": LINEAR, "config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"},
        Net,
    ),
    "glora_numbers": (
        "GloraConfig",
        {"target_modules": ["first", "third"], "config_A_B": "constant", "config_C": "none", "config_D_E": "none"},
        Net,
    ),
    "glora_bias": ("GloraConfig", {"r": 2, "target_modules": ["first", "third"], "config_A_B": "none"}, Net),
    "glora_fused": ("GloraConfig", {"r": 2, "target_modules": ["query_key_value"]}, neox),
    "lily": ("LilyConfig", {"r": 3, "target_modules": LINEAR, "scaling": 1.5, "num_B": 3}, Net),
    "lily_regex": ("LilyConfig", {"r": 3, "target_modules": ".*(query_key_value|dense)", "stride_A": 2}, neox),
    "psoft": ("PsoftConfig", {"r": 4, "target_modules": LINEAR, "psoft_alpha": 12}, Net),
    "psoft_sum": (
        "PsoftConfig",
        {
            "r": 4,
            "target_modules": LINEAR,
            "ab_svd_init": "pissa_init",
            "use_cayley_neumann": True,
            "cayley_neumann_eps": 0.9,
            "psoft_mag_b": False,
        },
        Net,
    ),
    "psoft_lowrank": (
        "PsoftConfig",
        {"r": 4, "target_modules": LINEAR, "psoft_svd": "lowrank", "random_seed": 5, "psoft_orth": False},
        Net,
    ),
    "psoft_fused": ("PsoftConfig", {"r": 4, "target_modules": ["query_key_value"]}, neox),
    "osf": ("OSFConfig", {"target_modules": LINEAR}, Net),
    "osf_part": ("OSFConfig", {"target_modules": LINEAR, "effective_rank": 0.7}, Net),
    "osf_number": ("OSFConfig", {"target_modules": LINEAR, "effective_rank": 9}, Net),
    "osf_pattern": ("OSFConfig", {"effective_rank": 6, "target_modules": LINEAR, "rank_pattern": {"third": 0.75}}, Net),
    "osf_fused": ("OSFConfig", {"target_modules": ["query_key_value"]}, neox),
    "peanut": ("PeanutConfig", {"r": 3, "target_modules": LINEAR, "scaling": 0.7}, Net),
    "peanut_deep": ("PeanutConfig", {"r": 3, "depth": 2, "act_fn": "silu", "target_modules": LINEAR}, Net),
    "peanut_fused": ("PeanutConfig", {"r": 3, "depth": 1, "target_modules": ["query_key_value"]}, neox),
    "deft": ("DeftConfig", {"r": 3, "target_modules": LINEAR, "deft_dropout": 0.1}, Net),
    "deft_qr": ("DeftConfig", {"r": 3, "target_modules": LINEAR, "decomposition_method": "qr", "alpha": 6}, Net),
    "deft_wide": ("DeftConfig", {"r": 14, "target_modules": LINEAR}, Net),
    "deft_para": ("DeftConfig", {"r": 2, "target_modules": LINEAR, "para": True}, Net),
    "deft_fused": ("DeftConfig", {"r": 2, "target_modules": ["c_attn"]}, gpt2),
    "super": ("SupertuningConfig", {"sparsity": 0.8, "target_modules": LINEAR}, Net),
    "super_lora": ("SupertuningConfig", {"sparsity": 0.9, "r": 2, "select_top": False, "target_modules": LINEAR}, Net),
    "tiny": ("TinyLoraConfig", {"r": 2, "u": 5, "target_modules": LINEAR}, Net),
    "tiny_one": ("TinyLoraConfig", {"r": 3, "u": 4, "weight_tying": 1.0, "target_modules": LINEAR}, Net),
    "tiny_bias": ("TinyLoraConfig", {"r": 14, "weight_tying": 0.6, "bias": "all", "target_modules": LINEAR}, Net),
    "tiny_groups": ("TinyLoraConfig", {"u": 4, "weight_tying": 0.5, "target_modules": ["c_attn", "c_fc"]}, gpt2),
    "pvera": ("PveraConfig", {"r": 4, "target_modules": LINEAR, "pvera_dropout": 0.1}, Net),
    "pvera_seed": (
        "PveraConfig",
        {"r": 4, "target_modules": LINEAR, "save_projection": False, "projection_prng_key": 7},
        Net,
    ),
    "pvera_fused": ("PveraConfig", {"r": 4, "target_modules": ["c_attn"]}, gpt2),
}  # fmt: skip
_IDLE = {"auto_mapping", "base_model_name_or_path", "peft_version", "target_modules", "rank_pattern"}
_IDLE |= {"psoft_alpha", "fan_in_fan_out"}
"""Fields that need not be the same: PEFT names modules by their ends, and psoft_alpha changes nothing but rounding."""


def saved(case: str, folder: Path) -> tuple[nn.Module, Any]:
    """The base, and a model of PEFT with everything random, which is saved."""
    peft = pytest.importorskip("peft")
    name, options, make = CASES[case]
    base = make().eval()
    model = peft.get_peft_model(copy.deepcopy(base), getattr(peft, name)(**options)).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    return base, model


def run(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found = model(IDS)
    return found if isinstance(found, Tensor) else found.logits


def close(found: Tensor, expected: Tensor) -> bool:
    return (found - expected).abs().max().item() <= 1e-5 * expected.abs().max().item()


@pytest.mark.parametrize("case", CASES)
def test_there_and_back(tmp_path: Path, case: str) -> None:
    peft = pytest.importorskip("peft")
    base, theirs = saved(case, tmp_path / "theirs")
    expected, fresh = run(theirs), copy.deepcopy(base)
    adapters = ak.Adapters(base)
    adapters.load(tmp_path / "theirs", "a")
    assert not close(run(base), expected)
    adapters.activate("a")
    assert close(run(base), expected)
    if not case.startswith("lily"):
        with adapters.merged():
            assert close(run(base), expected)
    adapters.save("a", tmp_path / "ours", format="peft")
    again = peft.PeftModel.from_pretrained(fresh, tmp_path / "ours").eval()
    assert torch.equal(run(again), expected) or (case.startswith("psoft") and close(run(again), expected))
    before, after = (load_file(tmp_path / one / "adapter_model.safetensors") for one in ("theirs", "ours"))
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert torch.equal(tensor, after[key]), key
    said = [json.loads((tmp_path / one / "adapter_config.json").read_text()) for one in ("theirs", "ours")]
    names = said[1].keys() - _IDLE
    assert {name: said[0][name] for name in names} == {name: said[1][name] for name in names}


def test_psoft_and_osf_are_of_their_base(tmp_path: Path) -> None:
    """What PEFT would make of another base is not what the adapter has."""
    for case in ("psoft", "osf"):
        base, _ = saved(case, tmp_path / case)
        adapters = ak.Adapters(base)
        adapters.load(tmp_path / case, case)
        other = Net()
        for parameter in other.parameters():
            parameter.data += 0.01 * torch.randn(parameter.shape)
        moved = ak.Adapters(other)
        moved.load(adapters.save(case, tmp_path / f"{case}.safetensors"), case)
        with pytest.raises(errors.BaseMismatchError, match="native holds all of it"):
            moved.save(case, tmp_path / "again", format="peft")


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"type": "hira", "targets": "attn.q"}, "on whole modules"),
        ({"type": "delora", "targets": "path:conv"}, "form conv"),
        ({"type": "lily", "targets": "path:first"}, "over='sample'"),
        ({"type": "psoft", "terms": 3, "rank": 2, "targets": "path:first"}, "3 terms"),
    ],
)
def test_what_peft_cannot_say(tmp_path: Path, config: dict[str, Any], told: str) -> None:
    manager, config = ak.get_plugin_manager(), dict(config)
    cls = manager.adapter(config.pop("type")).load()
    adapters = ak.Adapters(neox() if config["targets"] == "attn.q" else Net())
    adapters.add("a", cls(**config))
    with pytest.raises(errors.CheckpointError, match=told):
        adapters.save("a", tmp_path / "a", format="peft")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("case", "changes", "error"),
    [
        ("gralora", {"alpha": "much"}, errors.InvalidHeaderError),
        ("psoft", {"ab_svd_init": "another"}, errors.InvalidHeaderError),
        ("psoft_sum", {"num_cayley_neumann_terms": 10**9}, errors.AdapterKitError),
        ("psoft_lowrank", {"psoft_svd_lowrank_niter": 10**9}, errors.AdapterKitError),
    ],
)
def test_configs_that_are_refused(tmp_path: Path, case: str, changes: dict[str, Any], error: type[Exception]) -> None:
    base, _ = saved(case, tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    adapters = ak.Adapters(base)
    with pytest.raises(error):
        adapters.load(tmp_path, "a")
    assert not len(adapters)


SHAPES = {
    "scalar": lambda tensor: torch.tensor(1.0),
    "flat": lambda tensor: tensor.flatten()[1:].clone(),
    "axis": lambda tensor: tensor[None].contiguous(),
    "axes": lambda tensor: tensor.reshape(*tensor.shape, 1, 1, 1),
    "empty": lambda tensor: tensor[:0].clone(),
    "narrow": lambda tensor: tensor[..., :0].contiguous(),
    "shorter": lambda tensor: tensor[..., 1:].contiguous() if tensor.ndim > 1 else tensor[1:].clone(),
    "nan": lambda tensor: torch.full(tensor.shape, float("nan")),
}
ODD: tuple[Any, ...] = ("x", -1, 10**9, [1], {"a": 1}, 1.5, 1e308, "")
WRONG = ["delora", "gralora_hybrid", "hira", "glora", "lily", "psoft_sum", "osf_part", "peanut_deep", "deft_qr"]
WRONG += ["super_lora", "pvera", "tiny_groups"]


@pytest.mark.slow
@pytest.mark.parametrize("case", WRONG)
def test_tensors_of_wrong_shapes_and_odd_values(tmp_path: Path, case: str) -> None:
    """Each is an error of the file, before anything is attached, or is read."""
    base, _ = saved(case, tmp_path)
    file, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    tensors, values = load_file(file), json.loads(config.read_text())
    adapters = ak.Adapters(base)

    def refused(*, always: bool) -> None:
        try:
            adapters.load(tmp_path, "a")
        except errors.BrokenFormatError as error:
            raise AssertionError("the codec is said to be broken, and not the file") from error
        except errors.AdapterKitError:
            assert not len(adapters)
        else:
            assert not always
            adapters.detach()

    for key, tensor in list(tensors.items())[:6]:
        for change in SHAPES.values() if tensor.numel() > 1 else ():
            save_file({**tensors, key: change(tensor)}, str(file))
            refused(always=tensor.is_floating_point() and "glora_" not in key)
    save_file(tensors, str(file))
    for name in values.keys() - _IDLE - {"task_type", "peft_type", "revision", "inference_mode"}:
        for value in ODD:
            config.write_text(json.dumps({**values, name: value}))
            refused(always=False)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("SupertuningConfig", {"sparsity": 0.8, "save_precomputed_indices": False}),
        ("TinyLoraConfig", {"r": 2, "u": 3, "save_projection": False, "projection_seed": 9}),
    ],
)
def test_what_a_file_leaves_out_comes_from_the_base_or_a_seed(
    tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    peft = pytest.importorskip("peft")
    base = Net().eval()
    model = peft.get_peft_model(copy.deepcopy(base), getattr(peft, name)(target_modules=LINEAR, **options)).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape)
    model.save_pretrained(tmp_path)
    adapters = ak.Adapters(base)
    adapters.load(tmp_path, "a")
    adapters.activate("a")
    assert close(run(base), run(model))


def test_biases_that_glora_multiplies_and_that_are_trained(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.GloraConfig(r=2, target_modules=["first"], bias="all")
    peft.get_peft_model(Net(), config).save_pretrained(tmp_path)
    with pytest.raises(errors.UnsupportedFileError, match="biases that are trained"):
        ak.Adapters(Net()).load(tmp_path, "a")
