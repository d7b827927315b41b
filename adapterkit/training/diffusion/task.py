"""The task `diffusion`: a style or a subject, learnt from a folder of captioned images."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adapterkit.errors import ConfigError
from adapterkit.training.data_files import listed
from adapterkit.training.diffusion.exporting import Exporting
from adapterkit.training.diffusion.learning import Batch, Learning
from adapterkit.training.diffusion.loading import denoiser_of, load_pipeline, outline_pipeline
from adapterkit.training.diffusion.options import Options, SampleOptions
from adapterkit.training.diffusion.pipeline_options import PlaceOptions, StartOptions
from adapterkit.training.diffusion.residence import Residence
from adapterkit.training.diffusion.sample_sizes import check_sizes
from adapterkit.training.diffusion.validation import FIGURE, Validation
from adapterkit.training.diffusion.words import Words
from adapterkit.training.loading import checkpoint_activations, dtype_of
from adapterkit.training.parts import parts_of
from adapterkit.training.pictures.dataset import Pictures
from adapterkit.training.pictures.survey import Picture
from adapterkit.training.samples.prompts import samples_of
from adapterkit.training.sizes import size_of
from adapterkit.training.task import Setting


class DiffusionTask(Exporting):
    """A denoiser of pictures, on a pipeline for which there is a recipe."""

    Options = Options
    suffixes = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
    options: Options
    free_options = frozenset(
        {*SampleOptions.model_fields, *StartOptions.model_fields, *PlaceOptions.model_fields, "cache"}
    )

    def outline(self) -> Any:
        """The pipeline's modules, without those that training does not need."""
        return outline_pipeline(self.config.model)

    def load_model(self) -> Any:
        """The pipeline, in evaluation mode."""
        self.pipe, self.recipe = load_pipeline(self.config.model, self.config.dtype, self.options)
        self.pipe.set_progress_bar_config(disable=True)
        self.words = Words(self.recipe)
        self.residence = Residence(self.pipe, torch.device("cpu"), ())  # until it is placed
        return self.pipe

    def place(self, model: Any, device: torch.device) -> None:
        """What a step needs is on the device; the rest comes when it is needed."""
        needed = {name for name, part in parts_of(model).items() if part is self.recipe.model}
        guests = parts_of(model).keys() - needed if self.options.offload else ()
        self.residence = Residence(model, device, guests)

    def core(self, model: Any) -> nn.Module:
        """The denoiser."""
        return parts_of(model)[denoiser_of(self.config.model)]

    def prepare(self, setting: Setting) -> Pictures:
        """Computes the latents; the captions' embeddings are kept where the adapter leaves them alone."""
        self._set_up(setting.device)
        self.captions = [picture.caption for picture in self.learnt()]
        self.recipe.check()
        self.texts = self.captions_told(setting)
        self.learning = Learning(self.recipe, self.options, self.dtype, self.texts)
        pictures, measured = self.parted(self.with_priors(setting.tell), setting.tell)
        self.validation = self._validation(measured, setting.tell) if measured else None
        return self.examples(pictures, setting.tell)

    def prepare_generation(self, model: Any, device: torch.device) -> None:
        """Only the size of the images is needed."""
        self._set_up(device)
        self.residence.stay(parts_of(model).keys())
        self.captions = []

    def loss(self, batch: Batch) -> Tensor:
        """See `Learning.loss`."""
        return self.learning.loss(batch)

    def evaluate(self) -> Mapping[str, float]:
        """The loss on what is not trained on, where there is something."""
        return {} if self.validation is None else {FIGURE: self.validation.loss(self.learning, self.device)}

    def measures(self) -> Collection[str]:
        """See `evaluate`."""
        return (FIGURE,) if self.options.validation_fraction or self.options.validation_data else ()

    def checkpoint_activations(self) -> None:
        """On the denoiser and, for adapters that act there, the text encoders."""
        self.recipe.model.enable_gradient_checkpointing()
        for encoder in self.recipe.text_parts().values():
            checkpoint_activations(encoder)

    # -- set-up -----------------------------------------------------------------------------------------------------

    def _validation(self, pictures: Sequence[Picture], tell: Callable[[str], object]) -> Validation:
        names = listed([picture.path.name for picture in pictures])
        tell(f"data: measure the loss and are not trained on: {names}")
        data = self.examples(pictures, lambda line: None)
        return Validation(data, self.options.validation_times, self.config.batch_size, self.collate)

    def _set_up(self, device: torch.device) -> None:
        self.device, self.dtype = device, dtype_of(self.config.dtype)
        told, multiple = self.options.resolution, self.recipe.multiple
        size = size_of(told) or self.recipe.size()
        if size is None:
            raise ConfigError(
                ["options.resolution: give one, for the denoiser does not say what it was made for"], "run"
            )
        if size[0] % multiple or size[1] % multiple:
            raise ConfigError([f"options.resolution: must be a multiple of {multiple}, not {told}"], "run")
        check_sizes(samples_of(self.options.prompts, [0]), multiple)
        self.size = size
