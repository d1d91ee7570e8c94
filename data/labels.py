"""Decides which labels of images are classes, and numbers them."""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

Labels = np.ndarray | list[int] | list[str]  # of images, in any of their own numbers or names
Classes = tuple[str, ...]  # the names of labels 0, 1, …
_MOST_CLASSES = 100


def plain_classes(count: int) -> tuple[str, ...]:
    """The names of classes without names: their numbers."""
    return tuple(map(str, range(count)))


def number_labels(
    given: Sequence[list[Any] | None], names: Sequence[str] = (), dropped: Iterable[str] = ()
) -> tuple[Sequence[np.ndarray | None], Classes, str]:
    """(the number of each label, (N,) int64, or None; the classes; a note) of both splits.

    The labels that occur among the training images are numbered in their order.

    Labels are not used if there is only one, if a split has none, or if a test image has a label
    that no training image has.

    Args:
      given: the labels of the training and of the test images: a whole number from 0 on, or a name,
        for each image; None: the split has no labels.
      names: the names of labels 0, 1, …; labels without a name are called by their number.
      dropped: reasons why labels are None; the first that is not empty becomes the note.
    """
    train, test = given
    told = next(filter(None, dropped), "")
    if train is None or test is None:
        if not told and (train is not None or test is not None):
            which = "training" if train is None else "test"
            told = f"labels are not used: the {which} images have none"
        return (None, None), (), told

    def name(label: int | str) -> str:
        return names[label] if isinstance(label, int) and label < len(names) else str(label)

    known = sorted(set(train))
    if len(known) < 2:
        return (None, None), (), ""
    number = {label: i for i, label in enumerate(known)}
    new = sorted(set(test) - number.keys())
    if new:
        more = f" and {len(new) - 1} more" if len(new) > 1 else ""
        note = f"labels are not used: no training image has the test images' {name(new[0])}{more}"
        return (None, None), (), note
    numbers = [np.array([number[label] for label in split], np.int64) for split in (train, test)]
    return numbers, tuple(map(name, known)), ""


def folder_labels(names: Sequence[str], many: bool) -> tuple[list[str] | None, str]:
    """(the folder of each file if folders are classes, else None; a note if this may surprise).

    Folders are classes if there are 2 to 100 of them, all files are directly in them, and their
    names do not only count.

    Args:
      names: the files' paths.
      many: whether more than 100 folders can be classes as well.
    """
    below = [unicodedata.normalize("NFC", name).split("/") for name in names]
    folders = {parts[0] for parts in below if len(parts) == 2}
    if len(folders) < 2 or all(re.fullmatch(r"\d{4,}", folder) for folder in folders):
        return None, ""  # numbered folders, as in FFHQ and EDM
    stray = next((name for name, parts in zip(names, below, strict=True) if len(parts) != 2), None)
    if stray is not None:
        return None, f"labels are not used: {stray} is in none of the {len(folders)} class folders"
    if len(folders) > _MOST_CLASSES and not many:
        return None, (
            f"labels are not used: there are {len(folders)} folders; if they are classes, set "
            "--config.model.num_classes=-1"
        )
    return [parts[0] for parts in below], ""
