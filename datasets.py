"""Data sets of images, their batches and their preprocessing.

Pixels are levels 0 … num_levels - 1: 17 for scikit-learn's digits, what `data.num_levels` says for
arrays of whole numbers, and 256 for all other data sets. Arrays of floats have num_levels = 0;
their pixels go from 0 to 1 in the training images, and `Units` gives them back in the data's own
units. `Preprocessing` flips, dequantises and scales pixels on the device. The file formats are in
`readers`; docs/data.md says how to get each data set.
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

from configs.shapes import array_shape, image_shape
from errors import UserError
from readers import cache, published
from readers.arrays import Stack, open_stacks, whole_stack
from readers.class_labels import plain_classes
from readers.layout import Splits
from readers.source import ArraySource, Examples, Source
from runtime.progress import Progress

log = logging.getLogger("soft_truncation")


@dataclasses.dataclass(frozen=True)
class Dataset:
    """One split of a data set.

    Attributes:
      name: the data set's name.
      source: its examples.
      num_levels: the number of values of a pixel; 0: floats.
      classes: the names of labels 0, 1, …; (): there are no labels.
      notes: sentences that must be in every report about it.
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
        """Labels are 0 … num_classes - 1; 0: there are no labels."""
        return len(self.classes)


class Data(NamedTuple):
    """The splits of a data set."""

    train: Dataset
    test: Dataset


def get_num_levels(config: ConfigDict) -> int:
    """The number of values of a pixel of `config.data.dataset`; 0: floats."""
    if config.data.dataset == "array":
        return config.data.num_levels
    return 17 if config.data.dataset == "digits" else 256


def highest(num_levels: int) -> int:
    """The highest level, or 1 for floats."""
    return num_levels - 1 if num_levels else 1


def _load_known(config: ConfigDict) -> Data:
    data = config.data
    known, fit = published.PUBLISHED[data.dataset], published.get_fit(data)
    try:
        found = published.find(config)
        decoded = cache.decode(data.dataset, found, fit, data.skip_unreadable, data.cache)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # libraries raise any kind of error for damaged files
        log.debug("while reading data", exc_info=True)
        if isinstance(error, OSError) and error.errno:
            raise  # a full disk
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        where = data.path or data.tfrecords_path or data.dataset
        raise UserError(f"data.path: {where} can't be read; it is damaged ({reason})") from error
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
    splits = (decoded.train, decoded.test)
    return Data(*(Dataset(name, split, 256, decoded.classes, notes) for split in splits))


def _load_digits() -> Data:
    import sklearn.datasets

    digits = sklearn.datasets.load_digits()
    images = digits.images.astype(np.uint8)[..., None]
    order = np.random.default_rng(0).permutation(len(images))
    classes = plain_classes(10)
    log.info("data: scikit-learn's digits")
    return Data(
        *(
            Dataset("digits", ArraySource(images[part], digits.target[part]), 17, classes)
            for part in (order[297:], order[:297])
        )
    )


def _ends(scale: tuple[Any, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The low and high of `data.scale`, float64: () for all channels, or (C,)."""
    low, high = (np.asarray(end, np.float64) for end in scale)
    return low, high


@dataclasses.dataclass(frozen=True)
class _StackSource:
    """Arrays as a `Source`: floats from 0 to 1 as `data.scale` says, and padded as `data.pad`."""

    stack: Stack
    scale: tuple[Any, ...]
    shape: tuple[int, int, int]

    def __len__(self) -> int:
        return len(self.stack)

    def fetch(self, indices: np.ndarray) -> Examples:
        """The examples at these indices."""
        images = self.stack.read(indices)
        if self.scale:
            low, high = _ends(self.scale)
            images = ((images.astype(np.float64) - low) / (high - low)).astype(np.float32)
        height, width = (
            (0, wanted - size) for wanted, size in zip(self.shape, images.shape[1:3], strict=False)
        )
        if height[1] or width[1]:
            images = np.pad(images, ((0, 0), height, width, (0, 0)), mode="edge")
        labels = self.stack.labels
        of = np.zeros(len(indices), np.int64) if labels is None else labels[indices]
        return {"image": images, "label": of}

    def describe(self) -> bytes:
        """The files' identity, and what becomes of their values."""
        return repr((self.stack.identity, self.scale, self.shape)).encode()


def _open_stacks(config: ConfigDict) -> Splits[Stack]:
    """The arrays of a config, with their channels last."""
    stacks = open_stacks(pathlib.Path(config.data.path))
    if config.data.channels_first != 1:
        return stacks
    return stacks._replace(train=stacks.train.channels_last(), test=stacks.test.channels_last())


def _looks_channels_first(shape: tuple[int, int, int]) -> bool:
    first, *others = shape
    return first < min(others) and (others[0] == others[1] or 2 * first <= min(others))


def array_facts(config: ConfigDict) -> dict[str, Any]:
    """What `data.path` says of an array data set, by the name of the field in `config.data`.

    All values are read once. `dequantization` is none for floats.

    Raises:
      UserError: the arrays can't be read, have values that are not finite, or do not fit
        `data.num_levels` or `data.scale`.
    """
    data, path = config.data, pathlib.Path(config.data.path)
    train, test = _open_stacks(config)[:2]
    height, width, channels = train.shape
    if data.channels_first == -1 and _looks_channels_first(train.shape):
        raise UserError(
            f"data.path: {path} has examples of {train.shape}, as if channels came first: "
            "--config.data.channels_first=1, or 0 if they are pictures of "
            f"{height}×{width} with {channels} channels"
        )
    facts: dict[str, Any] = {"image_size": height, "num_channels": channels}
    facts["image_width"] = 0 if width == height else width
    progress = Progress("reading all arrays once", len(train) + len(test))
    (low, high), (_, high_test) = train.extremes(progress), test.extremes(progress)
    ranges = [f"{a:g} to {b:g}" for a, b in zip(low, high, strict=True)]
    shown = ", ".join(ranges[:8]) + (", …" if channels > 8 else "")
    axis = "first" if data.channels_first == 1 else "last"
    log.info("%d×%d pixels of %d channels (the %s axis): %s", height, width, channels, axis, shown)
    if train.dtype.kind == "f":
        if data.num_levels:
            raise UserError(f"data.num_levels is for whole numbers; {path} has {train.dtype}")
        read = (low, high) if channels > 1 else (low[0], high[0])
        scale = tuple(data.scale) or tuple(end.tolist() for end in read)
        if (low == high).any():
            channel = int(np.argmax(low == high))
            raise UserError(
                f"data.path: {path} has no other value than {low[channel]:g} in channel {channel}"
            )
        lows, highs = _ends(scale)
        if not all(end.shape in ((), (channels,)) for end in (lows, highs)):
            raise UserError(f"data.scale is {scale}; {path} has {channels} channels")
        if not (lows < highs).all():
            raise UserError(f"data.scale is {scale}, of {path}; its first number must be smaller")
        return facts | {"scale": scale, "num_levels": 0, "dequantization": "none"}
    if data.scale:
        raise UserError(f"data.scale is for floats; {path} has {train.dtype}")
    found = int(max(high.max(), high_test.max())) + 1
    if data.num_levels and found > data.num_levels:
        raise UserError(f"data.num_levels is {data.num_levels}; {path} has the level {found - 1}")
    if low.min() == high.max():
        raise UserError(f"data.path: {path} has no other value than {low[0]:g}")
    return facts | {"num_levels": data.num_levels or found}


def _stack_dataset(
    config: ConfigDict, stack: Stack, name: str, classes: tuple[str, ...] = ()
) -> Dataset:
    if (stack.dtype.kind == "f") != bool(config.data.scale):
        kind = "floats" if config.data.scale else "whole numbers"
        raise UserError(f"{name} is {stack.dtype}; this model's data are {kind}")
    if stack.shape != array_shape(config):
        raise UserError(f"{name} has images of {stack.shape}, not {array_shape(config)}")
    source = _StackSource(stack, tuple(config.data.scale), image_shape(config))
    return Dataset(name, source, config.data.num_levels, classes)


def _load_array(config: ConfigDict) -> Data:
    path = pathlib.Path(config.data.path)
    train, test, classes, notes = _open_stacks(config)
    log.info("data: arrays of %s in %s", train.dtype, path)
    for note in notes:
        log.warning("%s", note)
    splits = (_stack_dataset(config, stack, path.stem, classes) for stack in (train, test))
    return Data(*(dataclasses.replace(split, notes=notes) for split in splits))


def array_of_images(
    config: ConfigDict, path: pathlib.Path, option: str
) -> tuple[Dataset, list[str] | None]:
    """All arrays of a file in the units of an array data set, and their labels as text, if any.

    Args:
      config: of a run on arrays.
      path: an .npy, or an .npz with `samples`, `images` or one array.
      option: the config's field of the path, for messages.

    Raises:
      UserError: they can't be read, or have another shape or kind of numbers than the data.
    """
    stack = whole_stack(path, option)
    if config.data.channels_first == 1 and stack.shape != array_shape(config):
        stack = stack.channels_last()  # as the data are; samples have them last
    progress = Progress(f"reading {path.name}", len(stack))
    if stack.extremes(progress)[1].max() >= config.data.num_levels > 0:
        raise UserError(f"{option}: {path} has levels beyond the data's {config.data.num_levels}")
    labels = None if stack.labels is None else [str(label) for label in stack.labels]
    return _stack_dataset(config, stack, path.stem), labels


def load_data(config: ConfigDict) -> Data:
    """The training and test split of `config.data.dataset`.

    Raises:
      UserError: the data are missing, can't be read, or do not fit the config.
    """
    data = config.data
    load = {"digits": lambda _: _load_digits(), "array": _load_array}
    loaded = load.get(data.dataset, _load_known)(config)
    for split, dataset in zip(("training", "test"), loaded, strict=True):
        if not len(dataset):
            raise UserError(f"{dataset.name} has no {split} images")
    expected = image_shape(config)
    shape = loaded.train.source.fetch(np.arange(1))["image"].shape[1:]
    if shape != expected:
        raise UserError(
            f"data.image_size and data.num_channels ask for images of {expected}; "
            f"{loaded.train.name} has {shape}"
        )
    classes = loaded.train.classes
    log.info(
        "%s training and %s test images, %d×%d×%d, %s, %s",
        f"{len(loaded.train):,}",
        f"{len(loaded.test):,}",
        *expected,
        f"{loaded.train.num_levels} levels" if loaded.train.num_levels else "floats",
        f"{len(classes)} classes" if classes else "no labels",
    )
    if classes != plain_classes(len(classes)):
        pairs = [f"{label} is {name!r}" for label, name in enumerate(classes)]
        shown = pairs if len(pairs) <= 20 else [*pairs[:10], "…", pairs[-1]]
        log.info("classes: %s", ", ".join(shown))
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


def fingerprint(dataset: Dataset, whole: bool = True) -> str:
    """A hash of the data set's name, size and images; unless `whole`, of 64 of these."""
    probe = dataset.source.fetch(np.linspace(0, len(dataset) - 1, 64).astype(int))
    digest = hashlib.sha256(f"{dataset.name} {len(dataset)}".encode())
    for part in (probe["image"].tobytes(), probe["label"].tobytes()):
        digest.update(part)
    if whole:
        digest.update(dataset.source.describe())
    return digest.hexdigest()[:16]


def facts_of_data(data: Data) -> dict[str, str]:
    """What tells a run's data from others: the splits' numbers of images, and hashes of some."""
    splits = {"training images": data.train, "test images": data.test}
    return {
        name: f"{len(split)} {name} ({fingerprint(split, whole=False)})"
        for name, split in splits.items()
    }


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
      num_levels: levels are 0 … num_levels - 1; 0: floats, from 0 to 1.
      centered: whether the model's range is [-1, 1] instead of [0, 1].
      dequantization: none, uniform or lossless.
      random_flip: whether to mirror images at random in training.
      width: of floats, what a difference of 1 is in the data's own units; of channels that differ,
        the geometric mean.
    """

    num_levels: int
    centered: bool
    dequantization: str
    random_flip: bool
    width: float = 1.0

    @property
    def dtype(self) -> Any:
        """The type of pixels: uint8, uint16 for more than 256 levels, or float32."""
        if not self.num_levels:
            return np.float32
        return np.uint8 if self.num_levels <= 256 else np.uint16

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
            x = images.astype(jnp.float32) / highest(self.num_levels)
        return scale(x, self.centered)

    def to_x0_without_noise(self, images: np.ndarray) -> np.ndarray:
        """Convert levels to x_0; noise of the dequantisation is replaced by its mean."""
        if self.dequantization == "uniform":
            x = (images.astype(np.float32) + 0.5) / self.num_levels
        else:
            x = images.astype(np.float32) / highest(self.num_levels)
        return scale(x, self.centered)

    def to_density_x0(self, images: np.ndarray, keys: Array) -> Array:
        """Convert pixels to values that have a density: levels uniformly dequantised, and scaled.

        Args, returns: as `to_x0`.
        """
        if not self.num_levels:
            return jnp.asarray(self.to_x0_without_noise(images))
        return scale(dequantize(images, keys, self.num_levels), self.centered)

    def to_levels(self, x: Array) -> Array:
        """Convert samples (N, H, W, C) to pixels, levels to the nearest; the inverse of `to_x0`."""
        x = inverse_scale(x, self.centered)
        if not self.num_levels:
            return x
        if self.dequantization == "uniform":
            levels = jnp.floor(x * self.num_levels)
        else:
            levels = jnp.round(x * (self.num_levels - 1))
        return jnp.clip(levels, 0, self.num_levels - 1).astype(self.dtype)

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
        doubles the width: 7 for 256 levels in [-1, 1]. For floats it is log2(width) in place of
        log2(num_levels), and gives the density in the data's own units.
        """
        return float(np.log2(self.num_levels or self.width) - (1 if self.centered else 0))


def get_preprocessing(config: ConfigDict, num_levels: int = 0) -> Preprocessing:
    """The preprocessing of a config; `num_levels` replaces the data set's number of levels."""
    data = config.data
    levels = num_levels or get_num_levels(config)
    width = 1.0
    if data.scale:
        low, high = _ends(data.scale)
        width = float(np.exp(np.mean(np.log(high - low))))
    return Preprocessing(levels, data.centered, data.dequantization, data.random_flip, width)


def share_at_ends(levels: np.ndarray, num_levels: int) -> float:
    """The share of the values that are the lowest or the highest level."""
    return float(np.mean((levels == 0) | (levels == num_levels - 1)))


def levels_to_uint8(levels: np.ndarray, num_levels: int) -> np.ndarray:
    """Convert levels to pixel values 0 … 255; floats are cut to [0, 1], and 0 if not finite."""
    if not num_levels:
        levels = np.clip(np.nan_to_num(levels, posinf=0, neginf=0), 0, 1)
    return np.round(levels.astype(np.float32) * (255 / highest(num_levels))).astype(np.uint8)


@dataclasses.dataclass(frozen=True)
class Units:
    """What users get for pixels: files in the data's own units, and pictures.

    Attributes:
      num_levels: as in `Preprocessing`.
      of_arrays: whether the data set is an array; others' files have pixel values 0 … 255.
      scale: of floats, the values in the data's units that are 0 and 1 here; numbers, or one for
        each channel.
      size: the height and width of the data, without padding.
      show_channels: the channels that pictures show; (): all, side by side if not 1 or 3.
    """

    num_levels: int
    of_arrays: bool
    scale: tuple[Any, ...]
    size: tuple[int, int]
    show_channels: tuple[int, ...]

    def to_files(self, levels: np.ndarray) -> np.ndarray:
        """Pixels (N, H, W, C) as files have them, without padding."""
        height, width = self.size
        levels = levels[:, :height, :width]
        if not self.of_arrays:
            return levels_to_uint8(levels, self.num_levels)
        if not self.scale:
            return levels
        low, high = _ends(self.scale)
        return (low + (high - low) * levels.astype(np.float64)).astype(np.float32)

    def from_files(self, files: np.ndarray, padded: tuple[int, int, int]) -> np.ndarray:
        """The inverse of `to_files`: pixels (N, H, W, C) of images that files have, padded.

        Raises:
          UserError: they are of another type, or have levels that the data do not have.
        """
        if not self.of_arrays:
            if files.dtype != np.uint8:
                raise UserError(f"images must be uint8, from 0 to 255; these are {files.dtype}")
            levels = np.round(files.astype(np.float32) * (highest(self.num_levels) / 255))
            levels = levels.astype(np.uint8)
        elif self.scale:
            low, high = _ends(self.scale)
            levels = ((files.astype(np.float64) - low) / (high - low)).astype(np.float32)
        else:
            if files.dtype.kind not in "iu" or files.min() < 0 or files.max() >= self.num_levels:
                raise UserError(f"images must be whole numbers from 0 to {self.num_levels - 1}")
            levels = files.astype(np.uint8 if self.num_levels <= 256 else np.uint16)
        more = [(0, end - size) for end, size in zip(padded[:2], files.shape[1:3], strict=True)]
        return np.pad(levels, [(0, 0), *more, (0, 0)], mode="edge")

    def to_pictures(self, levels: np.ndarray) -> np.ndarray:
        """Pixels (N, H, W, C) as pictures, (N, H, W', 1 or 3) uint8."""
        height, width = self.size
        pictures = levels_to_uint8(levels[:, :height, :width], self.num_levels)
        if self.show_channels:
            return pictures[..., list(self.show_channels)]
        if pictures.shape[-1] in (1, 3):
            return pictures
        return np.moveaxis(pictures, -1, 2).reshape(len(pictures), height, -1, 1)


def get_units(config: ConfigDict) -> Units:
    """The units of a config's data."""
    data, size = config.data, array_shape(config)[:2]
    shown, scale = tuple(config.sampling.show_channels), tuple(data.scale)
    return Units(get_num_levels(config), data.dataset == "array", scale, size, shown)
