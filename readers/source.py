"""Random access to images in memory, memory-mapped, or decoded when they are needed."""

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Protocol

import numpy as np
from PIL import Image

from configs.errors import UserError
from readers.decode import MAX_PIXELS, open_image
from readers.layout import Item, Records

Examples = dict[str, np.ndarray]  # `image` (n, H, W, C) uint8 and `label` (n,)


class Source(Protocol):
    """Random access to examples."""

    def __len__(self) -> int: ...

    def fetch(self, indices: np.ndarray) -> Examples:
        """The examples at these indices."""
        ...

    def describe(self) -> bytes:
        """A value that identifies these examples, without reading all files."""
        ...


@dataclasses.dataclass(frozen=True)
class ArraySource:
    """Images (N, H, W, C) uint8 and labels (N,), in memory or memory-mapped.

    `digest` is a hash of the images; it is computed if it is not given.
    """

    images: np.ndarray
    labels: np.ndarray
    digest: bytes = b""

    def __len__(self) -> int:
        return len(self.images)

    def fetch(self, indices: np.ndarray) -> Examples:
        """The examples at these indices."""
        return {"image": self.images[indices], "label": self.labels[indices]}

    def describe(self) -> bytes:
        """A hash of all images."""
        return self.digest or hashlib.sha256(np.ascontiguousarray(self.images).data).digest()


@dataclasses.dataclass(frozen=True)
class RecordSource:
    """Encoded images, each read and decoded when it is needed.

    `fit` converts an image to an array (H, W, C) uint8, or raises an error; `identity` identifies
    the files; images with more than `max_pixels` are not opened.
    """

    records: Records
    fit: Callable[[Image.Image], np.ndarray]
    identity: bytes = b""
    max_pixels: int = MAX_PIXELS

    def __len__(self) -> int:
        return len(self.records)

    def read(self, i: int, item: Item | None = None) -> tuple[np.ndarray, int, Image.Image]:
        """(the fitted image, its label, the image) of a record, whose item may be read already.

        Raises:
          UserError: the image has another size than `records` says.
          Exception: any error that libraries raise for damaged files.
        """
        data, label = item or self.records.read(i)
        image = open_image(data, self.max_pixels)
        size = self.records.size or image.size
        if image.size != size:
            raise UserError(
                f"{self.records.name(i)} is {image.width}×{image.height} pixels; this data set's "
                f"images are {size[0]}×{size[1]}"
            )
        return self.fit(image), label, image

    def fetch(self, indices: np.ndarray) -> Examples:
        """The examples at these indices; UserError if one can't be read."""
        examples = []
        for i in indices.tolist():
            try:
                examples.append(self.read(i)[:2])
            except UserError:
                raise
            except Exception as error:  # PIL raises many kinds of error for damaged files
                name = self.records.name(i)
                raise UserError(f"{name} is not a readable image: {error}") from error
        images, labels = zip(*examples, strict=True)
        return {"image": np.stack(images), "label": np.array(labels)}

    def describe(self) -> bytes:
        """A hash of `identity`."""
        return hashlib.sha256(self.identity).digest()


@dataclasses.dataclass(frozen=True)
class LabelledSource:
    """The examples of another source with labels (N,) in place of its own."""

    source: Source
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.source)

    def fetch(self, indices: np.ndarray) -> Examples:
        """The examples at these indices."""
        return {**self.source.fetch(indices), "label": self.labels[indices]}

    def describe(self) -> bytes:
        """What the source says of itself, and the labels."""
        return self.source.describe() + self.labels.tobytes()
