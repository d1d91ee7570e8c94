"""Reading images to be scored: a folder, an archive or an .npz file, without converting them."""

import logging
import pathlib
from typing import NamedTuple

import numpy as np
from PIL import Image

from configs.default import UserError
from readers.containers import Folder, is_archive_name, open_container
from readers.decode import is_image_name
from readers.image_files import labels_of, records_of
from readers.layout import Labels
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
    path: pathlib.Path, size: int, channels: int, option: str, least: int = 4
) -> LoadedImages:
    """Read images, with their names and labels.

    Args:
      path: a folder or an archive of image files, or an .npz file with an array `samples` or
        `arr_0` (or only one array) of (N, H, W, C) uint8 pixel values, and with `labels` or
        without.
      size, channels: the size and channels that the images must have.
      option: the config's field of the path, for messages.
      least: the number of images that are needed.

    Raises:
      UserError: there are too few images, they have another size, or they can't be read.
    """
    mode = "L" if channels == 1 else "RGB"

    def as_it_is(image: Image.Image) -> np.ndarray:
        # An image of another mode is refused: converting it would change the scored images.
        if image.mode != mode:
            raise ValueError(f"its mode is {image.mode}, and {mode} is needed")
        if image.size != (size, size):
            raise ValueError(f"it is {image.width}×{image.height}, not {size}×{size} pixels")
        return np.asarray(image).reshape(size, size, channels)

    is_npz = path.suffix == ".npz"
    if path.is_dir() or (path.is_file() and is_archive_name(path.name) and not is_npz):
        container = Folder(path) if path.is_dir() else open_container(path)
        names = [name for name in container.names() if is_image_name(name)]
        if len(names) < least:
            raise UserError(f"{option}: {path} has {len(names)} images; {least} or more are needed")
        identity = repr(container.identity()).encode()
        source = RecordSource(records_of(container, names), as_it_is, identity)
        return LoadedImages(source, names, _as_text(labels_of(container)))
    images, labels = _from_npz(path, option)
    expected = (f"N ≥ {least}", size, size, channels)
    if images.shape[1:] != expected[1:] or images.dtype != np.uint8 or len(images) < least:
        raise UserError(
            f"{option}: {path} has {images.dtype} of shape {images.shape}; uint8 of "
            f"{expected} is needed"
        )
    numbers = [str(i) for i in range(len(images))]
    if labels is not None and (labels.shape != (len(images),) or labels.dtype.kind not in "iu"):
        log.warning("labels of %s are not used: they are no whole number for each image", path)
        labels = None
    return LoadedImages(ArraySource(images, np.zeros(len(images), int)), numbers, _as_text(labels))


def _as_text(labels: Labels | None) -> list[str] | None:
    return None if labels is None else [str(label) for label in labels]


def _from_npz(path: pathlib.Path, option: str) -> tuple[np.ndarray, np.ndarray | None]:
    """The images of an .npz file, and the array `labels` if it has one."""
    try:
        loaded = np.load(path, allow_pickle=False)
        if not isinstance(loaded, np.lib.npyio.NpzFile):
            raise ValueError("it is not an .npz")
        with loaded as file:
            images = [name for name in file.files if name != "labels"]
            known = [name for name in ("samples", "arr_0") if name in images] or images
            if len(known) > 1 and known == images:
                raise ValueError(f"it has the arrays {', '.join(known)}, and none named samples")
            arrays = [file[name] for name in (known[0], "labels") if name in file.files]
            if not all(isinstance(array, np.ndarray) for array in arrays):
                raise ValueError("a member is no array")
            return arrays[0], arrays[1] if len(arrays) == 2 else None
    except FileNotFoundError as error:
        raise UserError(f"{option}: there is no file or folder {path}") from error
    except Exception as error:  # a damaged archive can raise any kind of error
        # NumPy takes any other file for a pickle, and advises to allow pickles.
        reason = "it is no archive" if "pickle" in str(error) else error
        raise UserError(f"{option}: {path} can't be read: {reason}") from error
