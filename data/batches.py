"""The splits of a data set; their examples in shuffled batches, in order, or in memory."""

import concurrent.futures
import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from readers.source import ArraySource, Examples, Source
from runtime.ahead import in_threads
from runtime.progress import Progress


@dataclasses.dataclass(frozen=True)
class Dataset:
    """One split of a data set.

    Attributes:
      name: the data set's name.
      source: its examples.
      num_levels: the number of values that a pixel can have; 0: pixels are floats.
      classes: the names of labels 0, 1, …; (): there are no labels.
      notes: sentences that every report about the data set must have.
    """

    name: str
    source: Source
    num_levels: int
    classes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.source)

    @property
    def num_classes(self) -> int:
        """The number of classes; labels are 0 … num_classes - 1. 0: there are no labels."""
        return len(self.classes)


class Data(NamedTuple):
    """The splits of a data set."""

    train: Dataset
    test: Dataset


def _epoch_order(seed: int, count: int, epoch: int) -> np.ndarray:
    """The indices 0 … count - 1 in the order of an epoch."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(count)


def train_batches(
    dataset: Dataset,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    indices_only: bool = False,
) -> Iterator[dict[str, np.ndarray]]:
    """An endless stream of shuffled batches; the batch of a step is a function of (seed, step).

    Each epoch has every image once, in a new random order. A batch may contain the end of one epoch
    and the start of the next.

    Args:
      dataset: the images. If they are not in memory, threads read ahead.
      batch_size: the size of the global batch, over all processes.
      seed: determines the order.
      start_step: the step of the first batch.
      process_index, process_count: this process yields the process_index-th part of each batch.
      indices_only: yield the images' indices in the data set instead of the images.

    Yields:
      `image` (n, H, W, C) uint8 and `label` (n,) int32, or only `image` (n,) int32; and `index`
      (n,) int32, each image's index in the global batch, with n = batch_size / process_count.
    """
    share = batch_size // process_count
    index = np.arange(process_index * share, (process_index + 1) * share)
    # Steps are in increasing order, so it is enough to keep the order of one epoch.
    order = functools.lru_cache(1)(functools.partial(_epoch_order, seed, len(dataset)))

    def indices_of(step: int) -> np.ndarray:
        epochs, at = np.divmod(step * batch_size + index, len(dataset))
        parts = [order(i)[at[epochs == i]] for i in range(epochs[0], epochs[-1] + 1)]
        return np.concatenate(parts)

    def read(chosen: np.ndarray) -> Examples:
        if indices_only:
            return {"image": chosen.astype(np.int32)}
        found = dataset.source.fetch(chosen)
        return {"image": found["image"], "label": found["label"].astype(np.int32)}

    source = dataset.source
    in_memory = isinstance(source, ArraySource) and not isinstance(source.images, np.memmap)
    at_hand = indices_only or in_memory
    steps = map(indices_of, itertools.count(start_step))
    for batch in map(read, steps) if at_hand else in_threads(read, steps, threads=4, ahead=8):
        yield {**batch, "index": index.astype(np.int32)}


def in_memory(dataset: Dataset, limit: int) -> Examples | None:
    """All images (N, H, W, C) uint8 and labels, or None if they take more than `limit` bytes."""
    if isinstance(dataset.source, ArraySource):
        images = dataset.source.images
        whole = {"image": images, "label": dataset.source.labels}
        return whole if images.nbytes <= limit else None
    size = dataset.source.fetch(np.arange(1))["image"].nbytes
    if size * len(dataset) > limit:
        return None
    progress = Progress("reading all images", len(dataset))
    with concurrent.futures.ThreadPoolExecutor() as pool:
        parts = []
        chosen = np.array_split(np.arange(len(dataset)), len(dataset) // 64 + 1)
        for part in pool.map(dataset.source.fetch, chosen):
            parts.append(part)
            progress.advance(len(part["image"]))
    return {name: np.concatenate([part[name] for part in parts]) for name in ("image", "label")}


def subset(dataset: Dataset, limit: int | None = None) -> np.ndarray:
    """The sorted indices of `limit` random examples, or of all if there are no more.

    They are the same in every call. They are not the first examples, since a data set can be sorted
    by class.
    """
    if limit is None or limit >= len(dataset):
        return np.arange(len(dataset))
    return np.sort(np.random.default_rng(0).permutation(len(dataset))[:limit])


def in_order(dataset: Dataset, limit: int | None = None) -> Examples:
    """All examples, or those of `subset`."""
    return dataset.source.fetch(subset(dataset, limit))


def in_batches(dataset: Dataset, size: int, limit: int | None = None) -> Iterator[Examples]:
    """All examples, or those of `subset`, in order and `size` at a time."""
    chosen = subset(dataset, limit)
    for start in range(0, len(chosen), size):
        yield dataset.source.fetch(chosen[start : start + size])


def fingerprint(dataset: Dataset, whole: bool = True) -> str:
    """A hash of the data set's name, size and images; of only 64 images unless `whole`."""
    probe = dataset.source.fetch(np.linspace(0, len(dataset) - 1, 64).astype(int))
    digest = hashlib.sha256(f"{dataset.name} {len(dataset)}".encode())
    for part in (probe["image"].tobytes(), probe["label"].tobytes()):
        digest.update(part)
    if whole:
        digest.update(dataset.source.describe())
    return digest.hexdigest()[:16]


def facts_of_data(data: Data) -> dict[str, str]:
    """The splits' numbers of images, and hashes of some of them, to tell data sets apart."""
    splits = {"training images": data.train, "test images": data.test}
    return {
        name: f"{len(split)} {name} ({fingerprint(split, whole=False)})"
        for name, split in splits.items()
    }
