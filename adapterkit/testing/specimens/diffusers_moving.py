"""Recipes of transformers of videos and of sound."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from adapterkit.testing.specimens.diffusers_inputs import FRAMES, ROWS, SIDE, TEXT, noise, value, whole
from adapterkit.testing.specimens.diffusers_recipe import (
    EACH_FRAME,
    SEEN,
    SHAPES,
    TEXTS,
    TIMES,
    TOKENS,
    Recipe,
    listed,
    made,
    turned,
)

MOVING: Mapping[str, Recipe] = {
    "LatteTransformer3DModel": Recipe({"video_length": FRAMES}, layout="video"),
    "Cosmos3OmniTransformer": Recipe(
        {},
        {
            "input_ids": whole("vocab_size", 3),
            "text_indexes": value(torch.arange(3)),
            "position_ids": value(torch.arange(7).expand(3, -1)),
            "und_len": value(3),
            "sequence_length": value(7),
            "vision_tokens": listed(noise(1, "latent_channel", 1, 4, 4), 1),
            "vision_token_shapes": value([(1, 2, 2)]),
            "vision_sequence_indexes": value(torch.arange(3, 7)),
            "vision_mse_loss_indexes": value(torch.arange(3, 7)),
            "vision_timesteps": value(torch.tensor([400.0] * 4, dtype=torch.float64)),
            "vision_noisy_frame_indexes": value([torch.tensor([0])]),
        },
    ),
    "SanaWMLTX2RefinerTransformer3DModel": Recipe(
        {},
        {
            "video_rotary_emb": turned(TOKENS, 32),
            "timestep": value(torch.tensor([[3.0] * TOKENS] * ROWS, dtype=torch.float64)),
        },
        "tokens",
    ),
    "AceStepTransformer1DModel": Recipe(
        {"encoder_hidden_size": 32},
        {
            "hidden_states": noise(ROWS, TOKENS, 64),
            "context_latents": noise(ROWS, TOKENS, 128),
            "encoder_hidden_states": noise(ROWS, TEXT, 32),
        },
    ),
    "CogVideoXTransformer3DModel": Recipe({"sample_frames": 9, "max_text_seq_length": TEXT}, layout="frames"),
    "AnyFlowTransformer3DModel": Recipe({}, {"timestep": EACH_FRAME, "r_timestep": EACH_FRAME}, "frames"),
    "AnyFlowFARTransformer3DModel": Recipe(
        {"chunk_partition": (1, 2)},
        {"chunk_partition": value([1, 2]), "timestep": EACH_FRAME, "r_timestep": EACH_FRAME},
        "frames",
    ),
    "ConsisIDTransformer3DModel": Recipe({"sample_frames": 9, "max_text_seq_length": TEXT}, layout="frames"),
    "MiniMaxMusic3RVQDepthDecoder": Recipe({}, {"inputs_embeds": noise(ROWS, TOKENS, "hidden_size")}),
    "MiniMaxMusic3Transformer1DModel": Recipe(
        {"in_channels": 16, "rotary_dim": 8}, {"encoder_hidden_states": noise(ROWS, SIDE, "condition_dim")}, "sound"
    ),
    "T5FilmDecoder": Recipe(
        {"input_dims": 16, "targets_length": 8},
        {
            "encodings_and_masks": lambda config, generator: [
                (noise(ROWS, TEXT, "d_model")(config, generator), torch.ones(ROWS, TEXT))
            ],
            "decoder_input_tokens": noise(ROWS, 8, "input_dims"),
            "decoder_noise_time": TIMES,
        },
    ),
    "CosmosTransformer3DModel": Recipe(
        {"max_size": (8, 16, 16), "extra_pos_embed_type": None},
        {"padding_mask": value(torch.zeros(1, 1, SIDE, SIDE, dtype=torch.float64))},
        "video",
    ),
    "HunyuanVideoFramepackTransformer3DModel": Recipe(
        {"has_image_proj": True, "has_clean_x_embedder": True},
        {
            "indices_latents": value(torch.arange(FRAMES)),
            "latents_clean": noise(ROWS, "in_channels", 1, SIDE, SIDE),
            "indices_latents_clean": value(torch.arange(1)),
            "latents_history_2x": noise(ROWS, "in_channels", 2, SIDE, SIDE),
            "indices_latents_history_2x": value(torch.arange(2)),
            "latents_history_4x": noise(ROWS, "in_channels", 4, SIDE, SIDE),
            "indices_latents_history_4x": value(torch.arange(4)),
        },
        "video",
    ),
    "JoyImageEditPlusTransformer3DModel": Recipe(
        {}, {"hidden_states": noise(ROWS, TOKENS, "in_channels", 1, 2, 2), "shape_list": SHAPES}
    ),
    "Kandinsky5Transformer3DModel": Recipe(
        {},
        {
            "hidden_states": noise(1, FRAMES, SIDE, SIDE, "in_visual_dim"),
            "encoder_hidden_states": noise(1, TEXT, "in_text_dim"),
            "pooled_projections": noise(1, "in_text_dim2"),
            "timestep": value(torch.tensor([400.0], dtype=torch.float64)),
            "visual_rope_pos": value([torch.arange(FRAMES), torch.arange(SIDE // 2), torch.arange(SIDE // 2)]),
            "text_rope_pos": value(torch.arange(TEXT)),
        },
    ),
    "Kandinsky6Transformer3DModel": Recipe(
        {},
        {
            "hidden_states": lambda config, generator: torch.randn(
                ROWS,
                FRAMES,
                SIDE,
                SIDE,
                (2 if config["visual_cond"] else 1) * config["in_visual_dim"] + bool(config["visual_cond"]),
                generator=generator,
                dtype=torch.float64,
            ),
            "audio_hidden_states": noise(ROWS, TOKENS, "in_audio_dim"),
            "encoder_attention_mask": value(None),
        },
    ),
    "Kandinsky6SRTransformer3DModel": Recipe({}, {"hidden_states": noise(ROWS, FRAMES, SIDE, SIDE, 129)}),
    "LTX2VideoTransformer3DModel": Recipe(
        {},
        {
            "audio_hidden_states": noise(ROWS, 4, "audio_in_channels"),
            "audio_encoder_hidden_states": TEXTS,
            "audio_num_frames": value(4),
            "fps": value(24.0),
        },
        "tokens",
    ),
    "MiniMaxH3Transformer3DModel": Recipe(
        {"rope_freq_dim": 2},
        {
            "hidden_states": noise(1, 4, 96),
            "audio_hidden_states": noise(1, 2, "audio_in_channels"),
            "encoder_hidden_states": noise(1, 3, "text_dim"),
            "timestep": TIMES,
            "timestep_indices": value(torch.tensor([0, 0, 0, 1, 1, 1, 1, 1, 1])),
            "token_tags": value(torch.tensor([1, 1, 1, 0, 0, 0, 0, 2, 2])),
            "position_ids": value(torch.arange(27).reshape(9, 3)),
            "video_indices": value(torch.arange(3, 7)),
            "audio_indices": value(torch.arange(7, 9)),
            "text_indices": value(torch.arange(3)),
        },
    ),
    "SanaWMTransformer3DModel": Recipe(
        {"num_layers": 4},
        {
            "timestep": value(torch.tensor([[[3.0] * FRAMES]] * ROWS, dtype=torch.float64)),
            "encoder_hidden_states": noise(ROWS, 1, TEXT, "caption_channels"),
            "encoder_attention_mask": SEEN,
        },
        "video",
    ),
    "WanAnimateTransformer3DModel": Recipe(
        {
            "motion_encoder_size": 32,
            "motion_encoder_channel_sizes": {str(2**i): 16 for i in range(2, 6)},
            "inject_face_latents_blocks": 1,
        },
        {
            "pose_hidden_states": noise(ROWS, "latent_channels", FRAMES - 1, SIDE, SIDE),
            "face_pixel_values": noise(ROWS, 3, 5, "motion_encoder_size", "motion_encoder_size"),
            "encoder_hidden_states_image": noise(ROWS, 4, "image_dim"),
        },
        "video",
    ),
    "WanAnimate2Transformer3DModel": Recipe(
        {"text_len": TEXT},
        {
            "hidden_states": listed(noise(16, FRAMES, SIDE, SIDE), 1),
            "condition_latents": listed(noise(20, FRAMES, SIDE, SIDE), 1),
            "encoder_hidden_states": listed(noise(TEXT, "text_dim"), 1),
            "timestep": value(torch.tensor([3.0], dtype=torch.float64)),
            "kv_cache": lambda config, generator: made(
                "transformer_wan_animate_2", "WanAnimate2KVCache", config["num_layers"]
            ),
            "kv_cache_mode": value("extract"),
            "seq_len": value(FRAMES * SIDE * SIDE // 4),
            "encoder_hidden_states_image": noise(1, 4, 1280),
            "offset_grid_sizes": value(torch.tensor([[FRAMES, SIDE // 2, SIDE // 2]])),
        },
    ),
    "WanVACETransformer3DModel": Recipe(
        {"vace_layers": [0, 1]}, {"control_hidden_states": noise(ROWS, "vace_in_channels", FRAMES, SIDE, SIDE)}, "video"
    ),
}
