"""What the task learns from: pictures as latents, captions as embeddings, computed before the steps and kept."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from adapterkit.errors import ConfigError
from adapterkit.training.data_files import Notes, listed
from adapterkit.training.data_record import DataRecord
from adapterkit.training.diffusion.foreseeing import foreseen, too_long
from adapterkit.training.diffusion.loading import outlined_recipe
from adapterkit.training.diffusion.options import Options
from adapterkit.training.diffusion.priors import fill
from adapterkit.training.diffusion.recipe import Recipe
from adapterkit.training.diffusion.residence import Residence
from adapterkit.training.diffusion.texts import Texts
from adapterkit.training.diffusion.vae import wide_enough
from adapterkit.training.diffusion.validation import held_out, still
from adapterkit.training.diffusion.words import Words
from adapterkit.training.parts import inference
from adapterkit.training.pictures.dataset import Pictures
from adapterkit.training.pictures.identity import identity_of
from adapterkit.training.pictures.latents import Latents
from adapterkit.training.pictures.options import RANDOM
from adapterkit.training.pictures.plan import Plan
from adapterkit.training.pictures.store import FolderStore, MemoryStore
from adapterkit.training.pictures.survey import Picture, pictures_of, survey
from adapterkit.training.sizes import Size
from adapterkit.training.task import Setting, Task


class Material(Task):
    """The part of the task that knows pictures and captions."""

    options: Options
    pipe: Any
    recipe: Recipe
    residence: Residence
    words: Words
    size: Size
    texts: Texts

    @functools.cached_property
    def surveyed(self) -> tuple[list[Picture], DataRecord]:
        """The pictures, and what a run keeps of them."""
        return survey(Path(self.config.data), self.options, self.config.num_workers)

    def survey(self, before: DataRecord | None) -> DataRecord:
        """Finds the pictures and their captions, and decodes every picture once."""
        record = self.surveyed[1]
        if self.measured:
            record = replace(record, facts={**record.facts, "pictures that measure": str(len(self.measured))})
        return record

    def foresee(self, outline: Any) -> Mapping[str, str]:
        """Sizes, cuts and tokens."""
        return foreseen(self.surveyed[0], outlined_recipe(self.config.model, outline, self.options))

    @functools.cached_property
    def measured(self) -> list[Picture]:
        """The pictures of `validation_data`."""
        folder = self.options.validation_data
        alone = self.options.model_copy(update={"concepts": []})
        return (
            []
            if folder is None
            else [still(picture) for picture in survey(Path(folder), alone, self.config.num_workers)[0]]
        )

    def parted(
        self, pictures: Sequence[Picture], tell: Callable[[str], object]
    ) -> tuple[Sequence[Picture], list[Picture]]:
        """Those that are trained on, and those that are measured.

        Raises:
            ConfigError: There are too few.
        """
        if self.measured:
            known = {picture.key for picture in pictures}
            if both := [picture.path.name for picture in self.measured if picture.key in known]:
                tell(f"data: pictures of options.validation_data that are trained on, too: {listed(both)}")
        if not self.options.validation_fraction:
            return pictures, self.measured
        chosen = held_out(pictures, self.options.validation_fraction, self.config.seed)
        if not chosen:
            raise ConfigError(["options.validation_fraction: there is one picture only; leave it out"], "run")
        apart = {picture.path for picture in chosen}
        return [picture for picture in pictures if picture.path not in apart], [still(picture) for picture in chosen]

    def learnt(self) -> list[Picture]:
        """The pictures that are not a prior."""
        return [picture for picture in self.surveyed[0] if not picture.concept.prior]

    def triggers(self) -> Sequence[str]:
        """Those of the concepts."""
        return list(dict.fromkeys(picture.concept.trigger for picture in self.learnt() if picture.concept.trigger))

    def captions_told(self, setting: Setting) -> Texts:
        """What the denoiser is told about captions, kept where the adapter leaves the encoders alone."""
        pictures = self.surveyed[0]
        limit, long = too_long(pictures, self.recipe)
        if long:
            setting.tell(f"data: captions cut to the {limit} tokens that the text encoder reads: {listed(long)}")
        encoders = self.recipe.text_parts()
        live = bool(setting.components & encoders.keys())
        fixed = not live and all(concept.wording.fixed for concept in self.options.folders())  # the others never end
        model = f"{self._identity(*encoders.values())} {self.options.caption_chunks}" if fixed else ""
        reading = functools.partial(self.residence.needing, encoders)
        texts = Texts(self.recipe, self.words, setting.device, live, self._store() if fixed else None, model, reading)
        shown = [caption for picture in (*pictures, *self.measured) for caption in picture.captions]
        to_be_made = [c.wording.whole(c.caption) for c in self.options.folders() if c.generate and c.caption]
        with reading():
            kept = fixed and texts.prepare(list(dict.fromkeys(["", *shown, *to_be_made])), setting.tell)
        if not kept:
            self.residence.stay(encoders)
        return texts

    def with_priors(self, tell: Callable[[str], object]) -> list[Picture]:
        """All pictures, after the base has made those that concepts ask for; without the adapter."""
        data, pictures = Path(self.config.data), self.surveyed[0]
        for concept in (concept for concept in self.options.folders() if concept.generate):
            there = [picture for picture in pictures if picture.concept == concept]
            with inference(self.pipe), self.residence.needing():
                made = fill(concept, data / concept.folder, len(there), self._drawn, tell)
            if made:
                others = [picture for picture in pictures if picture.concept != concept]
                pictures = [*others, *pictures_of(concept, data, self.options, Notes(data))]
        return pictures

    def _drawn(self, caption: str, seed: int) -> Any:
        generator, options = torch.Generator().manual_seed(seed), self.options
        return self.recipe.draw(caption, self.size, options.sample_steps, options.guidance_scale, generator)

    def examples(self, pictures: Sequence[Picture], tell: Callable[[str], object]) -> Pictures:
        """Examples of these pictures, with all latents computed.

        Raises:
            ConfigError: There are masks at random, and the model paints no holes.
        """
        if not self.recipe.paints_holes and any(picture.concept.masks == RANDOM for picture in pictures):
            told = f"is for inpainting models, and this is a {type(self.pipe).__name__}"
            raise ConfigError([f"options.masks: {RANDOM!r} {told}; leave it out"], "run")
        plan = Plan.of(pictures, self.options, self.size, self.recipe.multiple, self.recipe.longest)
        for name, value in plan.facts().items():
            tell(f"data: {name}: {value}")
        if small := plan.small_sizes(self.config.batch_size):
            tell(f"data: sizes with fewer examples than a batch, which then shows some more than once: {small}")
        examples = plan.examples()
        latents = Latents(self._store() or MemoryStore(), self._identity(self.pipe.vae), self.recipe.paints_holes)
        with self.residence.needing(("vae",)), wide_enough(self.pipe.vae):
            latents.prepare([shot for e in examples for shot in e.shots], self.recipe.encode_pictures, tell)
        return Pictures(examples, latents, self.options.unmasked_weight)

    def _store(self) -> FolderStore | None:
        """What outlives the run; None where memory does."""
        return None if self.options.cache is None else FolderStore(Path(self.options.cache))

    def _identity(self, *modules: torch.nn.Module) -> str:
        """Which models compute something, and how; of no use in memory."""
        if self.options.cache is None:
            return ""
        config = {key: value for key, value in self.pipe.config.items() if not key.startswith("_")}
        return f"{type(self.recipe).__qualname__} {sorted(config.items(), key=str)} {identity_of(*modules)}"
