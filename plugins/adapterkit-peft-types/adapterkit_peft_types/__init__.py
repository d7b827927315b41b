"""Types of PEFT. This module is what adapterkit imports when it starts, so it imports no torch."""

from __future__ import annotations

from adapterkit import hookimpl
from adapterkit.specs import AdapterSpec, CodecSpec

# One line a type, in the order of their names.
_TYPES = (
    ("beft", "beft:BEFT", "weight", "a bias beside the one that a projection has"),
    ("c3a", "c3a:C3A", "weight", "an update of circulant blocks"),
    ("cpt", "cpt:CPT", "tokens", "examples as a prompt, whose vectors move a little"),
    ("deft", "deft:DEFT", "weight", "a subspace of a weight taken out, and another put in"),
    ("delora", "delora:DeLoRA", "weight", "a low-rank update whose size is bounded, and learnt apart"),
    ("elementwise_glora", "glora:ElementwiseGLoRA", "weight", "weight and bias scaled and shifted, element by element"),
    ("gralora", "gralora:GraLoRA", "weight", "low-rank updates of the blocks of a weight"),
    ("hira", "hira:HiRA", "weight", "a weight times a low-rank one, element by element"),
    ("hra", "hra:HRA", "weight", "a chain of reflections of a weight's columns"),
    ("input_oft", "input_oft:InputOFT", "weight", "a rotation of blocks of what a layer takes"),
    ("lily", "lily:Lily", "weight", "low-rank updates whose second factors all layers share and mix"),
    ("miss", "miss:MiSS", "weight", "one update for all shards of a weight"),
    ("multitask_prompt", "multitask_prompt:MultitaskPrompt", "tokens", "a prompt of all tasks, times one of each"),
    ("osf", "osf:OSF", "weight", "a weight's smaller singular values and their vectors, learnt anew"),
    ("para", "deft:PaRa", "weight", "a subspace of a weight taken out"),
    ("peanut", "peanut:PEANuT", "weight", "an update that a small network makes from the weight"),
    ("poly", "poly:Poly", "weight", "low-rank skills, mixed for each task"),
    ("psoft", "psoft:PSOFT", "weight", "a rotation inside of a weight's principal subspace"),
    ("pvera", "pvera:PVeRA", "weight", "VeRA with features that training draws from a distribution"),
    ("randlora", "randlora:RandLoRA", "weight", "a full-rank update of random bases that all layers share"),
    ("road", "road:RoAd", "weight", "a rotation of pairs of output features"),
    ("shira", "shira:SHiRA", "weight", "a sparse update at fixed places"),
    ("supertuning", "supertuning:SuperTuning", "weight", "the largest entries of a weight, and a LoRA beside"),
    ("tinylora", "tinylora:TinyLoRA", "weight", "a few numbers, inside of a weight's principal subspace"),
    ("vblora", "vblora:VBLoRA", "weight", "factors that are mixed from one bank of vectors"),
    ("waveft", "waveft:WaveFT", "weight", "a weight's update from a few wavelet coefficients"),
)  # fmt: skip


@hookimpl
def adapterkit_register_adapters() -> list[AdapterSpec]:
    """Adds every type of `_TYPES`."""
    return [
        AdapterSpec(name, f"adapterkit_peft_types.{target}", kinds={kind}, summary=summary)
        for name, target, kind, summary in _TYPES
    ]


# Name, target below adapterkit_peft_types.codecs, summary. What they say is said in files of PEFT.
_CODECS = (
    ("peft_beft", "beft:BEFTCodec", "beft_bias"),
    ("peft_c3a", "c3a:C3ACodec", "c3a_kernel"),
    ("peft_cpt", "cpt:CPTCodec", "prompt_embeddings of a CPT config"),
    ("peft_deft", "deft:DEFTCodec", "deft_P, deft_R"),
    ("peft_delora", "delora:DeLoRACodec", "delora_A, delora_B, delora_lambda, delora_w_norm"),
    ("peft_glora", "glora:GLoRACodec", "glora_A to glora_E"),
    ("peft_gralora", "gralora:GraLoRACodec", "gralora_A, gralora_B"),
    ("peft_hira", "hira:HiRACodec", "hira_A, hira_B"),
    ("peft_hra", "hra:HRACodec", "hra_u"),
    ("peft_lily", "lily:LilyCodec", "lily_A, lily_B, lily_router"),
    ("peft_miss", "miss:MiSSCodec", "miss_block, or Bone's bone_block"),
    ("peft_multitask_prompt", "multitask_prompt:MultitaskPromptCodec", "prefix_task_cols, prefix_task_rows"),
    ("peft_oft", "input_oft:InputOFTCodec", "oft_R"),
    ("peft_osf", "subspaces:OSFCodec", "osf_svd_params"),
    ("peft_peanut", "peanut:PEANuTCodec", "peanut_A, peanut_B, their encoders and decoders"),
    ("peft_poly", "poly:PolyCodec", "poly_lora_A, poly_lora_B, poly_router"),
    ("peft_psoft", "subspaces:PSOFTCodec", "psoft_R"),
    ("peft_pvera", "pvera:PVeRACodec", "pvera_lambda_b, pvera_lambda_d, pvera_A, pvera_B"),
    ("peft_randlora", "randlora:RandLoRACodec", "randlora_lambda, randlora_gamma and the bases"),
    ("peft_refused", "refused:RefusedCodec", "X-LoRA and AdaMSS: why not, and what instead"),
    ("peft_road", "road:RoAdCodec", "road_theta, road_alpha"),
    ("peft_shira", "shira:SHiRACodec", "shira_weight, shira_indices"),
    ("peft_supertuning", "supertuning:SuperTuningCodec", "supertuning_values, supertuning_indices"),
    ("peft_tinylora", "tinylora:TinyLoRACodec", "tinylora_A, tinylora_B, tinylora_P, tinylora_v"),
    ("peft_vblora", "vblora:VBLoRACodec", "vblora_logits_A, vblora_logits_B or the choice that they make"),
    ("peft_waveft", "waveft:WaveFTCodec", "waveft_spectrum"),
)  # fmt: skip


@hookimpl
def adapterkit_register_codecs() -> list[CodecSpec]:
    """Adds every codec of `_CODECS`."""
    return [
        CodecSpec(name, f"adapterkit_peft_types.codecs.{target}", dialect="peft", summary=summary)
        for name, target, summary in _CODECS
    ]
