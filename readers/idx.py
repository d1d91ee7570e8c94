"""IDX files, the format of MNIST and Fashion-MNIST."""

import gzip
import pathlib
import struct

import numpy as np

from configs.errors import UserError
from data.labels import plain_classes
from readers.containers import file_identity, reading
from readers.layout import Arrays, Found, Opened, arrays_of


def read_idx(path: pathlib.Path) -> np.ndarray:
    """Read an IDX file of unsigned bytes, gzipped or not; UserError if it can't be read."""
    with reading(path):
        most = 2**26 + 100 * path.stat().st_size  # a longer one is no image file
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            raw = file.read(most)
        dims = raw[3]
        shape = struct.unpack(f">{dims}I", raw[4 : 4 + 4 * dims])
        if raw[:3] != b"\0\0\x08":
            raise ValueError("it does not start as an IDX file of bytes does")
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * dims).reshape(shape)


def find(path: pathlib.Path) -> Found | None:
    """A folder with the four files train-images-idx3-ubyte, …, gzipped or not."""
    if not any(path.glob("*-idx?-ubyte*")):
        return None

    def file(prefix: str, kind: str) -> pathlib.Path:
        for suffix in ("", ".gz"):
            found = path / f"{prefix}-{kind}-ubyte{suffix}"
            if found.exists():
                return found
        raise UserError(f"data.path: {path} has no file {prefix}-{kind}-ubyte[.gz]")

    def split(prefix: str) -> Arrays:
        images, labels = (read_idx(file(prefix, kind)) for kind in ("images-idx3", "labels-idx1"))
        if images.ndim != 3 or len(images) != len(labels):
            raise UserError(
                f"data.path: {path} has {prefix} images of shape {images.shape} and "
                f"{len(labels)} labels; they do not belong together"
            )
        return arrays_of(images[..., None], labels)

    def opened() -> Opened:
        return Opened(split("train"), split("t10k"), plain_classes(10))

    files = sorted(path.glob("*-idx?-ubyte*"))
    return Found(f"IDX files in {path}", tuple(map(file_identity, files)), opened)
