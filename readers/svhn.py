"""SVHN's cropped digits, in MATLAB files, where the label 10 is the digit 0."""

import pathlib

import numpy as np

from configs.errors import UserError
from data.labels import plain_classes
from readers.containers import all_of, file_identity, reading
from readers.layout import Found, Opened, arrays_of


def _read(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    import scipy.io

    with reading(path):
        try:
            content = scipy.io.loadmat(path, variable_names=["X", "y"])
        except MemoryError as error:  # SciPy believes any length that a damaged file claims
            raise ValueError("it claims lengths that no memory holds") from error
        images, labels = content["X"], content["y"]
    if images.dtype != np.uint8 or images.shape[:3] != (32, 32, 3) or images.ndim != 4:
        raise UserError(f"{path} has X of {images.dtype}, {images.shape}; (32, 32, 3, N) is needed")
    if labels.size != images.shape[3]:
        raise UserError(f"{path} has {images.shape[3]} images and {labels.size} labels")
    return np.ascontiguousarray(images.transpose(3, 0, 1, 2)), labels.ravel().astype(int) % 10


def find(path: pathlib.Path) -> Found | None:
    """A folder with the authors' train_32x32.mat and test_32x32.mat."""
    files = all_of(path, ("train_32x32.mat", "test_32x32.mat"))
    if not files:
        return None

    def opened() -> Opened:
        train, test = map(_read, files)
        return Opened(arrays_of(*train), arrays_of(*test), plain_classes(10))

    return Found(f"the authors' .mat files in {path}", tuple(map(file_identity, files)), opened)
