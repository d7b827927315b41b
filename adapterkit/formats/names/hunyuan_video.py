"""What the original checkpoints of HunyuanVideo call the modules of its transformer."""

from __future__ import annotations

from adapterkit.contract.naming import KnownBase
from adapterkit.formats.names.tables import TableNaming, under

_DOUBLE = (
    ("img_mod.linear", "norm1.linear"),
    ("img_attn_qkv", "attn.to_q attn.to_k attn.to_v"),
    ("img_attn_proj", "attn.to_out.0"),
    ("img_attn_q_norm", "attn.norm_q"),
    ("img_attn_k_norm", "attn.norm_k"),
    ("img_mlp.fc1", "ff.net.0.proj"),
    ("img_mlp.fc2", "ff.net.2"),
    ("txt_mod.linear", "norm1_context.linear"),
    ("txt_attn_qkv", "attn.add_q_proj attn.add_k_proj attn.add_v_proj"),
    ("txt_attn_proj", "attn.to_add_out"),
    ("txt_attn_q_norm", "attn.norm_added_q"),
    ("txt_attn_k_norm", "attn.norm_added_k"),
    ("txt_mlp.fc1", "ff_context.net.0.proj"),
    ("txt_mlp.fc2", "ff_context.net.2"),
)
_SINGLE = (
    ("modulation.linear", "norm.linear"),
    ("linear1", "attn.to_q attn.to_k attn.to_v proj_mlp"),
    ("linear2", "proj_out"),
    ("q_norm", "attn.norm_q"),
    ("k_norm", "attn.norm_k"),
)
_REFINER = (
    ("self_attn_qkv", "attn.to_q attn.to_k attn.to_v"),
    ("self_attn_proj", "attn.to_out.0"),
    ("mlp.fc1", "ff.net.0.proj"),
    ("mlp.fc2", "ff.net.2"),
    ("adaLN_modulation.1", "norm_out.linear"),
    ("norm1", "norm1"),
    ("norm2", "norm2"),
)
_OF_COMFYUI = (
    *(
        (theirs.replace("_attn_", "_attn.").replace(".fc1", ".0").replace(".fc2", ".2").replace(".linear", ".lin"), own)
        for theirs, own in (
            *under("double_blocks.#.", "transformer_blocks.#.", _DOUBLE),
            *under("single_blocks.#.", "single_transformer_blocks.#.", _SINGLE[:1]),
            *under(
                "txt_in.individual_token_refiner.blocks.#.",
                "context_embedder.token_refiner.refiner_blocks.#.",
                _REFINER[:4],
            ),
        )
        if not theirs.endswith("_norm")
    ),
)
TABLE = (
    *under("double_blocks.#.", "transformer_blocks.#.", _DOUBLE),
    *under("single_blocks.#.", "single_transformer_blocks.#.", _SINGLE),
    *under("txt_in.individual_token_refiner.blocks.#.", "context_embedder.token_refiner.refiner_blocks.#.", _REFINER),
    ("txt_in.input_embedder", "context_embedder.proj_in"),
    ("txt_in.t_embedder.mlp.0", "context_embedder.time_text_embed.timestep_embedder.linear_1"),
    ("txt_in.t_embedder.mlp.2", "context_embedder.time_text_embed.timestep_embedder.linear_2"),
    ("txt_in.c_embedder.linear_1", "context_embedder.time_text_embed.text_embedder.linear_1"),
    ("txt_in.c_embedder.linear_2", "context_embedder.time_text_embed.text_embedder.linear_2"),
    ("img_in.proj", "x_embedder.proj"),
    ("time_in.mlp.0", "time_text_embed.timestep_embedder.linear_1"),
    ("time_in.mlp.2", "time_text_embed.timestep_embedder.linear_2"),
    ("guidance_in.mlp.0", "time_text_embed.guidance_embedder.linear_1"),
    ("guidance_in.mlp.2", "time_text_embed.guidance_embedder.linear_2"),
    ("vector_in.in_layer", "time_text_embed.text_embedder.linear_1"),
    ("vector_in.out_layer", "time_text_embed.text_embedder.linear_2"),
    ("final_layer.linear", "proj_out"),
    ("final_layer.adaLN_modulation.1", "~norm_out.linear"),
    *_OF_COMFYUI,
)


class HunyuanVideoNaming(TableNaming):
    """The names of its authors, and those of ComfyUI, which has those of Flux."""

    table = TABLE
    known = KnownBase(
        "hunyuan-video", "hunyuan-video", "https://github.com/Tencent/HunyuanVideo", 1280, 720, folded=True
    )
