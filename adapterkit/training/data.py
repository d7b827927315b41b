"""Reading folders of images, for tasks of plug-ins: with what the built-in tasks read theirs."""

from __future__ import annotations

from pathlib import Path

from adapterkit.training.data_files import Notes
from adapterkit.training.image_files import cover, open_image
from adapterkit.training.image_folder import examine, image_files
from adapterkit.training.pictures.folder import Found, Reading

__all__ = ["Found", "captioned_images", "cover", "examine", "image_files", "open_image"]


def captioned_images(folder: Path, fallback: str | None, notes: Notes | None = None) -> list[Found]:
    """The images of a folder, each with what a text file of its name, or a table, says that it shows.

    Args:
        folder: Of the images, in subfolders too.
        fallback: The caption of those that have none.
        notes: Takes up what is left out.

    Raises:
        DataError: Images lack a caption and there is no fallback, or a caption is no text.
    """
    return Reading(caption=fallback).find(folder, notes or Notes(folder))
