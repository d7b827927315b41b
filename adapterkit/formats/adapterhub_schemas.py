"""What each of AdapterHub's methods may say in a config, with the values that are left out."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

# What each architecture may say. A default of a type's own kind is what old files leave out; a type must be given.
BOTTLENECK: dict[str, Any] = {
    "mh_adapter": bool,
    "output_adapter": bool,
    "reduction_factor": float,
    "non_linearity": str,
    "original_ln_before": False,
    "original_ln_after": True,
    "ln_before": False,
    "ln_after": False,
    "init_weights": "bert",
    "is_parallel": False,
    "scaling": 1.0,
    "use_gating": False,
    "residual_before_ln": True,
    "adapter_residual_before_ln": False,
    "inv_adapter": None,
    "inv_adapter_reduction_factor": None,
    "cross_adapter": False,
    "leave_out": (),
    "dropout": 0.0,
    "phm_layer": False,
    "phm_dim": 4,
    "factorized_phm_W": True,
    "shared_W_phm": False,
    "shared_phm_rule": True,
    "factorized_phm_rule": False,
    "phm_c_init": "normal",
    "phm_init_range": 0.0001,
    "learn_phm": True,
    "hypercomplex_nonlinearity": "glorot-uniform",
    "phm_rank": 1,
    "phm_bias": True,
    "stochastic_depth": 0.0,
    "init_weights_seed": None,
    "invertible_adapter": None,  # of releases before 2, as is what follows
    "new_attention_norm": False,
    "attention_type": "",
}
LORA: dict[str, Any] = {
    "selfattn_lora": True,
    "intermediate_lora": False,
    "output_lora": False,
    "leave_out": (),
    "r": 8,
    "alpha": 8.0,
    "dropout": 0.0,
    "attn_matrices": ("q", "v"),
    "composition_mode": "add",
    "init_weights": "lora",
    "use_gating": False,
    "use_dora": False,
    "vera_d": None,
    "vera_b": None,
    "dtype": None,
    "init_weights_seed": None,
}
MTL: dict[str, Any] = {
    "n_up_projection": 1,
    "task_specific_matrix_type": "singular_values",
    "weights_sharpness": 0.05,
    "task_names": None,
}
PREFIX: dict[str, Any] = {
    "encoder_prefix": True,
    "cross_prefix": True,
    "leave_out": (),
    "flat": False,
    "prefix_length": 30,
    "bottleneck_size": 512,
    "non_linearity": "tanh",
    "dropout": 0.0,
    "use_gating": False,
    "shared_gating": True,
    "init_weights_seed": None,
}
PROMPT: dict[str, Any] = {
    "prompt_length": 10,
    "prompt_init": "random_uniform",
    "prompt_init_text": None,
    "random_uniform_scale": 0.5,
    "combine": "prefix",
    "init_weights_seed": None,
}
REFT: dict[str, Any] = {
    "layers": "all",
    "prefix_positions": 3,
    "suffix_positions": 0,
    "r": 1,
    "orthogonality": bool,
    "tied_weights": False,
    "subtract_projection": True,
    "dropout": 0.05,
    "non_linearity": None,
    "dtype": None,
    "output_reft": True,
    "init_weights_seed": None,
}
FUSION: Mapping[str, Any] = MappingProxyType(
    {
        "key": True,
        "query": True,
        "value": True,
        "query_before_ln": False,
        "regularization": True,
        "residual_before": False,
        "temperature": False,
        "value_before_softmax": True,
        "value_initialized": True,
        "dropout_prob": None,
    }
)
ARCHITECTURES: Mapping[str, tuple[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "bottleneck": ("bottleneck", BOTTLENECK),
        "adapter": ("bottleneck", BOTTLENECK),
        "lora": ("lora", LORA),
        "mtl_lora": ("lora", {**LORA, **MTL}),
        "prefix_tuning": ("prefix", PREFIX),
        "prompt_tuning": ("prompt", PROMPT),
        "reft": ("reft", REFT),
    }
)
