"""What the original checkpoints of LTX-Video call the modules of its transformer."""

from __future__ import annotations

from adapterkit.contract.naming import KnownBase
from adapterkit.formats.names.tables import TableNaming, under

_BLOCK = (
    ("attn1.q_norm", "attn1.norm_q"),
    ("attn1.k_norm", "attn1.norm_k"),
    ("attn2.q_norm", "attn2.norm_q"),
    ("attn2.k_norm", "attn2.norm_k"),
)
TABLE = (
    *under("transformer_blocks.#.", "transformer_blocks.#.", _BLOCK),
    ("patchify_proj", "proj_in"),
    ("adaln_single.emb.timestep_embedder.linear_1", "time_embed.emb.timestep_embedder.linear_1"),
    ("adaln_single.emb.timestep_embedder.linear_2", "time_embed.emb.timestep_embedder.linear_2"),
    ("adaln_single.linear", "time_embed.linear"),
)


class LTXNaming(TableNaming):
    """Most names are the same."""

    table = TABLE
    known = KnownBase("ltxv", "ltx-video", "https://github.com/Lightricks/LTX-Video", 768, 512, folded=True)


_BOTH = ("attn1", "attn2", "audio_attn1", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn")
_MODULATIONS = (
    ("adaln_single", "time_embed"),
    ("audio_adaln_single", "audio_time_embed"),
    ("prompt_adaln_single", "prompt_adaln"),
    ("audio_prompt_adaln_single", "audio_prompt_adaln"),
    ("av_ca_video_scale_shift_adaln_single", "av_cross_attn_video_scale_shift"),
    ("av_ca_a2v_gate_adaln_single", "av_cross_attn_video_a2v_gate"),
    ("av_ca_audio_scale_shift_adaln_single", "av_cross_attn_audio_scale_shift"),
    ("av_ca_v2a_gate_adaln_single", "av_cross_attn_audio_v2a_gate"),
)
_PARTS = ("emb.timestep_embedder.linear_1", "emb.timestep_embedder.linear_2", "linear")


class LTX2Naming(TableNaming):
    """Pictures and sound, and what each sees of the other."""

    table = (
        *(
            row
            for attention in _BOTH
            for row in under(
                f"transformer_blocks.#.{attention}.",
                f"transformer_blocks.#.{attention}.",
                (("q_norm", "norm_q"), ("k_norm", "norm_k")),
            )
        ),
        ("patchify_proj", "proj_in"),
        ("audio_patchify_proj", "audio_proj_in"),
        *((f"{theirs}.{part}", f"{ours}.{part}") for theirs, ours in _MODULATIONS for part in _PARTS),
    )
    known = KnownBase("ltx2", "ltx-video-2", "https://github.com/Lightricks/LTX-2", 768, 512, folded=True)
