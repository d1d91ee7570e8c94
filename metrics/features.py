"""Feature extractors: functions from images to features and logits."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Extractor:
    """A network that maps images to features.

    Attributes:
      name: `inception` or `classifier`.
      weights: the SHA-256 of its weights, which identifies its features.
      fn: levels (N, H, W, C) uint8 → `features` (N, D) and `logits` (N, K), float32.
      batch_size: a number of images for which no batch needs padding.
    """

    name: str
    weights: str
    fn: Callable[[np.ndarray], dict[str, np.ndarray]]
    batch_size: int


def _batches(images: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, int]]:
    for start in range(0, len(images), size):
        part = images[start : start + size]
        padding = [(0, size - len(part))] + [(0, 0)] * (images.ndim - 1)
        yield np.pad(part, padding, mode="edge"), len(part)


def apply_batched(
    fn: Callable[[np.ndarray], dict[str, Any]], images: np.ndarray, batch_size: int
) -> dict[str, np.ndarray]:
    """Apply `fn` to `images` in batches of one size; the last one is padded, its result cut."""
    parts = [
        {name: np.asarray(x)[:count] for name, x in fn(batch).items()}
        for batch, count in _batches(images, batch_size)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
