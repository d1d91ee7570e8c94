"""Loads the data set that its settings name."""

import logging
import pathlib
from collections.abc import Callable

import numpy as np

from configs.errors import UserError
from data import arrays
from data.batches import Data, Dataset
from data.labels import plain_classes
from data.spec import DataSpec
from readers import cache, published
from readers.source import ArraySource

log = logging.getLogger("soft_truncation")


def _load_published(spec: DataSpec) -> Data:
    known, fit = published.PUBLISHED[spec.dataset], published.get_fit(spec)
    try:
        found = published.find(spec)
        decoded = cache.decode(spec.dataset, found, fit, spec.skip_unreadable, spec.cache)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # libraries raise any kind of error for damaged files
        log.debug("while reading data", exc_info=True)
        if isinstance(error, OSError) and error.errno:
            raise  # a full disk
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        where = spec.path or spec.dataset
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
    name = pathlib.Path(spec.path).stem if spec.dataset == "folder" else spec.dataset
    splits = (decoded.train, decoded.test)
    return Data(
        *(Dataset(name, split, spec.num_levels, decoded.classes, notes) for split in splits)
    )


def _load_digits(spec: DataSpec) -> Data:
    import sklearn.datasets

    digits = sklearn.datasets.load_digits()
    images = digits.images.astype(np.uint8)[..., None]
    order = np.random.default_rng(0).permutation(len(images))
    classes = plain_classes(10)
    log.info("data: scikit-learn's digits")
    splits = (ArraySource(images[part], digits.target[part]) for part in (order[297:], order[:297]))
    return Data(*(Dataset(spec.dataset, split, spec.num_levels, classes) for split in splits))


# Data sets that are loaded in other ways than published ones.
_OTHERS: dict[str, Callable[[DataSpec], Data]] = {
    "digits": _load_digits,
    "array": arrays.load_arrays,
}


_ahead: list[tuple[DataSpec, Data]] = []  # at most one


def load_ahead(spec: DataSpec) -> Data:
    """`load`, whose result the next `load` with the same settings returns again."""
    _ahead[:] = [(spec, load(spec))]
    return _ahead[0][1]


def load(spec: DataSpec) -> Data:
    """The training and the test split of a data set.

    Raises:
      UserError: the data are missing, can't be read, or contradict the settings.
    """
    if _ahead and _ahead[0][0] == spec:
        return _ahead.pop()[1]
    loaded = _OTHERS.get(spec.dataset, _load_published)(spec)
    for split, dataset in zip(("training", "test"), loaded, strict=True):
        if not len(dataset):
            raise UserError(f"{dataset.name} has no {split} images")
    expected = spec.padded_shape
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
