"""The labels that a network is told: those of its samples, and checks of those of images."""

import pathlib

import numpy as np

from configs.errors import UserError
from data.batches import Dataset


def check_labels(num_classes: int, classes: tuple[str, ...], images: Dataset) -> None:
    """Raise a UserError if the images do not have the labels that a network is told.

    Args:
      num_classes: the number of labels that it is told; 0: none.
      classes: their names, as far as they are known.
      images: the images.
    """
    if not num_classes:
        return
    if num_classes != images.num_classes:
        has = f"{images.num_classes} labels" if images.num_classes else "no labels"
        raise UserError(
            f"model.num_classes is {num_classes}, and {images.name} has {has}; a new run takes the "
            "data set's with --config.model.num_classes=-1"
        )
    for number, (known, name) in enumerate(zip(classes, images.classes, strict=False)):
        if known != name:
            raise UserError(
                f"label {number} is {name!r} in {images.name}, and {known!r} in the run's training "
                "data; bring images of the same classes, or start a new run with --init_from"
            )


def sample_labels(text: str, num_classes: int, start: int, count: int) -> np.ndarray:
    """The labels of the samples with the indices start … start + count - 1, int32.

    Args:
      text: `sampling.labels`, whose labels are taken in turn.
      num_classes: the number of labels, which itself stands for no label.
      start, count: the index of the first sample, and the number of samples.

    Raises:
      UserError: the text can't be read, or a label does not exist.
    """
    text = text.strip()
    if text == "all":
        chosen = np.arange(num_classes)
    elif text == "none":
        chosen = np.array([num_classes])
    else:
        chosen = _read_labels(text)
        wrong = [int(label) for label in chosen if not 0 <= label < num_classes]
        if wrong:
            raise UserError(
                f"sampling.labels has {wrong[0]}; the labels of this model are 0 to "
                f"{num_classes - 1}"
            )
    return chosen[np.arange(start, start + count) % len(chosen)].astype(np.int32)


def _read_labels(text: str) -> np.ndarray:
    try:
        numbers = pathlib.Path(text).read_text() if pathlib.Path(text).is_file() else text
        chosen = np.array([int(number) for number in numbers.replace(",", " ").split()])
    except (OSError, ValueError):
        chosen = np.zeros(0, int)
    if not len(chosen):
        raise UserError(
            f"sampling.labels is {text!r}; it must be a label, several as 0,1,2, all, none, or a "
            "text file of labels"
        )
    return chosen
