"""Pictures that samples begin from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from adapterkit.errors import ConfigError
from adapterkit.training.diffusion.options import Options
from adapterkit.training.image_files import open_image
from adapterkit.training.sizes import Size


def starting_picture(options: Options, size: Size) -> tuple[Any, Any]:
    """The picture and the mask that the options name, cut to a size; a mask that is all white where they name none.

    Raises:
        ConfigError: They name no picture.
        DataError: One cannot be read.
    """
    from PIL import Image, ImageOps

    if options.sample_image is None:
        raise ConfigError(["options.sample_image: name a picture for samples to begin from"], "run")
    sides, manner = (size[1], size[0]), Image.Resampling.LANCZOS
    picture = ImageOps.fit(open_image(Path(options.sample_image)), sides, manner)
    if options.sample_mask is None:
        return picture, Image.new("L", sides, 255)
    return picture, ImageOps.fit(open_image(Path(options.sample_mask), "L"), sides, manner)
