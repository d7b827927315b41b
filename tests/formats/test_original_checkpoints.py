"""Namings against diffusers' own conversion of original checkpoints: names, order of rows, halves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adapterkit.formats.foreign_names import ForeignNames
from adapterkit.formats.names.tables import TableNaming
from adapterkit.handle.view import seen
from adapterkit.mapping.model import map_model

EMBED = {"axes_dims_rope": [2, 2, 4]}


def flux() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=8, num_attention_heads=384,
        joint_attention_dim=12, pooled_projection_dim=8, guidance_embeds=True, **EMBED,
    )  # fmt: skip


def chroma() -> nn.Module:
    from diffusers import ChromaTransformer2DModel

    return ChromaTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=384,
        joint_attention_dim=12, approximator_num_channels=8, approximator_hidden_dim=8, approximator_layers=2, **EMBED,
    )  # fmt: skip


def flux2() -> nn.Module:
    from diffusers import Flux2Transformer2DModel

    return Flux2Transformer2DModel(
        in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, timestep_guidance_channels=8, axes_dims_rope=(2, 2, 2, 2),
    )  # fmt: skip


def sd3(**changes: Any) -> nn.Module:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=8, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=12,
        caption_projection_dim=16, pooled_projection_dim=8, pos_embed_max_size=8, **changes,
    )  # fmt: skip


def sd35() -> nn.Module:
    return sd3(qk_norm="rms_norm", dual_attention_layers=(0,))


def lumina2() -> nn.Module:
    from diffusers import Lumina2Transformer2DModel

    return Lumina2Transformer2DModel(
        sample_size=8, in_channels=4, hidden_size=2304, num_layers=1, num_refiner_layers=1, num_attention_heads=24,
        num_kv_heads=8, multiple_of=4, ffn_dim_multiplier=0.01, axes_dim_rope=(32, 32, 32), cap_feat_dim=8,
    )  # fmt: skip


def z_image() -> nn.Module:
    from diffusers import ZImageTransformer2DModel

    return ZImageTransformer2DModel(
        in_channels=4, dim=16, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=8,
        axes_dims=[2, 2, 4], axes_lens=[8, 8, 8],
    )  # fmt: skip


def wan() -> nn.Module:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8, freq_dim=8, ffn_dim=16,
        num_layers=2, image_dim=8, added_kv_proj_dim=24,
    )  # fmt: skip


def wan_vace() -> nn.Module:
    from diffusers import WanVACETransformer3DModel

    return WanVACETransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8, freq_dim=8, ffn_dim=16,
        num_layers=2, vace_layers=[0, 1], vace_in_channels=6,
    )  # fmt: skip


def hunyuan_video() -> nn.Module:
    from diffusers import HunyuanVideoTransformer3DModel

    return HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=384, attention_head_dim=8, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, mlp_ratio=0.01, text_embed_dim=8, pooled_projection_dim=8, rope_axes_dim=(2, 2, 4),
    )  # fmt: skip


def ltx() -> nn.Module:
    from diffusers import LTXVideoTransformer3DModel

    return LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        num_layers=2, caption_channels=8,
    )  # fmt: skip


def sana() -> nn.Module:
    from diffusers import SanaTransformer2DModel

    return SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2, attention_head_dim=8,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=8,
        sample_size=8,
    )  # fmt: skip


def aura_flow() -> nn.Module:
    from diffusers import AuraFlowTransformer2DModel

    return AuraFlowTransformer2DModel(
        sample_size=8, in_channels=4, num_mmdit_layers=2, num_single_dit_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=8, caption_projection_dim=16, out_channels=4, pos_embed_max_size=16,
    )  # fmt: skip


def mochi() -> nn.Module:
    from diffusers import MochiTransformer3DModel

    return MochiTransformer3DModel(
        in_channels=4, num_layers=48, attention_head_dim=8, num_attention_heads=2, pooled_projection_dim=8,
        text_embed_dim=8, time_embed_dim=8,
    )  # fmt: skip


def cosmos() -> nn.Module:
    from diffusers import CosmosTransformer3DModel

    return CosmosTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=2, mlp_ratio=2,
        text_embed_dim=8, adaln_lora_dim=4, max_size=(4, 8, 8), extra_pos_embed_type=None,
    )  # fmt: skip


def ltx2() -> nn.Module:
    from diffusers import LTX2VideoTransformer3DModel

    return LTX2VideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2, audio_attention_head_dim=8,
        audio_cross_attention_dim=16, num_layers=2, caption_channels=8,
    )  # fmt: skip


MODELS: Mapping[str, tuple[Callable[[], nn.Module], str, tuple[str, ...]]] = {
    "flux": (flux, "flux_transformer_checkpoint", ()),
    "chroma": (chroma, "chroma_transformer_checkpoint", ()),
    "flux2": (flux2, "flux2_transformer_checkpoint", ()),
    "sd3": (sd3, "sd3_transformer_checkpoint", ("pos_embed",)),
    "sd35": (sd35, "sd3_transformer_checkpoint", ("pos_embed",)),
    "lumina2": (lumina2, "lumina2", ()),
    "z_image": (z_image, "z_image_transformer_checkpoint", ()),
    "wan": (wan, "wan_transformer", ()),
    "wan_vace": (wan_vace, "wan_transformer", ()),
    "hunyuan_video": (hunyuan_video, "hunyuan_video_transformer", ()),
    "ltx": (ltx, "ltx_transformer_checkpoint", ()),
    "sana": (sana, "sana_transformer", ("pos_embed", "y_embedder.y_embedding", "final_layer.scale_shift_table")),
    "aura_flow": (aura_flow, "auraflow_transformer_checkpoint", ("positional_encoding",)),
    "cosmos": (cosmos, "cosmos_transformer_checkpoint", ()),
    "ltx2": (ltx2, "ltx2_transformer", ()),
    "mochi": (mochi, "mochi_transformer_checkpoint", ("pos_frequencies",)),
}


class Checkpoint(dict[str, Tensor]):
    """What a converter takes from and does not find is a parameter that is no module's."""

    def pop(self, key: str, *default: Any) -> Any:
        return super().pop(key, default[0] if default else torch.zeros(1))


@pytest.mark.filterwarnings("ignore:`FluxPosEmbed`:FutureWarning")
@pytest.mark.parametrize("name", MODELS)
def test_the_naming_undoes_what_diffusers_does_to_an_original_checkpoint(name: str) -> None:
    """Of every weight its rows are numbered, all different: the model needs no values, and sizes may be true."""
    from diffusers.loaders import single_file_utils

    make, converter, others = MODELS[name]
    with torch.device("meta"):
        model = make()
    view = seen(map_model(model)).model
    assert view is not None
    [component] = view.components.values()
    rows = numbered(model)
    covered, original = set[str](), Checkpoint({key: torch.zeros(2) for key in others})
    for foreign, pieces in (names := ForeignNames(component)).written("kohya"):
        for kind in ("weight", "bias"):
            own = [rows.get(f"{piece.path}.{kind}") for piece in pieces]
            if all(one is not None for one in own):
                covered |= {f"{piece.path}.{kind}" for piece in pieces}
                parts = [swapped(one) if piece.halves_swapped else one for piece, one in zip(pieces, own, strict=True)]
                original[f"{foreign}.{_kind(foreign, kind)}"] = torch.cat(parts)  # type: ignore[arg-type]
    convert = getattr(single_file_utils, f"convert_{converter}_to_diffusers")
    assert [foreign for foreign in original if foreign.startswith(tuple(renamed_blocks(names)))] == []
    found = convert(original)
    assert covered == {key for key in rows if key.rpartition(".")[2] in ("weight", "bias")}
    wrong = [key for key in sorted(covered) if key not in found or not torch.equal(found[key], rows[key])]
    assert wrong == []


def renamed_blocks(names: ForeignNames) -> Iterator[str]:
    """What blocks of ours are called that others call otherwise: a module there that keeps its name was forgotten."""
    rows = [row for naming in names._namings if isinstance(naming, TableNaming) for row in naming.table]
    blocks = [(foreign.partition("#")[0], own.partition("#")[0]) for foreign, own in rows if "#" in foreign]
    yield from {own.lstrip("~?") for _, own in blocks} - {foreign for foreign, _ in blocks}


def numbered(model: nn.Module) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    start = 0
    for key, tensor in model.state_dict().items():
        size = tensor.shape[0] if tensor.ndim else 1
        found[key] = torch.arange(start, start + size)
        start += size
    return found


def swapped(rows: Tensor) -> Tensor:
    return torch.cat(rows.chunk(2)[::-1])


def _kind(foreign: str, kind: str) -> str:
    """Norms of the Flux family call their weight scale."""
    of_flux = foreign.endswith(("query_norm", "key_norm")) or foreign.startswith("distilled_guidance_layer.norms.")
    return "scale" if of_flux else kind
