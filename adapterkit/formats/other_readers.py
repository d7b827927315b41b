"""Which other programs are known to read a file of the dialect `lycoris` wrongly, or not at all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set

from torch import Tensor

_NOT_IN_DIFFUSERS = {
    "LoHa": {"hada_w1_a"},
    "LoKr": {"lokr_w1", "lokr_w1_a"},
    "a Tucker factor": {"lora_mid.weight"},
    "whole differences": {"diff", "diff_b", "w_norm", "b_norm"},
    "GLoRA": {"a1.weight"},
    "OFT": {"oft_blocks"},
    "(IA)3": {"on_input"},
}
"""What diffusers refuses, or loads without effect, for most models -> a tensor name that tells."""
_ROTATIONS = frozenset({"oft_blocks"})
_ATTENTION = ("_attn1_to_", "_attn2_to_", "_self_attn_")


def told(
    modules: Sequence[tuple[str, Set[str]]],
    keys: Mapping[str, str],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
) -> list[str]:
    """One sentence for everything that is known.

    Args:
        modules: What the file calls its modules, each with the names of its tensors.
        keys: `module.tensor` as in `modules` -> the file's key.
        tensors: Those of the file that were read, by key.
        metadata: The file's.
    """
    found = [*_by_names(modules), *_by_values(modules, keys, tensors)]
    if '"split_qkv": "True"' in metadata.get("ss_network_args", ""):
        found.append("sd-scripts trained it with split_qkv, three or four times as strong as it is saved")
    return found


def _by_names(modules: Sequence[tuple[str, Set[str]]]) -> Iterator[str]:
    names = frozenset[str]().union(*(own for _, own in modules))
    if found := [kind for kind, signs in _NOT_IN_DIFFUSERS.items() if signs & names]:
        yield f"diffusers does not read {', '.join(found)}"
    if "lokr_t2" in names:
        yield "ComfyUI computes LoKr with a Tucker factor otherwise"
    if "on_input" in names:
        yield "ComfyUI does not read (IA)3"
    of_scripts = [name for name, own in modules if name.startswith("oft_unet_") and own & _ROTATIONS]
    if of_scripts:
        yield "ComfyUI does not read oft_unet_"
    if any("_resnets_" in name for name in of_scripts):
        yield "sd-scripts drops OFT of convolutions whose names are diffusers'"


def _by_values(
    modules: Sequence[tuple[str, Set[str]]], keys: Mapping[str, str], tensors: Mapping[str, Tensor]
) -> Iterator[str]:
    def having(*names: str) -> Iterable[tuple[str, Tensor]]:
        for module, own in modules:
            for name in names:
                if name in own and (key := keys[f"{module}.{name}"]) in tensors:
                    yield module, tensors[key]

    if any(scale.ndim > 1 and scale.shape[0] > 1 for _, scale in having("dora_scale")):
        yield "ComfyUI computes DoRA with a magnitude for each output otherwise"
    if any(True for _ in having("dora_scale")):
        yield "diffusers drops the magnitudes of DoRA"
    rotated = {name for name, own in modules if own & _ROTATIONS}
    limited = any(name in rotated and alpha.numel() == 1 and float(alpha) for name, alpha in having("alpha"))
    if limited or any(True for name, _ in having("rescale") if name in rotated):
        yield "ComfyUI leaves out the constraint and the rescaling of OFT"
    loras = {name for name, own in modules if "lora_up.weight" in own and any(part in name for part in _ATTENTION)}
    alphas = {float(alpha) for name, alpha in having("alpha") if name in loras and alpha.numel() == 1}
    if len(alphas) > 1:
        yield (
            "diffusers reads the attentions with one alpha, and they have several; "
            "save(..., format='kohya') writes one alpha that is right everywhere"
        )
