"""Shrunk copies of language models: small, every kind of layer, special tokens within the vocabulary."""

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from adapterkit.testing.specimens import NoSpecimen
from adapterkit.testing.specimens.configs import VOCABULARY, shrunk, special_ids
from adapterkit.testing.specimens.texts import specimen_of


def test_widths_shrink_by_one_number_so_that_heads_stay_whole() -> None:
    config = shrunk(CONFIG_MAPPING["llama"](num_key_value_heads=8))
    assert config.hidden_size == config.num_attention_heads * config.head_dim
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (32, 8, 8)


@pytest.mark.parametrize("name", ["gemma3_text", "qwen3_next", "jamba", "zamba2", "recurrent_gemma", "deepseek_v3"])
def test_every_kind_of_layer_stays(name: str) -> None:
    config = CONFIG_MAPPING[name]()
    small = shrunk(config)
    assert small.num_hidden_layers <= 4
    for attribute in ("layer_types", "layers_block_type", "mlp_layer_types"):
        if isinstance(kinds := vars(config).get(attribute), list):
            assert set(kinds) == set(vars(small)[attribute]), attribute


def test_a_config_within_another_shrinks_by_the_same_number() -> None:
    config = CONFIG_MAPPING["qwen2_vl"]()
    small = shrunk(config)
    text, vision = config.text_config.hidden_size, config.vision_config.hidden_size
    assert text // small.text_config.hidden_size == vision // small.vision_config.hidden_size > 1


def test_special_tokens_lie_within_the_vocabulary_and_stay_distinct() -> None:
    config = CONFIG_MAPPING["qwen2_vl"]()
    small = shrunk(config)
    assert small.image_token_id != small.video_token_id
    assert max(special_ids(small)) < VOCABULARY == small.text_config.vocab_size


def test_the_config_that_is_shrunk_stays_as_it_is() -> None:
    config = CONFIG_MAPPING["llama"]()
    before = config.to_dict()
    shrunk(config)
    assert config.to_dict() == before


@pytest.mark.parametrize("name", ["llama", "bert", "bart"])
def test_a_specimen_of_a_skeleton_runs_the_same_each_time(name: str) -> None:
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(CONFIG_MAPPING[name]())
    specimen = specimen_of(skeleton)
    assert type(specimen.model) is type(skeleton)
    for call in specimen.calls.values():
        assert call().dtype == torch.float64
        assert torch.equal(call(), call())


def test_a_decoder_is_called_beside_states_that_it_attends_to() -> None:
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(CONFIG_MAPPING["bart"]())
    calls = specimen_of(skeleton).calls
    assert not torch.equal(calls["text"](), calls["text beside states"]())


def test_a_model_without_ids_has_no_specimen_here() -> None:
    with pytest.raises(NoSpecimen, match="no text model"):
        specimen_of(torch.nn.Linear(2, 2))
