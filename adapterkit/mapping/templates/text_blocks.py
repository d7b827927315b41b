"""Blocks of language models that are arranged in their own way, by the children that they have."""

from __future__ import annotations

from adapterkit.mapping.entries import Output, Weight
from adapterkit.mapping.templates.blocks import around, before, behind
from adapterkit.mapping.templates.template import BlockTemplate

_PROJECTED = "resid_dropout|attention.resid_dropout|o_proj|out_proj|dense|c_proj"


def _last(sublayer: str, names: str) -> str:
    """Alternatives for the module within a sublayer whose output is the sublayer's."""
    return "|".join(f"{sublayer}.{name}" for name in names.split("|"))


def _attention(sublayer: str, norm: str, role: str = "attn") -> Output:
    return before(role, sublayer, norm, _last(sublayer, _PROJECTED))


def _pre(attention: str, norm: str, forward: str, norm2: str, optional: str = "") -> BlockTemplate:
    """A norm in front of each of the two sublayers."""
    outputs = (_attention(attention, norm), before("mlp", forward, norm2))
    return BlockTemplate(f"{norm} {attention} {norm2} {forward}", outputs, optional=optional)


def _parallel(attention: str, norm: str, forward: str = "mlp") -> BlockTemplate:
    """Both sublayers see one norm, and both are added to one x."""
    return BlockTemplate(f"{norm} {attention} {forward}", (_attention(attention, norm), before("mlp", forward, norm)))


def _sandwich(attention: str, norms: str, forward: str, norms2: str, optional: str = "") -> BlockTemplate:
    """Norms before and behind each sublayer; `norms` are the two of the attention."""
    outputs = (around("attn", *norms.split()), around("mlp", *norms2.split()))
    return BlockTemplate(f"{norms} {attention} {norms2} {forward}", outputs, optional=optional)


def _t5(forward: int, has: str, cross: bool) -> BlockTemplate:
    """A list of layers, each with its norm."""

    def layer(role: str, place: int, dropout: str = "dropout") -> Output:
        norm = f"layer.{place}.layer_norm"
        return Output(role, f"layer.{place}.{dropout}", residual=norm, norm_in=norm)

    outputs = (layer("attn", 0), *((layer("cross", 1),) if cross else ()), layer("mlp", forward))
    return BlockTemplate(has, outputs, optional="layer", cross="EncDecAttention")


_PER_LAYER = "per_layer_input_gate per_layer_projection post_per_layer_input_norm"
_T5_SELF = "layer.0.SelfAttention|layer.0.LocalSelfAttention|layer.0.TransientGlobalSelfAttention"


def _recurrent(mixer: str, norm2: str, forward: str) -> BlockTemplate:
    """A block of a hybrid whose first sublayer is no attention."""
    role = "attn" if mixer == "linear_attn" else "ssm"
    outputs = (before(role, mixer, "input_layernorm"), before("mlp", forward, norm2))
    return BlockTemplate(f"input_layernorm {mixer} {norm2} {forward}", outputs)


TEXT_BLOCKS: tuple[BlockTemplate, ...] = (
    _recurrent("linear_attn", "post_attention_layernorm", "mlp"),
    _recurrent("mamba", "pre_ff_layernorm", "feed_forward"),
    _recurrent("mamba", "post_attention_layernorm", "shared_mlp"),
    BlockTemplate("norm mixer.in_proj mixer.out_proj", (before("ssm", "mixer", "norm"),), optional="mixer"),
    _pre("self_attn", "attention_layernorm", "mlp", "feedforward_layernorm"),
    _pre("self_attn", "input_layernorm", "mlp", "pre_feedforward_layernorm"),
    _pre("self_attn", "input_layernorm", "feed_forward", "pre_ff_layernorm", "mamba"),
    _pre("self_attn", "input_layernorm", "block_sparse_moe", "post_attention_layernorm"),
    _pre("self_attn", "input_layernorm", "shared_mlp", "post_attention_layernorm"),
    _pre("attention", "input_layernorm", "mlp", "post_attention_layernorm"),
    _pre("self_attn", "operator_norm", "feed_forward", "ffn_norm"),
    _pre("attn", "attn_norm", "mlp", "mlp_norm"),
    _pre("attn", "ln_1", "mlp", "ln_2"),
    _pre("temporal_block", "temporal_pre_norm", "mlp_block", "channel_pre_norm"),
    BlockTemplate(
        "attn ln_1 mlp ln_2",
        (behind("attn", "attn", "ln_1", _last("attn", _PROJECTED)), behind("mlp", "mlp", "ln_2")),
        whole=False,  # it gives a list
    ),
    BlockTemplate(  # the feed-forward of its mixtures gives the router's scores too
        "input_layernorm self_attn post_attention_layernorm feed_forward.down_proj",
        (
            _attention("self_attn", "input_layernorm"),
            before("mlp", "feed_forward", "post_attention_layernorm", "feed_forward.down_proj"),
        ),
        optional="feed_forward",
    ),
    BlockTemplate(
        "input_layernorm self_attn post_attention_layernorm feed_forward.router",
        (_attention("self_attn", "input_layernorm"),),
        optional="feed_forward",
    ),
    BlockTemplate(
        "input_layernorm self_attn post_attention_layernorm block_sparse_moe shared_mlp",
        (_attention("self_attn", "input_layernorm"),),
    ),
    BlockTemplate(
        "layernorm1 multi_head_attention layernorm2 ffn.0 ffn.2",
        (
            before("attn", "multi_head_attention", "layernorm1", "multi_head_attention.dense"),
            before("mlp", "ffn", "layernorm2"),
            Weight("mlp.up", "ffn.0"),
            Weight("mlp.down", "ffn.2"),
        ),
        optional="ffn",
    ),
    BlockTemplate(
        "self_att.layernorm_before_attention self_att.self_attention.attention_out ffn.layernorm_before_ffn ffn.ffn",
        (
            before(
                "attn",
                "self_att.self_attention",
                "self_att.layernorm_before_attention",
                "self_att.self_attention.attention_out",
            ),
            before("mlp", "ffn.ffn", "ffn.layernorm_before_ffn"),
        ),
        optional="self_att ffn",
    ),
    BlockTemplate(  # DBRX
        "norm_attn_norm.norm_1 norm_attn_norm.attn norm_attn_norm.norm_2 ffn",
        (
            _attention("norm_attn_norm.attn", "norm_attn_norm.norm_1"),
            before("mlp", "ffn", "norm_attn_norm.norm_2"),
        ),
        optional="norm_attn_norm",
    ),
    BlockTemplate(  # StableLM
        "input_layernorm self_attn post_attention_layernorm mlp",
        (_attention("self_attn", "input_layernorm"), before("mlp", "mlp", "post_attention_layernorm")),
        when=lambda block: getattr(block, "use_parallel_residual", None) is False,
        branches=True,
    ),
    _parallel("attn", "ln_1"),
    _parallel("self_attn", "input_layernorm"),
    _sandwich(
        "self_attn",
        "input_layernorm post_attention_layernorm",
        "mlp",
        "pre_mlp_layernorm post_mlp_layernorm",
    ),
    _sandwich(
        "self_attn",
        "input_layernorm post_self_attn_layernorm",
        "mlp",
        "post_attention_layernorm post_mlp_layernorm",
    ),
    _sandwich("self_attn", "input_layernorm post_norm1", "mlp", "post_attention_layernorm post_norm2"),
    _sandwich("self_attn", "operator_norm post_operator_norm", "feed_forward", "ffn_norm post_ffn_norm"),
    _sandwich("self_attn", "input_layernorm attn_sconv", "mlp", "post_attention_layernorm mlp_sconv"),
    BlockTemplate(
        f"self_attn mlp input_layernorm post_attention_layernorm pre_feedforward_layernorm post_feedforward_layernorm "
        f"{_PER_LAYER}",
        (
            around("attn", "input_layernorm", "post_attention_layernorm"),
            around("mlp", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
        ),
        without="altup",
    ),
    BlockTemplate(  # Gemma 3n keeps several streams, of which a block changes one
        f"self_attn mlp input_layernorm post_attention_layernorm pre_feedforward_layernorm post_feedforward_layernorm "
        f"{_PER_LAYER} altup laurel",
        (
            around("attn", "input_layernorm", "post_attention_layernorm"),
            around("mlp", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
        ),
        whole=False,
    ),
    BlockTemplate(
        "pre_self_attn_layernorm self_attn post_self_attn_layernorm pre_feedforward_layernorm mlp "
        "post_feedforward_layernorm",
        (
            around("attn", "pre_self_attn_layernorm", "post_self_attn_layernorm"),
            around("cross", "pre_cross_attn_layernorm", "post_cross_attn_layernorm"),
            around("mlp", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
        ),
        optional="cross_attn pre_cross_attn_layernorm post_cross_attn_layernorm",
        cross="cross_attn",
    ),
    BlockTemplate(
        "norm mixer.q_proj mixer.o_proj", (before("attn", "mixer", "norm", "mixer.o_proj"),), optional="mixer"
    ),
    BlockTemplate("norm mixer.up_proj mixer.down_proj", (before("mlp", "mixer", "norm"),), optional="mixer"),
    BlockTemplate(  # JetMoE, whose attention ends in no module
        "input_layernorm self_attention.kv_proj post_attention_layernorm mlp",
        (before("mlp", "mlp", "post_attention_layernorm"),),
        optional="self_attention",
    ),
    BlockTemplate(  # Megatron-BERT
        "attention.ln attention.output.dense ln intermediate.dense output.dense",
        (
            before("attn", "attention.output", "attention.ln", _last("attention.output", "dropout|dense")),
            before("mlp", "intermediate", "ln", _last("output", "dropout|dense")),
        ),
        optional="attention intermediate output",
    ),
    BlockTemplate(  # XLM-RoBERTa-XL
        "attention.self_attn_layer_norm attention.output.dense LayerNorm intermediate.dense output.dense",
        (
            before("attn", "attention.output", "attention.self_attn_layer_norm", "attention.output.dense"),
            before("mlp", "output", "LayerNorm", "output.dense"),
        ),
        optional="attention intermediate output",
    ),
    BlockTemplate(  # ESM
        "attention.LayerNorm attention.output.dense LayerNorm intermediate.dense output.dense",
        (
            before("attn", "attention.output", "attention.LayerNorm", _last("attention.output", "dropout|dense")),
            before("mlp", "output", "LayerNorm", _last("output", "dropout|dense")),
        ),
        optional="attention intermediate output",
    ),
    BlockTemplate(  # RoBERTa-PreLayerNorm
        "attention.LayerNorm attention.output.dense intermediate.LayerNorm output.dense",
        (
            before("attn", "attention.output", "attention.LayerNorm", _last("attention.output", "dropout|dense")),
            before("mlp", "output", "intermediate.LayerNorm", _last("output", "dropout|dense")),
        ),
        optional="attention intermediate output",
    ),
    BlockTemplate(  # MPNet
        "attention.attn.o attention.LayerNorm intermediate.dense output.dense output.LayerNorm",
        (
            Output("attn", "attention.attn.o", residual="attention", norm_out="attention.LayerNorm"),
            Output("mlp", "output.dropout|output.dense", residual="intermediate", norm_out="output.LayerNorm"),
        ),
        optional="attention intermediate output",
    ),
    BlockTemplate(  # ALBERT
        "attention.dense attention.LayerNorm ffn ffn_output full_layer_layer_norm",
        (
            Output(
                "attn", "attention.output_dropout|attention.dense", residual="attention", norm_out="attention.LayerNorm"
            ),
            Output("mlp", "ffn_output", residual="ffn", norm_out="full_layer_layer_norm"),
            Weight("mlp.up", "ffn"),
            Weight("mlp.down", "ffn_output"),
        ),
        optional="attention",
    ),
    BlockTemplate(
        "attention sa_layer_norm ffn output_layer_norm",
        (
            behind("attn", "attention", "sa_layer_norm", "attention.out_lin"),
            behind("mlp", "ffn", "output_layer_norm"),
        ),
    ),
    BlockTemplate(
        "self_attn post_attention_layernorm mlp post_mlp_layernorm",
        (
            behind(
                "attn",
                "self_attn",
                "post_attention_layernorm",
                f"post_attention_dropout|{_last('self_attn', _PROJECTED)}",
            ),
            behind("mlp", "mlp", "post_mlp_layernorm", "post_mlp_dropout"),
        ),
    ),
    BlockTemplate(  # Funnel
        "attention.post_proj attention.layer_norm ffn.linear_1 ffn.linear_2 ffn.layer_norm",
        (
            Output("attn", "attention.post_proj", residual="attention", norm_out="attention.layer_norm"),
            Output("mlp", "ffn.linear_2", residual="ffn", norm_out="ffn.layer_norm"),
        ),
        optional="attention ffn",
    ),
    BlockTemplate(  # Perceiver; its attention may look elsewhere, and may have no residual
        "attention.self.layernorm1 attention.output.dense layernorm mlp",
        (before("mlp", "mlp", "layernorm"),),
        optional="attention",
    ),
    BlockTemplate(
        "self_attn self_attn_layer_norm feed_forward feed_forward_layer_norm",
        (
            behind("attn", "self_attn", "self_attn_layer_norm", _last("self_attn", _PROJECTED)),
            behind("cross", "cross_attn", "cross_attn_layer_norm", _last("cross_attn", _PROJECTED)),
            behind("mlp", "feed_forward", "feed_forward_layer_norm"),
        ),
        without="self_attn.relative_pos_embeddings",
        optional="cross_attn cross_attn_layer_norm",
        cross="cross_attn",
    ),
    *(
        BlockTemplate(
            f"self_attn_layer_norm self_attn {norm} ffn",
            (
                before("attn", "self_attn", "self_attn_layer_norm", _last("self_attn", _PROJECTED)),
                before("cross", "cross_attention", "cross_attention_layer_norm", _last("cross_attention", _PROJECTED)),
                before("mlp", "ffn", norm),
            ),
            optional="cross_attention cross_attention_layer_norm",
            cross="cross_attention",
        )
        for norm in ("ff_layer_norm", "ffn_layer_norm")
    ),
    BlockTemplate(  # XLNet, whose attention holds its projections as parameters
        "rel_attn.layer_norm ff.layer_1 ff.layer_2 ff.layer_norm",
        (Output("mlp", "ff.layer_2", residual="ff", norm_out="ff.layer_norm"),),
        optional="rel_attn ff",
    ),
    _t5(1, f"{_T5_SELF} layer.1.layer_norm layer.1.DenseReluDense|layer.1.mlp", cross=False),
    _t5(2, f"{_T5_SELF} layer.1.EncDecAttention layer.2.layer_norm layer.2.DenseReluDense|layer.2.mlp", cross=True),
)
