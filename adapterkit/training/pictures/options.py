"""The keys of tasks that learn from pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from adapterkit.errors import ConfigError
from adapterkit.training.config import Section
from adapterkit.training.pictures.buckets import Buckets, default_step
from adapterkit.training.pictures.folder import BESIDE, Reading
from adapterkit.training.pictures.looks import Variety
from adapterkit.training.pictures.wording import Wording
from adapterkit.training.sizes import Resolution, Size

Share = Annotated[float, Field(ge=0, le=1)]
ALPHA = "alpha"
"""For `masks`: what is opaque in a picture is learnt."""
RANDOM = "random"
"""For `masks`: rectangles are painted anew, other ones in each look."""


class Manner(Section):
    """What is made of the pictures of one folder, and of what they show.

    Attributes:
        caption: For pictures that have none.
        caption_lines: Whether each line of a `NAME.txt` is a caption, of which a draw says one; otherwise all are one
            together. In a table, a list is several captions.
        trigger: A word that every caption gets: in front, or in place of `[trigger]`, unless it says it already.
        caption_dropout: Share of the draws whose caption is left out, so that guidance keeps working.
        shuffle_tags: Draw the tags of a caption in another order each time.
        tag_dropout: Share of the tags that are left out.
        keep_tags: How many tags at the beginning of a caption stay where they are.
        tag_separator: What stands between tags.
        flip: Mirror half of the draws.
        crops: Cut at different places, and not always in the middle.
        colour: How far brightness, contrast and saturation are changed, such as 0.05.
        masks: Where it is said which parts of a picture are learnt: `alpha` (what is opaque), `files` (`a.mask.png`
            beside `a.jpg`: what is white) or a folder, as seen from `data`, that holds masks by the pictures' names.
            Inpainting models paint these parts anew; for them also `random`, rectangles.
    """

    caption: str | None = None
    caption_lines: bool = False
    trigger: str = ""
    caption_dropout: Share = 0.1
    shuffle_tags: bool = False
    tag_dropout: Share = 0.0
    keep_tags: int = Field(0, ge=0)
    tag_separator: str = Field(",", min_length=1)
    flip: bool = False
    crops: bool = False
    colour: float = Field(0.0, ge=0, le=0.5)
    masks: str | None = Field(None, min_length=1)

    @property
    def wording(self) -> Wording:
        """How captions are said."""
        return Wording(
            self.trigger, self.caption_dropout, self.shuffle_tags, self.tag_dropout, self.keep_tags, self.tag_separator
        )


class Concept(Manner):
    """A folder of pictures. Keys that it does not have are those of the options, but for `trigger` where it is a prior.

    Attributes:
        folder: As seen from `data`.
        repeats: How often each picture is shown; by default as often as `10_name` says, or once.
        weight: Of the loss.
        prior: Whether the pictures show what the model knows already, and is not to lose.
        generate: How many pictures the base adds of `caption` where the folder has fewer; only for a prior.
    """

    folder: str = Field(min_length=1)
    repeats: int | None = Field(None, gt=0)
    weight: float = Field(1.0, ge=0)
    prior: bool = False
    generate: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _check_generate(self) -> Concept:
        if self.generate and not (self.prior and self.caption):
            raise ValueError("generate needs prior: true and a caption, of which the base makes pictures")
        return self


class PictureOptions(Manner):
    """The keys under `options` that say what is learnt from.

    Attributes:
        resolution: Side of the square, in pixels, whose area pictures are brought to, or `[height, width]`; by default
            what the model was made for.
        buckets: Whether pictures keep their shapes, as far as sizes of that area allow; otherwise all are cut to one.
            By default they do, unless `resolution` is a height and a width.
        bucket_step: Sides of other sizes are multiples of it; by default 64 pixels, or less for small ones.
        max_aspect: The longer side of a size by the shorter, at most.
        upscale: Whether small pictures are enlarged. Otherwise they keep their sizes, but for multiples of the step.
        variants: How many looks a picture has with crops, colours or random masks, before they are mirrored.
        unmasked_weight: Weight of what masks leave out.
        caption_column: Of a `metadata.jsonl` or `metadata.csv`; by default text, caption or prompt.
        named_repeats: Whether a folder `10_name` means that what lies there is shown ten times.
        concepts: Folders with keys of their own; by default all that is in `data` is one.
        cache: A folder that keeps latents and embeddings for other runs; by default they are in memory.
    """

    resolution: Resolution = None
    buckets: bool | None = None
    bucket_step: int | None = Field(None, gt=0)
    max_aspect: float = Field(4.0, ge=1)
    upscale: bool = True
    variants: int = Field(4, gt=1, le=64)
    unmasked_weight: Share = 0.0
    caption_column: str | None = Field(None, min_length=1)
    named_repeats: bool = True
    concepts: list[Concept] = Field([])
    cache: str | None = Field(None, min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _share_keys(cls, values: Any) -> Any:
        """Gives every concept the common keys that it has not got."""
        concepts = values.get("concepts") if isinstance(values, dict) else None
        if not isinstance(concepts, list):
            return values
        common = {key: value for key, value in values.items() if key in Manner.model_fields}
        return {**values, "concepts": [_with_common(concept, common) for concept in concepts]}

    def folders(self) -> list[Concept]:
        """The concepts; all of `data` as one where there are none."""
        common = {name: getattr(self, name) for name in Manner.model_fields}
        return self.concepts or [Concept(folder=".", **common)]

    def reading(self, concept: Concept, data: Path) -> Reading:
        """How a concept's folder is read."""
        masks = {None: None, ALPHA: None, RANDOM: None, BESIDE: BESIDE}.get(concept.masks, data / (concept.masks or ""))
        apart = None if self.cache is None else Path(self.cache)
        return Reading(
            concept.caption, self.caption_column, masks, self.named_repeats, apart, lines=concept.caption_lines
        )

    def buckets_of(self, size: Size, multiple: int, longest: int | None = None) -> Buckets:
        """The sizes that pictures are brought to.

        Args:
            size: Height and width that are asked for.
            multiple: The model's, for sides in pixels.
            longest: Side in pixels that the model takes.

        Raises:
            ConfigError: `bucket_step` is no multiple of it.
        """
        if self.bucket_step and self.bucket_step % multiple:
            raise ConfigError([f"options.bucket_step: must be a multiple of {multiple}, not {self.bucket_step}"], "run")
        many = self.buckets if self.buckets is not None else not isinstance(self.resolution, (list, tuple))
        step = (self.bucket_step or default_step(size, multiple)) if many else 0
        return Buckets(size, step, self.max_aspect, self.upscale, longest)

    def variety(self, concept: Concept) -> Variety:
        """How many looks a concept's pictures have."""
        return Variety(concept.flip, concept.crops, concept.colour, concept.masks == RANDOM, self.variants)


def _with_common(concept: Any, common: dict[str, Any]) -> Any:
    if not isinstance(concept, dict):
        return concept
    prior = concept.get("prior") is True
    return {**{key: value for key, value in common.items() if not (prior and key == "trigger")}, **concept}
