"""Recipes of transformers of images and of what else stands still."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from adapterkit.testing.specimens.diffusers_inputs import FRAMES, ROWS, SIDE, TEXT, noise, value, whole
from adapterkit.testing.specimens.diffusers_recipe import (
    HUNYUAN_CONFIG,
    HUNYUAN_INPUTS,
    PLACES,
    SHAPES,
    TIMES,
    TOKENS,
    Recipe,
    listed,
)

IMAGES: Mapping[str, Recipe] = {
    "HunyuanDiT2DModel": Recipe({**HUNYUAN_CONFIG, "num_layers": 4}, HUNYUAN_INPUTS, "image"),
    "LuminaNextDiT2DModel": Recipe(
        {},
        {
            "cross_attention_kwargs": value({}),
            "encoder_mask": value(torch.ones(ROWS, TEXT, dtype=torch.bool)),
            "image_rotary_emb": value(
                torch.polar(
                    torch.ones(16, 16, 8, dtype=torch.float64), torch.linspace(0, 1, 2048).double().view(16, 16, 8)
                )
            ),
        },
        "image",
    ),
    "HiDreamImageTransformer2DModel": Recipe(
        {
            "caption_channels": (32, 32),
            "llama_layers": [0, 0, 0, 0],
            "axes_dims_rope": (4, 4, 8),
            "max_resolution": (8, 8),
        },
        {
            "timesteps": value(torch.tensor([3.0, 400.0], dtype=torch.float64)),
            "encoder_hidden_states_t5": noise(ROWS, TEXT, 32),
            "encoder_hidden_states_llama3": noise(1, ROWS, TEXT, 32),
            "pooled_embeds": noise(ROWS, "text_emb_dim"),
            "img_ids": value(None),
        },
        "image",
    ),
    "DiTTransformer2DModel": Recipe(
        {}, {"class_labels": value(torch.tensor([1, 4])), "timestep": value(torch.tensor([3, 400]))}, "image"
    ),
    "PriorTransformer": Recipe(
        {"num_embeddings": TEXT},
        {
            "hidden_states": noise(ROWS, "embedding_dim"),
            "proj_embedding": noise(ROWS, "embedding_dim"),
            "attention_mask": value(torch.ones(ROWS, TEXT, dtype=torch.bool)),
        },
    ),
    "Transformer2DModel": Recipe({}, {"encoder_hidden_states": noise(ROWS, TEXT, "cross_attention_dim")}, "image"),
    "TransformerTemporalModel": Recipe(
        {}, {"hidden_states": noise(ROWS * FRAMES, "in_channels", SIDE, SIDE), "encoder_hidden_states": value(None)}
    ),
    "BriaFiboTransformer2DModel": Recipe({}, {"text_encoder_layers": listed(noise(ROWS, TEXT, "text_encoder_dim"), 4)}),
    "BriaFibo2Transformer2DModel": Recipe(
        {"injection_layer_ids": (1,), "min_num_gist_tokens": 4, "max_num_gist_tokens": 8, "gist_step": 2},
        {"encoder_hidden_states": noise(ROWS, 2, TEXT, "cap_feat_dim")},
        "image",
    ),
    "ErnieImageTransformer2DModel": Recipe(
        {}, {"text_bth": noise(ROWS, TEXT, "text_in_dim"), "text_lens": value(torch.tensor([TEXT, TEXT]))}, "image"
    ),
    "GlmImageTransformer2DModel": Recipe(
        {},
        {
            "prior_token_id": whole("prior_vq_quantizer_codebook_size", ROWS, SIDE * SIDE // 4),
            "prior_token_drop": value(torch.zeros(ROWS, SIDE * SIDE // 4, dtype=torch.bool)),
        },
        "image",
    ),
    "Ideogram4Transformer2DModel": Recipe(
        {"mrope_section": (4, 2, 2)},
        {
            "hidden_states": noise(ROWS, 7, "in_channels"),
            "encoder_hidden_states": noise(ROWS, 7, "llm_features_dim"),
            "position_ids": PLACES,
            "segment_ids": value(torch.ones(ROWS, 7, dtype=torch.long)),
            "indicator": value(torch.tensor([[3, 3, 3, 2, 2, 2, 2]] * ROWS)),
            "timestep": TIMES,
        },
    ),
    "Krea2Transformer2DModel": Recipe(
        {},
        {
            "encoder_hidden_states": noise(ROWS, TEXT, "num_text_layers", "text_hidden_dim"),
            "position_ids": value(torch.stack([torch.zeros(TEXT + TOKENS), *[torch.arange(TEXT + TOKENS)] * 2], -1)),
        },
        "tokens",
    ),
    "NucleusMoEImageTransformer2DModel": Recipe(
        {"num_layers": 5, "num_experts": 16, "mlp_ratio": 8.0}, {"img_shapes": value([(1, 2, 3)] * ROWS)}, "tokens"
    ),
    "OmniGenTransformer2DModel": Recipe(
        {"pad_token_id": 0, "rope_scaling": {"short_factor": [1.0] * 8, "long_factor": [1.0] * 8}},
        {
            "input_ids": whole("vocab_size", ROWS, TEXT),
            "input_img_latents": value([]),
            "input_image_sizes": value({}),
            "attention_mask": value(torch.ones(ROWS, 22, 22, dtype=torch.float64)),
            "position_ids": value(torch.arange(22).expand(ROWS, -1)),
        },
        "image",
    ),
    "PRXTransformer2DModel": Recipe({"hidden_size": 32, "num_heads": 2, "axes_dim": (8, 8)}, layout="image"),
    "QwenImageTransformer2DModel": Recipe({}, {"img_shapes": SHAPES}, "tokens"),
    "QwenImage21Transformer2DModel": Recipe(
        {},
        {
            "img_shapes": value([[(1, 4, 2)]] * ROWS),
            "hidden_states": noise(ROWS, 8, "in_channels"),
            "img_mask": value(torch.tensor([[False] * TEXT + [True] * 2] * ROWS)),
        },
    ),
    "ZImageControlNetModel": Recipe(
        {"control_layers_places": [0, 1], "control_refiner_layers_places": [0]},
        {
            "x": listed(noise(16, 1, SIDE, SIDE)),
            "t": TIMES,
            "cap_feats": listed(noise(TEXT, 32)),
            "control_context": listed(noise("control_in_dim", 1, SIDE, SIDE)),
        },
    ),
    "RFD4ProteinaTransformer": Recipe(
        {
            "nlayers": 2,
            "feats_seq": ("xt_bb_ca", "xt_local_latents", "token_type"),
            "feats_cond_seq": ("time_emb_bb_ca", "time_emb_local_latents"),
            "feats_pair_repr": ("xt_bb_ca_pair_dists",),
        },
        {
            "bb_ca": noise(ROWS, TOKENS, 3),
            "local_latents": noise(ROWS, TOKENS, "latent_dim"),
            "bb_ca_time": TIMES,
            "local_latents_time": TIMES,
            "padding_mask": value(torch.ones(ROWS, TOKENS, dtype=torch.bool)),
            "token_type": value(torch.zeros(ROWS, TOKENS, dtype=torch.long)),
            "conditioning": value(
                {
                    "is_in_context_conditioning": torch.zeros(ROWS, TOKENS, dtype=torch.bool),
                    "supports_local_latent": torch.ones(ROWS, TOKENS, dtype=torch.bool),
                }
            ),
        },
    ),
    "ZImageTransformer2DModel": Recipe(
        {},
        {
            "x": listed(noise("in_channels", 1, SIDE, SIDE)),
            "t": TIMES,
            "cap_feats": listed(noise(TEXT, "cap_feat_dim")),
        },
    ),
}
