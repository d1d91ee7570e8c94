"""Data sets of uint8 images, and batches as a function of (seed, step).

Levels of an image are 0 … num_levels - 1: 256 for most sets, 17 for scikit-learn's digits. Flips,
dequantisation and scaling are on the device, in `preprocess`. `readers` has the files' formats;
docs/data.md says how each data set can be brought.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
import itertools
import logging
import math
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from ml_collections import ConfigDict
from PIL import Image

import reporting
from configs.default import UserError
from readers import (
    arrays,
    cache,
    celeba,
    cifar,
    download,
    idx,
    image_files,
    lsun,
    parquet,
    stl10,
    svhn,
    tfds,
    tfrecords,
)
from readers.decode import Fit
from readers.layout import Found, Opened, Records, last_part
from readers.source import ArraySource, Examples, Source

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
      notes: sentences that a report of it must show.
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
    """How many values a pixel of `config.data.dataset` can have."""
    return 17 if config.data.dataset == "digits" else 256


@dataclasses.dataclass(frozen=True)
class _Known:
    """What is known of a data set.

    Attributes:
      title: its usual name.
      files: the authors' files, and where they are to be had; for messages.
      find: (path, config.data) → what a reader of the authors' files found.
      classes: of its labels; 0: it has none; None: folders that look like classes are labels.
      published: its number of training and test images.
      native: side of all its images in pixels; 0: any.
      tfds: TFDS's name of it; empty: it does not have it.
      tfds_splits: of training and test.
      held_out: of so many equal parts of the images the last is the test split; 0: it has splits.
      crop, resampling, pad: as of `Fit`.
    """

    title: str
    files: str
    find: Callable[[pathlib.Path, ConfigDict], Found | None]
    classes: int | None = 0
    published: tuple[int, int] | None = None
    native: int = 0
    tfds: str = ""
    tfds_splits: tuple[str, str] = ("train", "test")
    held_out: int = 0
    crop: int = 0
    resampling: Image.Resampling = Image.Resampling.BICUBIC
    pad: bool = False

    def hold_out(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(training, test) indices of a data set without splits."""
        return last_part(count, self.held_out)

    @property
    def held_out_share(self) -> str:
        """The rule of `hold_out` in words."""
        share = {7: "seventh", 10: "tenth"}[self.held_out]
        return f"of which the last {share} is held out for testing"


def _find_cifar10(path: pathlib.Path, data: ConfigDict) -> Found | None:
    del data
    return cifar.find_cifar10(path)


def _find_svhn(path: pathlib.Path, data: ConfigDict) -> Found | None:
    del data
    return svhn.find(path)


def _find_stl10(path: pathlib.Path, data: ConfigDict) -> Found | None:
    del data
    return stl10.find(path)


def _find_idx(path: pathlib.Path, data: ConfigDict) -> Found | None:
    del data
    return idx.find(path)


def _find_celeba(path: pathlib.Path, data: ConfigDict) -> Found | None:
    del data
    return celeba.find(path)


def _find_lsun(path: pathlib.Path, data: ConfigDict) -> Found | None:
    return lsun.find(path, data.category)


def _find_imagenet32(path: pathlib.Path, data: ConfigDict) -> Found | None:
    del data
    if cifar.find_imagenet32_2017(path):
        raise UserError(
            f"data.path: {path} has the pickled batches of 2017, which are another data set than "
            "the older one of the published bits/dim: --config.data.dataset=IMAGENET32_2017"
        )
    return image_files.find_splits(path, 0, what="the authors' images")


def _find_imagenet32_2017(path: pathlib.Path, data: ConfigDict) -> Found | None:
    del data
    found = cifar.find_imagenet32_2017(path)
    if found is None and image_files.find_splits(path, 0):
        raise UserError(
            f"data.path: {path} has train_32x32 and valid_32x32, which are another data set than "
            "the pickled batches of 2017: --config.data.dataset=IMAGENET32"
        )
    return found


def _find_faces(path: pathlib.Path, data: ConfigDict) -> Found | None:
    known = _KNOWN[data.dataset]
    if path.is_dir():
        of_size = f"*-r{round(math.log2(data.image_size)):02}.tfrecords"
        files = sorted(path.glob(of_size))
        if len(files) > 1:
            raise UserError(f"data.path: {path} has {', '.join(f.name for f in files)}; name one")
        path = files[0] if files else path
    found = tfrecords.find(path, known.hold_out, known.held_out_share)
    if found is None and path.is_dir():
        found = image_files.find_splits(path, 0)
    return found or image_files.find_held_out(path, known.hold_out, known.held_out_share)


def _find_folder(path: pathlib.Path, data: ConfigDict) -> Found | None:
    del data
    return (
        arrays.find(path)
        or parquet.find(path)
        or image_files.find_splits(path)
        or image_files.find_unsplit(path)
    )


_KNOWN = {
    "CIFAR10": _Known(
        "CIFAR-10",
        "cifar-10-python.tar.gz or cifar-10-binary.tar.gz, packed or unpacked, of "
        "https://www.cs.toronto.edu/~kriz/cifar.html",
        _find_cifar10,
        classes=10,
        published=(50_000, 10_000),
        native=32,
        tfds="cifar10",
    ),
    "SVHN": _Known(
        "SVHN",
        "train_32x32.mat and test_32x32.mat of http://ufldl.stanford.edu/housenumbers",
        _find_svhn,
        classes=10,
        published=(73_257, 26_032),
        native=32,
        tfds="svhn_cropped",
    ),
    "STL10": _Known(
        "STL-10",
        "stl10_binary.tar.gz, packed or unpacked, of https://cs.stanford.edu/~acoates/stl10",
        _find_stl10,
        published=(105_000, 8_000),
        tfds="stl10",
        tfds_splits=("train+unlabelled", "test"),
        resampling=Image.Resampling.BILINEAR,
    ),
    "fashion_mnist": _Known(
        "Fashion-MNIST",
        "the four IDX files of https://github.com/zalandoresearch/fashion-mnist, or Debian's "
        "package dataset-fashion-mnist",
        _find_idx,
        classes=10,
        published=(60_000, 10_000),
        native=28,
        tfds="fashion_mnist",
        pad=True,
    ),
    "IMAGENET32": _Known(
        "ImageNet 32 (the older set, which published bits/dim are of)",
        "train_32x32.tar and valid_32x32.tar (or .zip, or unpacked); their address is gone, and "
        "Academic Torrents has them as Downsampled ImageNet 32x32",
        _find_imagenet32,
        published=(1_281_149, 49_999),
        native=32,
        tfds="downsampled_imagenet/32x32",
        tfds_splits=("train", "validation"),
    ),
    "IMAGENET32_2017": _Known(
        "ImageNet 32 of 2017 (Chrabaszcz et al.)",
        "Imagenet32_train.zip and Imagenet32_val.zip, packed or unpacked, of "
        "https://image-net.org/download-images (after registration)",
        _find_imagenet32_2017,
        classes=1000,
        published=(1_281_167, 50_000),
        native=32,
        tfds="imagenet_resized/32x32",
        tfds_splits=("train", "validation"),
    ),
    "CELEBA": _Known(
        "CelebA",
        "img_align_celeba.zip (or unpacked) and list_eval_partition.txt of "
        "http://mmlab.ie.cuhk.edu.hk/projects/CelebA.html",
        _find_celeba,
        published=(162_770, 19_962),
        tfds="celeb_a",
        crop=140,
        resampling=Image.Resampling.BILINEAR,
    ),
    "CelebAHQ": _Known(
        "CelebA-HQ",
        "celebahq-r08.tfrecords, by dataset_tool.py of "
        "https://github.com/tkarras/progressive_growing_of_gans, or a folder of its PNGs",
        _find_faces,
        published=(27_000, 3_000),
        tfds="celeb_a_hq/{size}",
        tfds_splits=("train", "train"),
        held_out=10,
    ),
    "FFHQ": _Known(
        "FFHQ",
        "ffhq-r08.tfrecords (r10 for 1024×1024) or the folders of PNGs of "
        "https://github.com/NVlabs/ffhq-dataset",
        _find_faces,
        published=(60_000, 10_000),
        held_out=7,
    ),
    "LSUN": _Known(
        "LSUN",
        "SCENE_train_lmdb.zip and SCENE_val_lmdb.zip of https://github.com/fyu/lsun, unpacked, or "
        "what its data.py exports of them, as train/ and val/",
        _find_lsun,
        tfds="lsun/{category}",
        tfds_splits=("train", "validation"),
    ),
    "folder": _Known(
        "images",
        "a folder, a zip or a tar of images, parquet files, or arrays",
        _find_folder,
        classes=None,
        resampling=Image.Resampling.LANCZOS,
    ),
}


def _other_ways(known: _Known) -> str:
    """A sentence that says how a data set can be brought."""
    ways = f"bring {known.files}, and name the file or folder by --config.data.path"
    if known.tfds:
        ways += "; or name a folder of TFDS's by --config.data.tfds_dir"
    return f"{ways}; docs/data.md has all ways"


def _find(data: ConfigDict, known: _Known) -> Found:
    """What lies where the config says, or what is downloaded."""
    path = data.path or ("" if data.tfds_dir else data.tfrecords_path)
    if not path and data.tfds_dir:
        return _find_tfds(data, known)
    if not path and data.dataset == "fashion_mnist" and pathlib.Path(FASHION_MNIST_PATH).is_dir():
        path = FASHION_MNIST_PATH
    if not path and data.dataset in download.FILES:
        path = str(download.fetch(data.dataset, _other_ways(known).capitalize()))
    if not path:
        raise UserError(
            f"{known.title} has no stable address to be downloaded from: {_other_ways(known)}"
        )
    place = pathlib.Path(path).expanduser()
    if not place.exists():
        option = "data.path" if data.path else "data.tfrecords_path"
        raise UserError(f"{option}: there is no file or folder {place}; {_other_ways(known)}")
    found = known.find(place, data)
    if found is None and data.dataset != "folder":
        found = (
            parquet.find(place, needs_splits=True)
            or arrays.find(place, needs_splits=True)
            or image_files.find_splits(place, known.classes)
        )
    if found is None:
        raise UserError(
            f"data.path: {place} has nothing that {known.title} is read from; {_other_ways(known)}"
        )
    return found


def _find_tfds(data: ConfigDict, known: _Known) -> Found:
    if not known.tfds:
        raise UserError(f"data.tfds_dir: TFDS does not have {known.title}; {_other_ways(known)}")
    return tfds.find(
        known.tfds.format(size=data.image_size, category=data.category),
        pathlib.Path(data.tfds_dir).expanduser(),
        known.tfds_splits,
        known.classes or 0,
        known.hold_out if known.held_out else None,
    )


def _check_opened(found: Found, known: _Known) -> Found:
    """`found`, whose images must be of the data set's size, and its labels of its classes."""

    def opened() -> Opened:
        got = found.open()
        if known.classes and got.num_classes not in (0, known.classes):
            raise UserError(
                f"{found.what}: {got.num_classes} classes; {known.title} has {known.classes}"
            )
        if not known.native:
            return got
        size = (known.native, known.native)
        splits = [
            dataclasses.replace(split, size=size) if isinstance(split, Records) else split
            for split in (got.train, got.test)
        ]
        return dataclasses.replace(got, train=splits[0], test=splits[1])

    return dataclasses.replace(found, open=opened)


def _load_known(config: ConfigDict) -> Data:
    data = config.data
    known = _KNOWN[data.dataset]
    found = _check_opened(_find(data, known), known)
    fit = Fit(data.image_size, data.num_channels, known.crop, known.resampling, known.pad)
    decoded = cache.decode(data.dataset, found, fit, data.skip_unreadable, data.cache)
    counts = (len(decoded.train), len(decoded.test))
    notes = decoded.notes
    if known.published and counts != known.published:
        train, test = known.published
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
      UserError: the data are not there, or not as the config says.
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
        *(f"{len(loaded.train):,}", f"{len(loaded.test):,}", *expected),
        *(loaded.train.num_levels, f"{classes} classes" if classes else "no labels"),
    )
    return loaded


def get_dataset(config: ConfigDict, split: str) -> Dataset:
    """The `train` or `test` split of `load_data`."""
    return getattr(load_data(config), split)


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

    source = dataset.source
    in_memory = isinstance(source, ArraySource) and not isinstance(source.images, np.memmap)
    at_hand = places or in_memory
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
