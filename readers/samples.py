"""Reads images to be scored or completed: a folder, an archive or an .npz file."""

import logging
import pathlib
from typing import NamedTuple

import numpy as np
from PIL import Image

from configs.errors import UserError
from data.labels import Labels
from readers import arrays
from readers.containers import is_archive_name, open_container
from readers.decode import Fit
from readers.image_files import Part, records_of
from readers.source import ArraySource, RecordSource, Source

log = logging.getLogger("soft_truncation")


class LoadedImages(NamedTuple):
    """Images to be scored.

    Attributes:
      source: the images; its labels mean nothing.
      names: their files' names, or their numbers from 0.
      labels: the name of each image's class: its number in dataset.json or in the array `labels`,
        or its folder; None: they have none.
    """

    source: Source
    names: list[str]
    labels: list[str] | None


def load_images(
    path: pathlib.Path,
    size: int,
    channels: int,
    option: str,
    least: int = 4,
    fit: Fit | None = None,
) -> LoadedImages:
    """Read images, with their names and labels.

    Args:
      path: a folder or an archive of image files, or an .npz file with an array `samples`, or only
        one, of (N, H, W, C) uint8, and `labels` if there are any.
      size, channels: the size and channels that the images must have.
      option: the config's field of the path, for messages.
      least: the number of images that are needed.
      fit: converts image files to that size; None: files of another size or mode are refused.

    Raises:
      UserError: there are too few images, they have another size, or they can't be read.
    """
    mode = "L" if channels == 1 else "RGB"
    source: Source
    labels: Labels | None

    def as_it_is(image: Image.Image) -> np.ndarray:
        # An image of another mode is refused: converting it would change the scored images.
        if image.mode != mode:
            raise ValueError(f"its mode is {image.mode}, and {mode} is needed")
        if image.size != (size, size):
            raise ValueError(f"it is {image.width}×{image.height}, not {size}×{size} pixels")
        return np.asarray(image).reshape(size, size, channels)

    if path.is_dir() or (path.is_file() and is_archive_name(path.name)):
        part = Part(open_container(path))
        part.check(least, option=option)
        identity = repr(part.container.identity()).encode()
        source = RecordSource(records_of(part.container, part.names), fit or as_it_is, identity)
        names = part.names
        labels, note = part.labels()
    else:
        images, labels = arrays.images_and_labels(path, arrays.load(path, option), option)
        expected = (f"N ≥ {least}", size, size, channels)
        if images.shape[1:] != expected[1:] or images.dtype != np.uint8 or len(images) < least:
            raise UserError(
                f"{option}: {path} has {images.dtype} of shape {images.shape}; uint8 of "
                f"{expected} is needed"
            )
        source = ArraySource(np.asarray(images), np.zeros(len(images), int))
        names, note = [str(i) for i in range(len(images))], ""
        if labels is not None and (labels.shape != (len(images),) or labels.dtype.kind not in "iu"):
            labels, note = None, f"labels of {path} are not used: they are no whole numbers"
    if note:
        log.warning("%s", note)
    return LoadedImages(source, names, None if labels is None else [str(name) for name in labels])
