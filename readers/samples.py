"""Reading existing samples, a folder of images or an .npz file, without converting them."""

import pathlib

import numpy as np
from PIL import Image

from configs.default import UserError
from readers.containers import Folder
from readers.decode import is_image_name
from readers.image_files import records_of
from readers.source import ArraySource, RecordSource, Source


def load_samples(path: pathlib.Path, size: int, channels: int) -> Source:
    """Read the images of `eval.samples`.

    Args:
      path: a folder of image files, or an .npz file with an array `samples` or `arr_0` (or only
        one array) of (N, H, W, C) uint8 pixel values.
      size, channels: the size and channels that the images must have.

    Raises:
      UserError: there are fewer than 4 images, or they have another size.
    """
    mode = "L" if channels == 1 else "RGB"

    def as_it_is(image: Image.Image) -> np.ndarray:
        # An image of another mode is refused: converting it would change the scored images.
        if image.mode != mode:
            raise ValueError(f"its mode is {image.mode}, and {mode} is needed")
        if image.size != (size, size):
            raise ValueError(f"it is {image.width}×{image.height}, not {size}×{size} pixels")
        return np.asarray(image).reshape(size, size, channels)

    if path.is_dir():
        folder = Folder(path)
        names = [name for name in folder.names() if is_image_name(name)]
        if len(names) < 4:
            raise UserError(f"eval.samples: {path} has {len(names)} images; 4 or more are needed")
        return RecordSource(records_of(folder, names), as_it_is, repr(folder.identity()).encode())
    images = _from_npz(path)
    expected = ("N ≥ 4", size, size, channels)
    if images.shape[1:] != expected[1:] or images.dtype != np.uint8 or len(images) < 4:
        raise UserError(
            f"eval.samples: {path} has {images.dtype} of shape {images.shape}; uint8 of "
            f"{expected} is needed"
        )
    return ArraySource(images, np.zeros(len(images), int))


def _from_npz(path: pathlib.Path) -> np.ndarray:
    try:
        loaded = np.load(path, allow_pickle=False)
        if not isinstance(loaded, np.lib.npyio.NpzFile):
            raise ValueError("it is not an .npz")
        with loaded as file:
            known = [name for name in ("samples", "arr_0") if name in file.files] or file.files
            if len(known) > 1 and known == file.files:
                raise ValueError(f"it has the arrays {', '.join(known)}, and none named samples")
            return file[known[0]]
    except FileNotFoundError as error:
        raise UserError(f"eval.samples: there is no file or folder {path}") from error
    except Exception as error:  # a damaged archive can raise any kind of error
        # NumPy takes any other file for a pickle, and advises to allow pickles.
        reason = "it is no archive" if "pickle" in str(error) else error
        raise UserError(f"eval.samples: {path} can't be read: {reason}") from error
