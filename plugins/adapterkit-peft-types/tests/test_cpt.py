"""CPT: conformance, and PEFT's numbers from the same prompt."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from adapterkit_peft_types.cpt import CPT

import adapterkit as ak
from adapterkit import errors
from adapterkit.testing import AdapterConformance


@pytest.mark.slow
class TestConformance(AdapterConformance):
    config = CPT(tokens=(), kinds_of_tokens=(1, 2, 3, 4))


def llama() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=20, **size)).eval()


IDS = torch.tensor([[4, 5, 6, 7], [8, 9, 1, 2]])


@pytest.mark.filterwarnings("ignore")
def test_it_is_that_of_peft() -> None:
    """Its start, and after a step that goes too far; PEFT gives logits of the prompt's positions too."""
    peft = pytest.importorskip("peft")
    base, tokens, kinds = llama(), [3, 4, 5, 6, 7], [1, 2, 3, 4, 6]
    config = peft.CPTConfig(
        task_type="CAUSAL_LM",
        cpt_token_ids=tokens,
        cpt_tokens_type_mask=kinds,
        opt_projection_epsilon=0.2,
        opt_projection_format_epsilon=0.4,
    )
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    adapters = ak.Adapters(base)
    ours = CPT(tokens=tuple(tokens), kinds_of_tokens=tuple(kinds), radius=0.2, template_radius=0.4)
    adapters.add("a", ours)
    (module,) = adapters.modules("a").values()
    for size in (0.0, 1.0):
        noise = size * torch.randn(5, 16, generator=torch.Generator().manual_seed(2))
        noise[3] = 0  # an answer's vector has no gradient
        theirs.prompt_encoder["default"].delta_embedding.weight.data.copy_(noise)
        module.move.data.copy_(noise[[0, 1, 2, 4]])  # type: ignore[union-attr,operator]
        with torch.no_grad():
            ours.after_step({"": module}, 1, None)
            expected = theirs(IDS, labels=None).logits[:, -4:]
            assert (base(IDS).logits[:, -4:] - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_answers_do_not_move() -> None:
    adapters = ak.Adapters(llama())
    report = adapters.add("a", CPT(tokens=(1, 2, 3), kinds_of_tokens=(2, 4, 0)))
    assert report.parameters == 16


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"tokens": ()}, "tokens"),
        ({"tokens": (-1,)}, "tokens"),
        ({"tokens": (1, 2), "kinds_of_tokens": (1,)}, "kinds_of_tokens"),
        ({"radius": 0.0}, "radius"),
        ({"tokens": 3}, "tokens"),
    ],
)
def test_wrong_values(options: dict[str, Any], named: str) -> None:
    with pytest.raises(errors.ConfigError, match=named):
        CPT(**options)


def test_tokens_that_the_vocabulary_lacks() -> None:
    with pytest.raises(errors.ConfigError, match="has 20 tokens, and tokens names 20"):
        ak.Adapters(llama()).add("a", CPT(tokens=(1, 20)))
