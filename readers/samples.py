"""Reading images to be scored: a folder, an archive or an .npz file, without converting them."""

import pathlib

import numpy as np
from PIL import Image

from configs.default import UserError
from readers.containers import Folder, is_archive_name, open_container
from readers.decode import is_image_name
from readers.image_files import records_of
from readers.source import ArraySource, RecordSource, Source


def load_images(
    path: pathlib.Path, size: int, channels: int, option: str, least: int = 4
) -> tuple[Source, list[str]]:
    """Read images, with a name for each.

    Args:
      path: a folder or an archive of image files, or an .npz file with an array `samples` or
        `arr_0` (or only one array) of (N, H, W, C) uint8 pixel values.
      size, channels: the size and channels that the images must have.
      option: the config's field of the path, for messages.
      least: the number of images that are needed.

    Returns:
      (the images, their files' names or their numbers from 0).

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
        return RecordSource(records_of(container, names), as_it_is, identity), names
    images = _from_npz(path, option)
    expected = (f"N ≥ {least}", size, size, channels)
    if images.shape[1:] != expected[1:] or images.dtype != np.uint8 or len(images) < least:
        raise UserError(
            f"{option}: {path} has {images.dtype} of shape {images.shape}; uint8 of "
            f"{expected} is needed"
        )
    numbers = [str(i) for i in range(len(images))]
    return ArraySource(images, np.zeros(len(images), int)), numbers


def _from_npz(path: pathlib.Path, option: str) -> np.ndarray:
    try:
        loaded = np.load(path, allow_pickle=False)
        if not isinstance(loaded, np.lib.npyio.NpzFile):
            raise ValueError("it is not an .npz")
        with loaded as file:
            known = [name for name in ("samples", "arr_0") if name in file.files] or file.files
            if len(known) > 1 and known == file.files:
                raise ValueError(f"it has the arrays {', '.join(known)}, and none named samples")
            array = file[known[0]]
            if not isinstance(array, np.ndarray):
                raise ValueError(f"its {known[0]} is no array")
            return array
    except FileNotFoundError as error:
        raise UserError(f"{option}: there is no file or folder {path}") from error
    except Exception as error:  # a damaged archive can raise any kind of error
        # NumPy takes any other file for a pickle, and advises to allow pickles.
        reason = "it is no archive" if "pickle" in str(error) else error
        raise UserError(f"{option}: {path} can't be read: {reason}") from error
