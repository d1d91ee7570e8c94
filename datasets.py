"""Data sets of uint8 images, their batches and their preprocessing.

Pixels are levels 0 … num_levels - 1; num_levels is 17 for scikit-learn's digits and 256 for all
other data sets. `Preprocessing` flips, dequantises and scales them on the device. The file formats
are in `readers`; docs/data.md says how to get each data set.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
import itertools
import logging
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from ml_collections import ConfigDict

from configs.default import UserError
from readers import cache, published
from readers.source import ArraySource, Examples, Source
from runtime.progress import Progress

log = logging.getLogger("soft_truncation")


@dataclasses.dataclass(frozen=True)
class Dataset:
    """One split of a data set.

    Attributes:
      name: the data set's name.
      source: its examples.
      num_levels: the number of values of a pixel.
      num_classes: labels are 0 … num_classes - 1; 0: there are no labels.
      notes: sentences that must be in every report about it.
    """

    name: str
    source: Source
    num_levels: int
    num_classes: int
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.source)


class Data(NamedTuple):
    """The splits of a data set."""

    train: Dataset
    test: Dataset


def get_num_levels(config: ConfigDict) -> int:
    """The number of values of a pixel of `config.data.dataset`."""
    return 17 if config.data.dataset == "digits" else 256


def _load_known(config: ConfigDict) -> Data:
    data = config.data
    known, found = published.PUBLISHED[data.dataset], published.find(data)
    fit = published.get_fit(data)
    decoded = cache.decode(data.dataset, found, fit, data.skip_unreadable, data.cache)
    counts = (len(decoded.train), len(decoded.test))
    notes = decoded.notes
    if known.counts and counts != known.counts:
        train, test = known.counts
        notes += (
            f"{known.title} has {train:,} training and {test:,} test images as published; here "
            f"there are {counts[0]:,} and {counts[1]:,}",
        )
    log.info("data: %s, %s", known.title, found.what)
    for note in notes:
        log.warning("%s", note)
    name = pathlib.Path(data.path).stem if data.dataset == "folder" else data.dataset
    classes = decoded.num_classes
    return Data(
        *(Dataset(name, split, 256, classes, notes) for split in (decoded.train, decoded.test))
    )


def _load_digits() -> Data:
    import sklearn.datasets

    digits = sklearn.datasets.load_digits()
    images = digits.images.astype(np.uint8)[..., None]
    order = np.random.default_rng(0).permutation(len(images))
    log.info("data: scikit-learn's digits")
    return Data(
        *(
            Dataset("digits", ArraySource(images[part], digits.target[part]), 17, 10)
            for part in (order[297:], order[:297])
        )
    )


def load_data(config: ConfigDict) -> Data:
    """The training and test split of `config.data.dataset`.

    Raises:
      UserError: the data are missing, can't be read, or do not fit the config.
    """
    data = config.data
    loaded = _load_digits() if data.dataset == "digits" else _load_known(config)
    for split, dataset in zip(("training", "test"), loaded, strict=True):
        if not len(dataset):
            raise UserError(f"{dataset.name} has no {split} images")
    expected = (data.image_size, data.image_size, data.num_channels)
    shape = loaded.train.source.fetch(np.arange(1))["image"].shape[1:]
    if shape != expected:
        raise UserError(
            f"data.image_size and data.num_channels ask for images of {expected}; "
            f"{loaded.train.name} has {shape}"
        )
    classes = loaded.train.num_classes
    log.info(
        "%s training and %s test images, %d×%d×%d, %d levels, %s",
        f"{len(loaded.train):,}",
        f"{len(loaded.test):,}",
        *expected,
        loaded.train.num_levels,
        f"{classes} classes" if classes else "no labels",
    )
    return loaded


def get_dataset(config: ConfigDict, split: str) -> Dataset:
    """The `train` or `test` split of `load_data`."""
    return getattr(load_data(config), split)


def _epoch_order(seed: int, count: int, epoch: int) -> np.ndarray:
    """The indices 0 … count - 1 in the order of an epoch."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(count)


def _read_ahead(
    read: Callable[[np.ndarray], Examples], indices: Iterator[np.ndarray]
) -> Iterator[Examples]:
    """Apply `read` to each item in four threads, up to eight items ahead."""
    pool = concurrent.futures.ThreadPoolExecutor(4)
    pending: collections.deque[concurrent.futures.Future[Examples]] = collections.deque()
    try:
        for chosen in indices:
            pending.append(pool.submit(read, chosen))
            if len(pending) > 8:
                yield pending.popleft().result()
    finally:  # the program should not wait for the pending reads
        pool.shutdown(wait=False, cancel_futures=True)


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
    for batch in map(read, steps) if at_hand else _read_ahead(read, steps):
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

    They are the same in every call. The first examples would not be representative, since a data
    set can be sorted by class.
    """
    if limit is None or limit >= len(dataset):
        return np.arange(len(dataset))
    return np.sort(np.random.default_rng(0).permutation(len(dataset))[:limit])


def in_order(dataset: Dataset, limit: int | None = None) -> Examples:
    """All examples, or those of `subset`."""
    return dataset.source.fetch(subset(dataset, limit))


def batches(dataset: Dataset, size: int, limit: int | None = None) -> Iterator[Examples]:
    """All examples, or those of `subset`, in order and `size` at a time."""
    chosen = subset(dataset, limit)
    for start in range(0, len(chosen), size):
        yield dataset.source.fetch(chosen[start : start + size])


def fingerprint(dataset: Dataset) -> str:
    """A hash of the data set's name, size and images."""
    probe = dataset.source.fetch(np.linspace(0, len(dataset) - 1, 64).astype(int))
    whole = hashlib.sha256(f"{dataset.name} {len(dataset)}".encode())
    for part in (probe["image"].tobytes(), probe["label"].tobytes(), dataset.source.describe()):
        whole.update(part)
    return whole.hexdigest()[:16]


@functools.partial(jax.vmap, in_axes=(0, 0))
def _flip(image: Array, key: Array) -> Array:
    return jnp.where(jax.random.bernoulli(key), image[:, ::-1], image)


def dequantize(images: ArrayLike, keys: Array, num_levels: int) -> Array:
    """(image + u) / num_levels in [0, 1) with uniform u: (N, H, W, C) and keys (N,), float32."""
    images = jnp.asarray(images, jnp.float32)
    uniform = jax.vmap(lambda key: jax.random.uniform(key, images.shape[1:]))(keys)
    return (images + uniform) / num_levels


def scale(x: Any, centered: bool) -> Any:
    """From [0, 1] to the model's range, which is [-1, 1] if `centered`."""
    return 2 * x - 1 if centered else x


def inverse_scale(x: Any, centered: bool) -> Any:
    """From the model's range to [0, 1]."""
    return (x + 1) / 2 if centered else x


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """The conversion of levels to the network's input x_0, and back.

    Attributes:
      num_levels: levels are 0 … num_levels - 1.
      centered: whether the model's range is [-1, 1] instead of [0, 1].
      dequantization: none, uniform or lossless.
      random_flip: whether to mirror images at random in training.
    """

    num_levels: int
    centered: bool
    dequantization: str
    random_flip: bool

    def to_x0(self, images: Array, keys: Array, flip: bool) -> Array:
        """Convert levels to x_0: flip them at random if `flip`, dequantise and scale them.

        Args:
          images: levels, (N, H, W, C).
          keys: (N,), one key for each image.
          flip: whether `random_flip` applies.

        Returns:
          (N, H, W, C) float32.
        """
        flip_keys, noise_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
        if flip and self.random_flip:
            images = _flip(images, flip_keys)
        if self.dequantization == "uniform":
            x = dequantize(images, noise_keys, self.num_levels)
        else:
            x = images.astype(jnp.float32) / (self.num_levels - 1)
        return scale(x, self.centered)

    def to_x0_without_noise(self, images: np.ndarray) -> np.ndarray:
        """Convert levels to x_0; noise of the dequantisation is replaced by its mean."""
        if self.dequantization == "uniform":
            x = (images.astype(np.float32) + 0.5) / self.num_levels
        else:
            x = images.astype(np.float32) / (self.num_levels - 1)
        return scale(x, self.centered)

    def to_levels(self, x: Array) -> Array:
        """Convert samples (N, H, W, C) to the nearest levels, uint8; the inverse of `to_x0`."""
        x = inverse_scale(x, self.centered)
        if self.dequantization == "uniform":
            levels = jnp.floor(x * self.num_levels)
        else:
            levels = jnp.round(x * (self.num_levels - 1))
        return jnp.clip(levels, 0, self.num_levels - 1).astype(jnp.uint8)

    @property
    def level_grid(self) -> tuple[float, float]:
        """(lowest level, distance between levels) in the model's range, without dequantisation."""
        lowest = -1.0 if self.centered else 0.0
        return lowest, (1 - lowest) / (self.num_levels - 1)

    @property
    def cell_width(self) -> float:
        """The distance between the values of `to_x0_without_noise` for neighbouring levels."""
        if self.dequantization == "uniform":
            return (2.0 if self.centered else 1.0) / self.num_levels
        return self.level_grid[1]

    @property
    def bits_offset(self) -> float:
        """The term to add to -log2 p(x)/D of scaled, dequantised data for bits/dim of the levels.

        It is log2(num_levels), for the width of a level in [0, 1], minus 1 if scaling to [-1, 1]
        doubles the width: 7 for 256 levels in [-1, 1].
        """
        return float(np.log2(self.num_levels) - (1 if self.centered else 0))


def get_preprocessing(config: ConfigDict, num_levels: int = 0) -> Preprocessing:
    """The preprocessing of a config; `num_levels` replaces the data set's number of levels."""
    data = config.data
    levels = num_levels or get_num_levels(config)
    return Preprocessing(levels, data.centered, data.dequantization, data.random_flip)


def share_at_ends(levels: np.ndarray, num_levels: int) -> float:
    """The share of the values that are the lowest or the highest level."""
    return float(np.mean((levels == 0) | (levels == num_levels - 1)))


def levels_to_uint8(levels: np.ndarray, num_levels: int) -> np.ndarray:
    """Convert levels to pixel values 0 … 255."""
    return np.round(levels.astype(np.float32) * (255 / (num_levels - 1))).astype(np.uint8)
