"""Arrays of uint8 images in .npy and .npz files."""

import pathlib

import numpy as np

from configs.default import UserError
from readers.containers import file_identity
from readers.layout import Found, Opened, arrays_of, every_tenth

_SPLITS = ("x_train", "y_train", "x_test", "y_test")  # as in Keras's mnist.npz


def _load(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file by name, or the memory-mapped array of an .npy as `images`."""
    try:
        loaded = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return {"images": loaded}
        with loaded:
            return {name: loaded[name] for name in loaded.files}
    except Exception as error:  # a damaged archive can raise any kind of error
        reason = "it has objects" if "Object arrays" in str(error) else str(error)
        # NumPy takes any other file for a pickle, and advises to allow pickles.
        reason = "it is no file of arrays" if "pickle" in reason else reason
        raise UserError(f"data.path: {path} can't be read: {reason}") from error


def _images(path: pathlib.Path, name: str, images: np.ndarray) -> np.ndarray:
    """Check images (N, H, W, C) or (N, H, W), and return them as (N, H, W, C)."""
    images = images[..., None] if images.ndim == 3 else images
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise UserError(
            f"data.path: {path} has {name} of {images.dtype}, {images.shape}; uint8 of (N, H, W), "
            "(N, H, W, 1) or (N, H, W, 3) is needed"
        )
    return images


def _labels(path: pathlib.Path, labels: np.ndarray, count: int) -> np.ndarray:
    labels = labels.reshape(-1) if labels.ndim == 2 else labels
    whole = np.issubdtype(labels.dtype, np.integer)
    if not whole or labels.shape != (count,) or (count and labels.min() < 0):
        raise UserError(
            f"data.path: {path} has {count} images and labels of {labels.dtype}, {labels.shape}; "
            "whole numbers from 0 on, one for each image, are needed"
        )
    return labels


def _open(path: pathlib.Path, needs_splits: bool) -> Opened:
    found = _load(path)
    if "x_train" in found and "x_test" in found:
        x_train, x_test = (_images(path, name, found[name]) for name in ("x_train", "x_test"))
        if "y_train" not in found or "y_test" not in found:
            return Opened(arrays_of(x_train), arrays_of(x_test))
        y_train = _labels(path, found["y_train"], len(x_train))
        y_test = _labels(path, found["y_test"], len(x_test))
        num_classes = int(max(y_train.max(), y_test.max())) + 1
        return Opened(arrays_of(x_train, y_train), arrays_of(x_test, y_test), num_classes)
    if needs_splits:
        raise UserError(f"data.path: {path} has no splits; needed are {', '.join(_SPLITS)}")
    known = [name for name in found if name in ("images", "arr_0")] or list(found)
    if len(known) != 1:
        raise UserError(
            f"data.path: {path} has the arrays {', '.join(found)}; needed are images (and labels), "
            f"or {', '.join(_SPLITS)}, or one array alone"
        )
    images = _images(path, known[0], found[known[0]])
    train, test = every_tenth(len(images))
    if not len(test):
        raise UserError(f"data.path: {path} has {len(images)} images; 10 or more are needed")
    if "labels" not in found:
        return Opened(arrays_of(images[train]), arrays_of(images[test]))
    labels = _labels(path, found["labels"], len(images))
    return Opened(
        arrays_of(images[train], labels[train]),
        arrays_of(images[test], labels[test]),
        int(labels.max()) + 1,
    )


def find(path: pathlib.Path, needs_splits: bool = False) -> Found | None:
    """An .npy of images, or an .npz of images (and labels) or of x_train, y_train, x_test, y_test.

    Images are uint8, (N, H, W), (N, H, W, 1) or (N, H, W, 3). In a file without splits every tenth
    image is a test image; with `needs_splits` such a file is refused.
    """
    if path.suffix not in (".npy", ".npz") or not path.is_file():
        return None
    return Found(f"the arrays of {path}", file_identity(path), lambda: _open(path, needs_splits))
