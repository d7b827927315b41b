"""Blocks of language models that are arranged in their own way, by the children that they have."""

from __future__ import annotations

from adapterkit.mapping.entries import Output, Weight
from adapterkit.mapping.templates.blocks import around, before, behind, block, last, post, pre, sandwich
from adapterkit.mapping.templates.template import BlockTemplate

_PROJECTED = "resid_dropout|attention.resid_dropout|o_proj|out_proj|dense|c_proj"
_DENSE = "dropout|dense"


def _attention(sublayer: str, norm: str) -> Output:
    return before("attn", sublayer, norm, last(sublayer, _PROJECTED))


def _in_bert(norm: str, norm2: str, ends: str = _DENSE, second: str = "output") -> BlockTemplate:
    """As BERT, with a norm in front of each sublayer. `second` is the feed-forward or its last module."""
    outputs = (
        before("attn", "attention.output", norm, last("attention.output", ends)),
        before("mlp", second, norm2, last("output", ends)),
    )
    has = f"{norm} attention.output.dense {norm2} intermediate.dense output.dense"
    return BlockTemplate(has, outputs)


def _t5(forward: int, has: str, cross: bool) -> BlockTemplate:
    """A list of layers, each with its norm."""
    roles = {"attn": 0, **({"cross": 1} if cross else {}), "mlp": forward}
    norms = {role: f"layer.{place}.layer_norm" for role, place in roles.items()}
    outputs = tuple(
        Output(role, f"layer.{place}.dropout", residual=norms[role], norm_in=norms[role])
        for role, place in roles.items()
    )
    return BlockTemplate(has, outputs, cross="EncDecAttention")


_NORMED = "input_layernorm post_attention_layernorm pre_feedforward_layernorm post_feedforward_layernorm"
_PER_LAYER = f"self_attn mlp {_NORMED} per_layer_input_gate per_layer_projection post_per_layer_input_norm"
_T5_SELF = "layer.0.SelfAttention|layer.0.LocalSelfAttention|layer.0.TransientGlobalSelfAttention"
_GEMMA = (
    around("attn", "input_layernorm", "post_attention_layernorm"),
    around("mlp", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
)


def _crossed(name: str, *further: str) -> dict[str, str]:
    """An attention to other tokens that may be there, with its norms."""
    return {"optional": " ".join((name, *further)), "cross": name}


TEXT_BLOCKS: tuple[BlockTemplate, ...] = (
    # Hybrids whose first sublayer is no attention.
    block(before("attn", "linear_attn", "input_layernorm"), before("mlp", "mlp", "post_attention_layernorm")),
    block(before("ssm", "mamba", "input_layernorm"), before("mlp", "feed_forward", "pre_ff_layernorm")),
    block(before("ssm", "mamba", "input_layernorm"), before("mlp", "shared_mlp", "post_attention_layernorm")),
    block(before("ssm", "mixer", "norm"), also="mixer.in_proj mixer.out_proj"),
    pre("self_attn attention_layernorm", "mlp feedforward_layernorm", _PROJECTED),
    pre("self_attn input_layernorm", "mlp pre_feedforward_layernorm", _PROJECTED),
    pre("self_attn input_layernorm", "feed_forward pre_ff_layernorm", _PROJECTED, optional="mamba"),
    pre("self_attn input_layernorm", "block_sparse_moe post_attention_layernorm", _PROJECTED),
    pre("self_attn input_layernorm", "shared_mlp post_attention_layernorm", _PROJECTED),
    pre("attention input_layernorm", "mlp post_attention_layernorm", _PROJECTED),
    pre("self_attn operator_norm", "feed_forward ffn_norm", _PROJECTED),
    pre("attn attn_norm", "mlp mlp_norm", _PROJECTED),
    pre("attn ln_1", "mlp ln_2", _PROJECTED),
    pre("temporal_block temporal_pre_norm", "mlp_block channel_pre_norm", _PROJECTED),
    post("attn ln_1", "mlp ln_2", _PROJECTED, whole=False),  # it gives a list
    # The feed-forward of its mixtures gives the router's scores too.
    pre(
        "self_attn input_layernorm",
        "feed_forward post_attention_layernorm",
        _PROJECTED,
        "down_proj",
        also="feed_forward.down_proj",
    ),
    block(_attention("self_attn", "input_layernorm"), also="post_attention_layernorm feed_forward.router"),
    block(_attention("self_attn", "input_layernorm"), also="post_attention_layernorm block_sparse_moe shared_mlp"),
    block(
        before("attn", "multi_head_attention", "layernorm1", "multi_head_attention.dense"),
        before("mlp", "ffn", "layernorm2"),
        Weight("mlp.up", "ffn.0"),
        Weight("mlp.down", "ffn.2"),
    ),
    block(
        before(
            "attn",
            "self_att.self_attention",
            "self_att.layernorm_before_attention",
            "self_att.self_attention.attention_out",
        ),
        before("mlp", "ffn.ffn", "ffn.layernorm_before_ffn"),
        also="self_att.self_attention.attention_out",
    ),
    pre("norm_attn_norm.attn norm_attn_norm.norm_1", "ffn norm_attn_norm.norm_2", _PROJECTED),  # DBRX
    pre(  # StableLM
        "self_attn input_layernorm",
        "mlp post_attention_layernorm",
        _PROJECTED,
        when=lambda block: getattr(block, "use_parallel_residual", None) is False,
        branches=True,
    ),
    # Both sublayers see one norm, and both are added to one x.
    pre("attn ln_1", "mlp ln_1", _PROJECTED),
    pre("self_attn input_layernorm", "mlp input_layernorm", _PROJECTED),
    sandwich("self_attn input_layernorm post_attention_layernorm", "mlp pre_mlp_layernorm post_mlp_layernorm"),
    sandwich("self_attn input_layernorm post_self_attn_layernorm", "mlp post_attention_layernorm post_mlp_layernorm"),
    sandwich("self_attn input_layernorm post_norm1", "mlp post_attention_layernorm post_norm2"),
    sandwich("self_attn operator_norm post_operator_norm", "feed_forward ffn_norm post_ffn_norm"),
    sandwich("self_attn input_layernorm attn_sconv", "mlp post_attention_layernorm mlp_sconv"),
    BlockTemplate(_PER_LAYER, _GEMMA, "altup"),
    BlockTemplate(f"{_PER_LAYER} altup laurel", _GEMMA, whole=False),  # Gemma 3n: of several streams it changes one
    block(
        around("attn", "pre_self_attn_layernorm", "post_self_attn_layernorm"),
        around("cross", "pre_cross_attn_layernorm", "post_cross_attn_layernorm"),
        around("mlp", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
        also="self_attn mlp",
        **_crossed("cross_attn", "pre_cross_attn_layernorm", "post_cross_attn_layernorm"),
    ),
    block(before("attn", "mixer", "norm", "mixer.o_proj"), also="mixer.q_proj mixer.o_proj"),
    block(before("mlp", "mixer", "norm"), also="mixer.up_proj mixer.down_proj"),
    # JetMoE, whose attention ends in no module.
    block(before("mlp", "mlp", "post_attention_layernorm"), also="input_layernorm self_attention.kv_proj"),
    _in_bert("attention.ln", "ln", second="intermediate"),  # Megatron-BERT
    _in_bert("attention.self_attn_layer_norm", "LayerNorm", "dense"),  # XLM-RoBERTa-XL
    _in_bert("attention.LayerNorm", "LayerNorm"),  # ESM
    _in_bert("attention.LayerNorm", "intermediate.LayerNorm"),  # RoBERTa-PreLayerNorm
    BlockTemplate(  # MPNet
        "attention.attn.o attention.LayerNorm intermediate.dense output.dense output.LayerNorm",
        (
            Output("attn", "attention.attn.o", residual="attention", norm_out="attention.LayerNorm"),
            Output("mlp", "output.dropout|output.dense", residual="intermediate", norm_out="output.LayerNorm"),
        ),
    ),
    block(  # ALBERT
        Output(
            "attn", "attention.output_dropout|attention.dense", residual="attention", norm_out="attention.LayerNorm"
        ),
        Output("mlp", "ffn_output", residual="ffn", norm_out="full_layer_layer_norm"),
        Weight("mlp.up", "ffn"),
        Weight("mlp.down", "ffn_output"),
    ),
    post("attention sa_layer_norm", "ffn output_layer_norm", "out_lin"),
    block(
        behind(
            "attn", "self_attn", "post_attention_layernorm", f"post_attention_dropout|{last('self_attn', _PROJECTED)}"
        ),
        behind("mlp", "mlp", "post_mlp_layernorm", "post_mlp_dropout"),
    ),
    block(  # Funnel
        Output("attn", "attention.post_proj", residual="attention", norm_out="attention.layer_norm"),
        Output("mlp", "ffn.linear_2", residual="ffn", norm_out="ffn.layer_norm"),
        also="ffn.linear_1",
    ),
    # Perceiver; its attention may look elsewhere, and may have no residual.
    block(before("mlp", "mlp", "layernorm"), also="attention.self.layernorm1 attention.output.dense"),
    block(
        behind("attn", "self_attn", "self_attn_layer_norm", last("self_attn", _PROJECTED)),
        behind("cross", "cross_attn", "cross_attn_layer_norm", last("cross_attn", _PROJECTED)),
        behind("mlp", "feed_forward", "feed_forward_layer_norm"),
        without="self_attn.relative_pos_embeddings",
        **_crossed("cross_attn", "cross_attn_layer_norm"),
    ),
    *(
        block(
            _attention("self_attn", "self_attn_layer_norm"),
            before("cross", "cross_attention", "cross_attention_layer_norm", last("cross_attention", _PROJECTED)),
            before("mlp", "ffn", norm),
            **_crossed("cross_attention", "cross_attention_layer_norm"),
        )
        for norm in ("ff_layer_norm", "ffn_layer_norm")
    ),
    # XLNet, whose attention holds its projections as parameters.
    block(Output("mlp", "ff.layer_2", residual="ff", norm_out="ff.layer_norm"), also="rel_attn.layer_norm ff.layer_1"),
    _t5(1, f"{_T5_SELF} layer.1.layer_norm layer.1.DenseReluDense|layer.1.mlp", cross=False),
    _t5(2, f"{_T5_SELF} layer.1.EncDecAttention layer.2.layer_norm layer.2.DenseReluDense|layer.2.mlp", cross=True),
)
