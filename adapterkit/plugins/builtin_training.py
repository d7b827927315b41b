"""What adapterkit itself trains, and with what: tasks, recipes, optimizers and schedules."""

from __future__ import annotations

from adapterkit.specs import OptimizerSpec, RecipeSpec, ScheduleSpec, TaskSpec

# Name, target below adapterkit.training.diffusion.recipes, pipelines of diffusers, summary.
_RECIPES = (
    ("stable_diffusion", "unet:StableDiffusion", "StableDiffusionPipeline", "Stable Diffusion 1.x and 2.x"),
    ("stable_diffusion_xl", "unet:StableDiffusionXL", "StableDiffusionXLPipeline", "Stable Diffusion XL"),
    ("refiner", "refiner:Refiner", "StableDiffusionXLImg2ImgPipeline", "the refiner of Stable Diffusion XL"),
    ("inpainting", "inpainting:Inpainting", "StableDiffusionInpaintPipeline", "inpainting with 1.x and 2.x"),
    ("inpainting_xl", "inpainting:InpaintingXL", "StableDiffusionXLInpaintPipeline", "inpainting with XL"),
    ("stable_diffusion_3", "sd3:StableDiffusion3", "StableDiffusion3Pipeline", "Stable Diffusion 3 and 3.5"),
    ("flux", "flux:Flux", "FluxPipeline", "Flux.1"),
    ("flux2", "flux2:Flux2", "Flux2Pipeline Flux2KleinPipeline", "Flux.2"),
    ("qwen_image", "qwen_image:QwenImage", "QwenImagePipeline", "Qwen-Image"),
    ("z_image", "z_image:ZImage", "ZImagePipeline", "Z-Image"),
    ("lumina2", "lumina2:Lumina2", "Lumina2Pipeline", "Lumina Image 2"),
    ("pixart", "pixart:PixArt", "PixArtAlphaPipeline", "PixArt-alpha"),
    ("pixart_sigma", "pixart:PixArtSigma", "PixArtSigmaPipeline", "PixArt-Sigma"),
    ("sana", "sana:Sana", "SanaPipeline", "Sana"),
    ("wan", "wan:Wan", "WanPipeline", "Wan 2.1 and 2.2, from pictures"),
)
# Name, target below adapterkit.training.optimizers, the extra that brings its library, summary.
_OPTIMIZERS = (
    ("adamw", "adamw:AdamW", "", "Adam with decoupled weight decay, in one fused kernel where torch has one"),
    ("sgd", "sgd:SGD", "", "stochastic gradient descent, with momentum"),
    ("adafactor", "adafactor:Adafactor", "", "second moments by rows and columns: little memory"),
    ("adamw8bit", "adamw8bit:AdamW8bit", "optimizers", "AdamW with moments of eight bits (bitsandbytes)"),
    ("lion", "lion:Lion", "optimizers", "the sign of a momentum; a third of AdamW's learning rate"),
    ("prodigy", "prodigy:Prodigy", "optimizers", "AdamW that finds its own learning rate: leave it at 1"),
    ("schedule_free", "schedule_free:ScheduleFree", "optimizers", "AdamW that averages, in place of a schedule"),
)
# Name, target below adapterkit.training.schedules, summary.
_SCHEDULES = (
    ("constant", "constant:Constant", "the rate stays"),
    ("linear", "polynomial:Linear", "falls in a straight line"),
    ("polynomial", "polynomial:Polynomial", "falls by a power of what is left"),
    ("cosine", "cosine:Cosine", "falls as half a cosine, several times over where there are restarts"),
    ("inverse_sqrt", "inverse_sqrt:InverseSqrt", "falls with the square root of the step, without an end"),
    ("stable_decay", "stable_decay:StableDecay", "stays, and falls in a last share of the steps"),
)


def tasks() -> list[TaskSpec]:
    """Images from captions, image classes, text."""
    return [
        TaskSpec(
            "diffusion",
            "adapterkit.training.diffusion.task:DiffusionTask",
            summary="a style or a subject from a folder of captioned images",
        ),
        TaskSpec(
            "image-classification",
            "adapterkit.training.classification.task:ImageClassificationTask",
            summary="classes of images, from folders of classes or a table of labels",
        ),
        TaskSpec(
            "causal-lm",
            "adapterkit.training.language.task:CausalLMTask",
            summary="a language model from texts, prompts with their completions, or conversations",
        ),
        TaskSpec(
            "preference",
            "adapterkit.training.language.preference.task:PreferenceTask",
            summary="a language model from pairs of answers, or answers that are good or bad (DPO and its kin)",
        ),
        TaskSpec(
            "text-classification",
            "adapterkit.training.language.classification:TextClassificationTask",
            summary="classes of texts, from rows of a text and a label",
        ),
        TaskSpec(
            "text-embedding",
            "adapterkit.training.language.embedding.task:TextEmbeddingTask",
            summary="embeddings of texts, from pairs that belong together",
        ),
    ]


def recipes() -> list[RecipeSpec]:
    """Every recipe of `_RECIPES`."""
    return [
        RecipeSpec(
            name,
            f"adapterkit.training.diffusion.recipes.{target}",
            pipelines=tuple(f"diffusers:{cls}" for cls in names.split()),
            summary=summary,
        )
        for name, target, names, summary in _RECIPES
    ]


def optimizers() -> list[OptimizerSpec]:
    """Torch's own, and those of packages that are kept well."""
    return [
        OptimizerSpec(name, f"adapterkit.training.optimizers.{target}", extra=extra, summary=summary)
        for name, target, extra, summary in _OPTIMIZERS
    ]


def schedules() -> list[ScheduleSpec]:
    """What follows the warm-up."""
    return [
        ScheduleSpec(name, f"adapterkit.training.schedules.{target}", summary=summary)
        for name, target, summary in _SCHEDULES
    ]
