"""Reads images that a user gives by `eval.images`, to score or to complete them."""

import logging
import pathlib
from collections.abc import Sequence

import numpy as np

from build import Setup
from data.batches import Dataset, subset
from data.told_labels import check_labels
from readers.decode import Fit
from readers.samples import load_images
from readers.source import ArraySource, LabelledSource, Source

log = logging.getLogger("soft_truncation")


def given_images(
    setup: Setup, test: Dataset | None = None, fit: bool = False
) -> tuple[Dataset, Sequence[str]]:
    """The images of `eval.images`, with labels if the network is told labels; and their names.

    Args:
      setup: the parts of the run.
      test: the test images, if `eval.images` is "test".
      fit: whether image files are cropped and resized; if not, those of another size are refused.

    Raises:
      UserError: there are none, or they can't be read, or their labels are not the network's.
    """
    options, num_levels = setup.evaluation, setup.num_levels
    # Of runs that do not have the names of their classes, they are numbers.
    classes = setup.classes or tuple(map(str, range(setup.num_classes)))
    if test:
        check_labels(setup.num_classes, setup.classes, test)
        return test, [str(i) for i in subset(test, options.num_test_data)]
    path = pathlib.Path(options.images)
    if setup.units.of_arrays:
        dataset, given = setup.read_arrays(path, "eval.images")
        source: Source = dataset.source
        names: Sequence[str] = [str(i) for i in range(len(source))]
    else:
        height, _, channels = setup.shape
        to_size = Fit(height, channels) if fit else None
        source, names, given = load_images(path, height, channels, "eval.images", 1, to_size)
    if num_levels != 256 and not setup.units.of_arrays:
        grey = source.fetch(np.arange(len(names)))["image"]
        levels = np.round(grey * ((num_levels - 1) / 255)).astype(np.uint8)
        source = ArraySource(levels, np.zeros(len(names), int))
    labels = _known_labels(given, classes) if setup.num_classes else None
    if labels is None:
        return Dataset(path.stem, source, num_levels, ()), names
    source = LabelledSource(source, labels)
    return Dataset(path.stem, source, num_levels, classes), names


def _known_labels(given: Sequence[str] | None, classes: tuple[str, ...]) -> np.ndarray | None:
    """The numbers of the labels of images among a network's classes; None if any is unknown."""
    if given is None:
        log.warning("eval.images have no labels; they are taken as images of no label")
        return None
    unknown = sorted(set(given) - set(classes))
    if unknown:
        log.warning(
            "eval.images are taken as images of no label: %s is none of the network's classes %s",
            unknown[0],
            ", ".join(classes[:12]) + (", …" if len(classes) > 12 else ""),
        )
        return None
    return np.array([classes.index(name) for name in given])
