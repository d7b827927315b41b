"""Language models of transformers: the Llama layout, GPT-2 and BERT, as tables of roles and paths."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from adapterkit.backend import AttentionSeam, Backend
from adapterkit.backends.family import Attention, Fused, Group, Output, Tokens, Weight, is_class, resolve
from adapterkit.backends.transformers_attention import TransformersAttentionSeam
from adapterkit.errors import UnsupportedModelError
from adapterkit.points import InjectionPoint

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Family:
    """The models that share one layout.

    Attributes:
        classes: Base classes in transformers whose models are of this family.
        groups: Where its points are.
    """

    classes: tuple[str, ...]
    groups: tuple[Group, ...]


def _llama_heads(attention: Any) -> tuple[int, int]:
    # Counted on the projection: head_dim need not be hidden size / heads, and kv heads may be fewer than heads.
    return attention.k_proj.out_features // attention.head_dim, attention.head_dim


def _gpt2_heads(attention: Any) -> tuple[int, int]:
    return attention.num_heads, attention.head_dim


def _bert_heads(attention: Any) -> tuple[int, int]:
    return attention.num_attention_heads, attention.attention_head_size


LLAMA = Family(
    classes=("LlamaPreTrainedModel", "MistralPreTrainedModel", "Qwen2PreTrainedModel", "Qwen3PreTrainedModel"),
    groups=(
        Group("model|transformer|", "", (Weight("embed.tokens", "embed_tokens"), Tokens("tokens", "embed_tokens"))),
        Group(
            "model.layers.{layer}|transformer.layers.{layer}|layers.{layer}",
            "{layer}",
            (
                Weight("attn.q", "self_attn.q_proj"),
                Weight("attn.k", "self_attn.k_proj"),
                Weight("attn.v", "self_attn.v_proj"),
                Weight("attn.o", "self_attn.o_proj"),
                Attention("attn.kv", "self_attn", _llama_heads),
                Output("attn", "self_attn.o_proj", residual="input_layernorm", norm_in="input_layernorm"),
                Weight("mlp.gate", "mlp.gate_proj"),
                Weight("mlp.up", "mlp.up_proj"),
                Weight("mlp.down", "mlp.down_proj"),
                Output("mlp", "mlp.down_proj", residual="post_attention_layernorm", norm_in="post_attention_layernorm"),
            ),
        ),
        Group("", "", (Weight("head", "lm_head|score|qa_outputs"),)),
    ),
)

GPT2 = Family(
    classes=("GPT2PreTrainedModel",),
    groups=(
        Group(
            "transformer|", "", (Weight("embed.tokens", "wte"), Weight("embed.pos", "wpe"), Tokens("tokens", "drop"))
        ),
        Group(
            "transformer.h.{layer}|h.{layer}",
            "{layer}",
            (
                Fused(("attn.q", "attn.k", "attn.v"), "attn.c_attn"),
                Weight("attn.o", "attn.c_proj"),
                Attention("attn.kv", "attn", _gpt2_heads),
                Output("attn", "attn.resid_dropout", residual="ln_1", norm_in="ln_1"),
                Weight("cross.q", "crossattention.q_attn"),
                Fused(("cross.k", "cross.v"), "crossattention.c_attn"),
                Weight("cross.o", "crossattention.c_proj"),
                Attention("cross.kv", "crossattention", _gpt2_heads),
                Output("cross", "crossattention.resid_dropout", residual="ln_cross_attn", norm_in="ln_cross_attn"),
                Weight("mlp.up", "mlp.c_fc"),
                Weight("mlp.down", "mlp.c_proj"),
                Output("mlp", "mlp.dropout", residual="ln_2", norm_in="ln_2"),
            ),
        ),
        Group(
            "",
            "",
            (
                Weight("head", "lm_head|score|classifier|qa_outputs"),
                Weight("head.choice", "multiple_choice_head.summary"),
            ),
        ),
    ),
)

# Post-norm: the residual stream enters the `attention` module and the `intermediate` one, and each sublayer's last
# module before the sum is the dropout beside the norm.
BERT = Family(
    classes=("BertPreTrainedModel",),
    groups=(
        Group(
            "bert|",
            "",
            (
                Weight("embed.tokens", "embeddings.word_embeddings"),
                Weight("embed.pos", "embeddings.position_embeddings"),
                Weight("embed.type", "embeddings.token_type_embeddings"),
                Tokens("tokens", "embeddings.dropout"),
                Weight("head.pooler", "pooler.dense"),
            ),
        ),
        Group(
            "bert.encoder.layer.{layer}|encoder.layer.{layer}",
            "{layer}",
            (
                Weight("attn.q", "attention.self.query"),
                Weight("attn.k", "attention.self.key"),
                Weight("attn.v", "attention.self.value"),
                Weight("attn.o", "attention.output.dense"),
                Attention("attn.kv", "attention.self", _bert_heads),
                Output("attn", "attention.output.dropout", residual="attention", norm_out="attention.output.LayerNorm"),
                Weight("cross.q", "crossattention.self.query"),
                Weight("cross.k", "crossattention.self.key"),
                Weight("cross.v", "crossattention.self.value"),
                Weight("cross.o", "crossattention.output.dense"),
                Attention("cross.kv", "crossattention.self", _bert_heads),
                Output(
                    "cross",
                    "crossattention.output.dropout",
                    residual="crossattention",
                    norm_out="crossattention.output.LayerNorm",
                ),
                Weight("mlp.up", "intermediate.dense"),
                Weight("mlp.down", "output.dense"),
                Output("mlp", "output.dropout", residual="intermediate", norm_out="output.LayerNorm"),
            ),
        ),
        Group(
            "",
            "",
            (
                Weight("head", "cls.predictions.decoder|classifier|qa_outputs"),
                Weight("head.transform", "cls.predictions.transform.dense"),
                Weight("head.next", "cls.seq_relationship"),
            ),
        ),
    ),
)

FAMILIES = (LLAMA, GPT2, BERT)


def family_of(model: nn.Module) -> Family:
    """The family whose base class is among the model's classes.

    Raises:
        UnsupportedModelError: There is none.
    """
    for family in FAMILIES:
        if any(is_class(model, "transformers", name) for name in family.classes):
            return family
    known = ", ".join(name for family in FAMILIES for name in family.classes)
    raise UnsupportedModelError(
        f"the language backend does not know {type(model).__name__}: it maps models derived from {known}; "
        "leave out backend= to let adapterkit choose"
    )


class LanguageBackend(Backend):
    """Llama, Mistral, Qwen 2 and 3, GPT-2 and BERT, with any of their heads or none."""

    component = "language"
    ignored: ClassVar[Mapping[str, str]] = {
        "*norm": "a norm's gain is no projection; adapters act on the projections beside it",
        "*LayerNorm": "a norm, as above",
        "*ln_*": "a norm, as above",
        "cls.predictions": "holds a bias alone, which is also the bias of its decoder",
    }

    def points(self, model: nn.Module, component: str) -> list[InjectionPoint]:
        """See `Backend.points`."""
        return resolve(model, family_of(model).groups, component)

    def seam(self, model: nn.Module, point: InjectionPoint) -> AttentionSeam:
        """See `Backend.seam`."""
        return TransformersAttentionSeam() if point.kind == "attention" else super().seam(model, point)
