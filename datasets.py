"""Data sets of uint8 images, and batches as a function of (seed, step).

Levels of an image are 0 … num_levels - 1: 256 for most sets, 17 for scikit-learn's digits. Flips,
dequantisation and scaling are on the device, in `preprocess`.
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
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from ml_collections import ConfigDict
from PIL import Image

import reporting
import sources
from configs.default import UserError
from sources import ArraySource, Examples, Fit, Source

log = logging.getLogger("soft_truncation")

FASHION_MNIST_PATH = "/usr/share/datasets/fashion-mnist"  # Debian's package dataset-fashion-mnist


@dataclasses.dataclass(frozen=True)
class Dataset:
    """One split of a data set.

    Attributes:
      name: the data set's name.
      source: its examples.
      num_levels: how many values a pixel can have.
      num_classes: labels are 0 … num_classes - 1; 0: there are no labels.
    """

    name: str
    source: Source
    num_levels: int
    num_classes: int

    def __len__(self) -> int:
        return len(self.source)


def get_num_levels(config: ConfigDict) -> int:
    """How many values a pixel of `config.data.dataset` can have."""
    return 17 if config.data.dataset == "digits" else 256


def _split(images: np.ndarray, labels: np.ndarray, num_test: int, split: str) -> ArraySource:
    order = np.random.default_rng(0).permutation(len(images))
    chosen = order[:num_test] if split == "test" else order[num_test:]
    return ArraySource(images[chosen], labels[chosen])


def _load_digits(split: str) -> Dataset:
    import sklearn.datasets

    digits = sklearn.datasets.load_digits()
    images = digits.images.astype(np.uint8)[..., None]
    return Dataset("digits", _split(images, digits.target, 297, split), 17, 10)


def _load_idx_folder(folder: pathlib.Path, split: str) -> ArraySource:
    def find(kind: str) -> np.ndarray:
        prefix = "train" if split == "train" else "t10k"
        for suffix in ("", ".gz"):
            path = folder / f"{prefix}-{kind}-ubyte{suffix}"
            if path.exists():
                return sources.read_idx(path)
        raise UserError(f"data.path: {folder} has no file {prefix}-{kind}-ubyte[.gz]")

    images, labels = find("images-idx3"), find("labels-idx1")
    if images.ndim != 3 or len(images) != len(labels):
        raise UserError(f"data.path: the images and labels in {folder} do not belong together")
    return ArraySource(images[..., None], labels)


def _load_fashion_mnist(config: ConfigDict, split: str) -> Dataset:
    folder = pathlib.Path(config.data.path or FASHION_MNIST_PATH)
    if config.data.path and not folder.is_dir():
        raise UserError(f"data.path: there is no folder {folder}")
    if folder.is_dir():
        source = _load_idx_folder(folder, split)
    else:
        stream = sources.load_tfds("fashion_mnist", split, config.data.tfds_dir)
        examples = stream.fetch(np.arange(len(stream)))
        source = ArraySource(examples["image"], examples["label"])
    images = sources.pad_images(source.images, config.data.image_size, "fashion_mnist")
    return Dataset("fashion_mnist", ArraySource(images, source.labels), 256, 10)


def _load_folder(config: ConfigDict, split: str, fit: Fit) -> Dataset:
    folder = pathlib.Path(config.data.path)
    if not folder.is_dir():
        raise UserError(f"data.path: there is no folder {folder}")
    own_splits = (folder / "train").is_dir() and (folder / "test").is_dir()
    root = folder / split if own_splits else folder
    # Classes are the training split's folders, so that both splits number them alike.
    training = folder / "train" if own_splits else folder
    names = sorted({p.parent.relative_to(training) for p in sources.image_files(training)})
    files = sources.image_files(root)
    if not own_splits:
        # Every tenth file in the order of names is a test image.
        files = [p for i, p in enumerate(files) if (i % 10 == 9) == (split == "test")]
    files = sources.readable(files, config.data.skip_unreadable)
    if not files:
        raise UserError(
            f"data.path: {root} has no images ({', '.join(sources.IMAGE_SUFFIXES)}) for the "
            f"{split} split; without folders train/ and test/, every tenth is test"
        )
    kinds = [p.parent.relative_to(root) for p in files]
    unknown = sorted({str(kind) for kind in kinds if kind not in names})
    if unknown:
        raise UserError(f"data.path: {folder / 'train'} has no folder {unknown[0]}, test/ has")
    labels = np.array([names.index(kind) for kind in kinds])
    source = sources.FolderSource(files, labels, fit)
    return Dataset(folder.name, source, 256, len(names) if len(names) > 1 else 0)


@dataclasses.dataclass(frozen=True)
class _Photos:
    """How TFDS knows a data set, and how its images are cut.

    Attributes:
      builder: TFDS's name; empty: it does not have it.
      splits: of training and test. The same: there is no test split.
      num_classes: of its labels, where all images have one.
      crop, resampling: as of `sources.Fit`.
    """

    builder: str = ""
    splits: tuple[str, str] = ("train", "test")
    num_classes: int = 0
    crop: int = 0
    resampling: Image.Resampling = Image.Resampling.BICUBIC


_PHOTOS = {
    "CIFAR10": _Photos("cifar10", num_classes=10),
    "SVHN": _Photos("svhn_cropped", num_classes=10),
    "CELEBA": _Photos("celeb_a", crop=140, resampling=Image.Resampling.BILINEAR),
    "CelebAHQ": _Photos("celeb_a_hq/{size}", ("train", "train")),
    "STL10": _Photos("stl10", ("train+unlabelled", "test"), resampling=Image.Resampling.BILINEAR),
    "IMAGENET32": _Photos("downsampled_imagenet/32x32", ("train", "validation")),
    "LSUN": _Photos("lsun/{category}", ("train", "validation")),
    "FFHQ": _Photos(splits=("train", "train")),
    "folder": _Photos(resampling=Image.Resampling.LANCZOS),
}


def _load_photos(config: ConfigDict, split: str) -> Dataset:
    data = config.data
    photos = _PHOTOS[data.dataset]
    fit = Fit(data.image_size, data.num_channels, photos.crop, photos.resampling)
    if data.path:
        return _load_folder(config, split, fit)
    if split == "test" and photos.splits[0] == photos.splits[1]:
        log.warning(
            "%s has no test split: test images, and their bits/dim, are training images",
            data.dataset,
        )
    if data.tfrecords_path or not photos.builder:
        source: Source = sources.load_tfrecords(pathlib.Path(data.tfrecords_path))
    else:
        builder = photos.builder.format(size=data.image_size, category=data.category)
        tfds_split = photos.splits[0 if split == "train" else 1]
        source = sources.load_tfds(builder, tfds_split, data.tfds_dir, fit)
    return Dataset(data.dataset, source, 256, photos.num_classes)


def get_dataset(config: ConfigDict, split: str) -> Dataset:
    """The `train` or `test` split of `config.data.dataset`.

    Raises:
      UserError: the data are not there, or not of the config's size.
    """
    data = config.data
    if data.dataset == "digits":
        dataset = _load_digits(split)
    elif data.dataset == "fashion_mnist":
        dataset = _load_fashion_mnist(config, split)
    else:
        dataset = _load_photos(config, split)
    expected = (data.image_size, data.image_size, data.num_channels)
    shape = dataset.source.fetch(np.arange(1))["image"].shape[1:]
    if shape != expected:
        raise UserError(
            f"data.image_size and data.num_channels ask for images of {expected}; "
            f"{dataset.name} has {shape}"
        )
    return dataset


def _epoch_order(seed: int, count: int, epoch: int) -> np.ndarray:
    """The places 0 … count - 1 as they come in an epoch."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(count)


def _read_ahead(
    read: Callable[[np.ndarray], np.ndarray], places: Iterator[np.ndarray]
) -> Iterator[np.ndarray]:
    """`read` of each, by four threads, up to eight ahead of what is asked for."""
    pool = concurrent.futures.ThreadPoolExecutor(4)
    pending: collections.deque[concurrent.futures.Future[np.ndarray]] = collections.deque()
    try:
        for chosen in places:
            pending.append(pool.submit(read, chosen))
            if len(pending) > 8:
                yield pending.popleft().result()
    finally:  # nobody asks any more, and the program should not wait for what is read
        pool.shutdown(wait=False, cancel_futures=True)


def train_batches(
    dataset: Dataset,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    places: bool = False,
) -> Iterator[dict[str, np.ndarray]]:
    """An endless stream of shuffled batches; the batch of a step is a function of (seed, step).

    An epoch has every image once, in an order of its own; a batch can have the end of one and the
    start of the next.

    Args:
      dataset: where the images come from. What is not in memory is read ahead, by threads.
      batch_size: of the global batch, over all processes.
      seed: of the order.
      start_step: the first step to give a batch for.
      process_index, process_count: this process takes the process_index-th part of each batch.
      places: give the images' places in the data set, not the images.

    Yields:
      `image` (n, H, W, C) uint8, or (n,) int32, and `index` (n,) int32, each image's place in the
      global batch, with n = batch_size / process_count.
    """
    share = batch_size // process_count
    index = np.arange(process_index * share, (process_index + 1) * share)
    # Steps go up, so that the order of one epoch is enough to keep.
    order = functools.lru_cache(1)(functools.partial(_epoch_order, seed, len(dataset)))

    def places_of(step: int) -> np.ndarray:
        epochs, at = np.divmod(step * batch_size + index, len(dataset))
        parts = [order(i)[at[epochs == i]] for i in range(epochs[0], epochs[-1] + 1)]
        return np.concatenate(parts)

    def read(chosen: np.ndarray) -> np.ndarray:
        return chosen.astype(np.int32) if places else dataset.source.fetch(chosen)["image"]

    at_hand = places or isinstance(dataset.source, ArraySource)
    steps = map(places_of, itertools.count(start_step))
    for images in map(read, steps) if at_hand else _read_ahead(read, steps):
        yield {"image": images, "index": index.astype(np.int32)}


def in_memory(dataset: Dataset, limit: int) -> np.ndarray | None:
    """All images (N, H, W, C) uint8, if they take no more than `limit` bytes."""
    if isinstance(dataset.source, ArraySource):
        images = dataset.source.images
        return images if images.nbytes <= limit else None
    size = dataset.source.fetch(np.arange(1))["image"].nbytes
    if size * len(dataset) > limit:
        return None
    progress = reporting.Progress("reading all images", len(dataset))
    with concurrent.futures.ThreadPoolExecutor() as pool:

        def read(chosen: np.ndarray) -> np.ndarray:
            return dataset.source.fetch(chosen)["image"]

        parts = []
        for part in pool.map(read, np.array_split(np.arange(len(dataset)), len(dataset) // 64 + 1)):
            parts.append(part)
            progress.advance(len(part))
    return np.concatenate(parts)


def subset(dataset: Dataset, limit: int | None = None) -> np.ndarray:
    """The places of `limit` examples drawn at random, in order; of all, if there are no more.

    The same ones always. The first ones would not do: folders and sets can be sorted by class.
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
    """A hash that tells data sets of one name apart."""
    probe = dataset.source.fetch(np.linspace(0, len(dataset) - 1, 64).astype(int))
    whole = hashlib.sha256(f"{dataset.name} {len(dataset)}".encode())
    for part in (probe["image"].tobytes(), probe["label"].tobytes(), dataset.source.describe()):
        whole.update(part)
    return whole.hexdigest()[:16]


@functools.partial(jax.vmap, in_axes=(0, 0))
def _flip(image: Array, key: Array) -> Array:
    return jnp.where(jax.random.bernoulli(key), image[:, ::-1], image)


def dequantize(images: ArrayLike, keys: Array, num_levels: int) -> Array:
    """(image + u) / num_levels in [0, 1), u uniform: (N, H, W, C) float32; one key an image."""
    images = jnp.asarray(images, jnp.float32)
    uniform = jax.vmap(lambda key: jax.random.uniform(key, images.shape[1:]))(keys)
    return (images + uniform) / num_levels


def scale(x: Any, centered: bool) -> Any:
    """From [0, 1] to the range that the model sees: [-1, 1] if centered."""
    return 2 * x - 1 if centered else x


def inverse_scale(x: Any, centered: bool) -> Any:
    """From the range that the model sees to [0, 1]."""
    return (x + 1) / 2 if centered else x


def preprocess(
    images: Array, keys: Array, num_levels: int, config: ConfigDict, flip: bool
) -> Array:
    """Levels as the model sees them: flipped at random if asked, dequantised, scaled.

    Args:
      images: levels, (N, H, W, C).
      keys: (N,), one key an image.
      num_levels: of the data.
      config: `data.random_flip`, `data.dequantization` and `data.centered` are read.
      flip: whether `data.random_flip` applies.

    Returns:
      (N, H, W, C) float32.
    """
    flip_keys, noise_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
    if flip and config.data.random_flip:
        images = _flip(images, flip_keys)
    if config.data.dequantization == "uniform":
        x = dequantize(images, noise_keys, num_levels)
    else:
        x = images.astype(jnp.float32) / (num_levels - 1)
    return scale(x, config.data.centered)


def to_model(images: np.ndarray, num_levels: int, config: ConfigDict) -> np.ndarray:
    """Levels as the model sees them, without noise: where dequantisation adds some, its mean."""
    if config.data.dequantization == "uniform":
        x = (images.astype(np.float32) + 0.5) / num_levels
    else:
        x = images.astype(np.float32) / (num_levels - 1)
    return scale(x, config.data.centered)


def to_levels(x: Array, num_levels: int, config: ConfigDict) -> Array:
    """What `preprocess` came from: the nearest levels, uint8, of samples (N, H, W, C)."""
    x = inverse_scale(x, config.data.centered)
    if config.data.dequantization == "uniform":
        levels = jnp.floor(x * num_levels)
    else:
        levels = jnp.round(x * (num_levels - 1))
    return jnp.clip(levels, 0, num_levels - 1).astype(jnp.uint8)


def levels_to_uint8(levels: np.ndarray, num_levels: int) -> np.ndarray:
    """Levels as grey values 0 … 255, for pictures."""
    return np.round(levels.astype(np.float32) * (255 / (num_levels - 1))).astype(np.uint8)


def level_grid(num_levels: int, centered: bool) -> tuple[float, float]:
    """(lowest, distance) of the levels as the model sees them without dequantisation."""
    lowest = -1.0 if centered else 0.0
    return lowest, (1 - lowest) / (num_levels - 1)


def bits_offset(num_levels: int, centered: bool) -> float:
    """What turns -log2 p(x)/D of scaled, dequantised data into bits/dim of the levels.

    log2 of the levels' number, for the width of a level in [0, 1]; less 1 where the scaling
    doubles it. 7 for 256 levels in [-1, 1].
    """
    return float(np.log2(num_levels) - (1 if centered else 0))
