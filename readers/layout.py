"""The result of a reader: the splits of a data set, located at a path but not decoded yet."""

import dataclasses
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from configs.default import UserError

# (an encoded image or an array (H, W, C) uint8, its label)
Item = tuple[bytes | np.ndarray, int]
Labels = np.ndarray | list[int] | list[str]  # of images, in any of their own numbers or names


@dataclasses.dataclass(frozen=True)
class Records:
    """Images that are decoded one by one.

    Attributes:
      count: their number.
      read: returns the item at an index; several threads may call it at once.
      name: returns a name of the item at an index, for messages.
      size: (width, height) that every image must have; None: any.
      in_order: reading is only fast in the order of the indices (a compressed archive), and only
        one thread may read.
    """

    count: int
    read: Callable[[int], Item]
    name: Callable[[int], str]
    size: tuple[int, int] | None = None
    in_order: bool = False

    def __len__(self) -> int:
        return self.count

    def check_size(self, i: int, size: tuple[int, int]) -> None:
        """Raise UserError if `size`, the (width, height) of image i, is not the expected one."""
        if self.size and size != self.size:
            raise UserError(
                f"{self.name(i)} is {size[0]}×{size[1]} pixels; this data set's images are "
                f"{self.size[0]}×{self.size[1]}"
            )

    @staticmethod
    def joined(parts: Sequence["Records"]) -> "Records":
        """The records of all parts, one after the other."""
        starts = np.cumsum([0, *map(len, parts)])

        def place(i: int) -> tuple["Records", int]:
            number = int(np.searchsorted(starts, i, side="right")) - 1
            return parts[number], i - int(starts[number])

        def read(i: int) -> Item:
            part, row = place(i)
            return part.read(row)

        def name(i: int) -> str:
            part, row = place(i)
            return part.name(row)

        return parts[0] if len(parts) == 1 else Records(int(starts[-1]), read, name)

    def subset(self, indices: np.ndarray, labels: np.ndarray | None = None) -> "Records":
        """The records at these indices, in their order, with these labels or their own."""

        def read(i: int) -> Item:
            data, label = self.read(int(indices[i]))
            return data, label if labels is None else int(labels[i])

        def name(i: int) -> str:
            return self.name(int(indices[i]))

        return dataclasses.replace(self, count=len(indices), read=read, name=name)


@dataclasses.dataclass(frozen=True)
class Arrays:
    """Images of one size, stored as arrays.

    Attributes:
      blocks: returns an iterator over (images (n, H, W, C) uint8, labels (n,)), in order.
      is_single: whether there is a single block, in memory or memory-mapped.
    """

    blocks: Callable[[], Iterator[tuple[np.ndarray, np.ndarray]]]
    is_single: bool = False


def arrays_of(images: np.ndarray, labels: np.ndarray | None = None) -> Arrays:
    """`Arrays` of images (N, H, W, C) uint8 and labels (N,); without `labels` they are 0."""
    known = np.zeros(len(images), np.int64) if labels is None else labels.astype(np.int64)
    return Arrays(lambda: iter([(images, known)]), is_single=True)


@dataclasses.dataclass(frozen=True)
class Opened:
    """The splits of a data set.

    Attributes:
      train, test: their images.
      classes: the names of labels 0, 1, …; (): there are no labels.
      notes: sentences that the log and the report show, such as that a split is not official.
    """

    train: Records | Arrays
    test: Records | Arrays
    classes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def plain_classes(count: int) -> tuple[str, ...]:
    """The names of classes that have no others: their numbers."""
    return tuple(map(str, range(count)))


class Numbered(NamedTuple):
    """Labels as the numbers of classes.

    Attributes:
      train, test: (N,) int64 each, 0 … len(classes) - 1; None: there are no labels.
      classes: the names of labels 0, 1, …
      notes: a sentence for the log and the report, if there were labels that are not used.
    """

    train: np.ndarray | None = None
    test: np.ndarray | None = None
    classes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def number_labels(given: Sequence[Labels | None], names: Sequence[str] = ()) -> Numbered:
    """Number the labels that occur among the training images, in their order.

    One label alone is no label. Without labels for both splits, and if a test image has one that no
    training image has, they are not used.

    Args:
      given: of the training and of the test images: a whole number from 0 on for each, or a name;
        None: they have none.
      names: the names of labels 0, 1, …; others are called by their number.
    """
    train, test = given
    if train is None or test is None:
        if train is None and test is None:
            return Numbered()
        which = "training" if train is None else "test"
        return Numbered(notes=(f"labels are not used: the {which} images have none",))

    def name(label: int | str) -> str:
        return names[label] if isinstance(label, int) and label < len(names) else str(label)

    splits = [split.tolist() if isinstance(split, np.ndarray) else split for split in (train, test)]
    known = sorted(set(splits[0]))
    if len(known) < 2:
        return Numbered()
    number = {label: i for i, label in enumerate(known)}
    new = sorted(set(splits[1]) - number.keys())
    if new:
        more = f" and {len(new) - 1} more" if len(new) > 1 else ""
        note = f"labels are not used: no training image has the test images' {name(new[0])}{more}"
        return Numbered(notes=(note,))
    numbers = [np.array([number[label] for label in split], np.int64) for split in splits]
    return Numbered(numbers[0], numbers[1], tuple(map(name, known)))


@dataclasses.dataclass(frozen=True)
class Found:
    """A data set that a reader has found at a path.

    Attributes:
      what: a description for the log, as "the authors' python archive cifar-10-python.tar.gz".
      identity: paths, sizes and modification times, which change when the data change.
      open: reads the index and returns the splits; it can take long, and raises UserError.
    """

    what: str
    identity: tuple[object, ...]
    open: Callable[[], Opened]


TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("test", "testing", "val", "valid", "validation", "dev", "eval", "evaluation")
_MOST_CLASSES = 100


def split_of(name: str) -> str:
    """The word in a name that says which split it is of, as in `Train-2017`; "" without one."""
    words = re.split(r"[-._ 0-9]+", name.lower())
    found = [word for word in (*TRAIN_NAMES, *TEST_NAMES) if word in words]
    return found[0] if len(found) == 1 else ""


def choose_splits(names: Sequence[str], where: str) -> tuple[str, str] | None:
    """The names of the training and the test split among names of folders, archives or files.

    Names with other words, as train_images, count if all names are of splits. None: there are no
    splits. Of several test splits the first in the order of TEST_NAMES is taken.

    Raises:
      UserError: a split is missing, there are two of a kind, or there is something beside them.
    """
    words = {name: split_of(name) for name in names}
    exact = [n for n, word in words.items() if word and re.sub("[-._ 0-9]", "", n).lower() == word]
    others = [name for name, word in words.items() if not word]
    train = [name for name, word in words.items() if word in TRAIN_NAMES]
    tests = sorted(set(names) - set(train) - set(others), key=lambda n: TEST_NAMES.index(words[n]))
    if not exact and (others or not train or not tests):
        return None
    first = [name for name in tests if words[name] == words[tests[0]]]
    if len(train) != 1 or len(first) != 1:
        raise UserError(
            f"data.path: {where} has {', '.join(sorted(names)[:8])}; one training split, called "
            f"{' or '.join(TRAIN_NAMES)}, and a test split beside it, called "
            f"{', '.join(TEST_NAMES[:-1])} or {TEST_NAMES[-1]}, are needed"
        )
    if others:
        raise UserError(
            f"data.path: {where} has splits, {train[0]} and {tests[0]}, and beside them "
            f"{', '.join(sorted(others)[:8])}; move these away"
        )
    return train[0], tests[0]


def common_folder(names: Sequence[str]) -> str:
    """The longest folder path, ending with a slash, that all names begin with."""
    if not names:
        return ""
    first, last = (name.split("/")[:-1] for name in (min(names), max(names)))
    same = [one == other for one, other in zip(first, last, strict=False)]
    return "".join(f"{part}/" for part in first[: (*same, False).index(False)])


def folder_labels(names: Sequence[str], many: bool) -> tuple[list[str] | None, str]:
    """(the folder of each file if folders are classes, else None; a sentence if that may surprise).

    Classes are 2 to 100 folders that hold all files directly and do not only count.

    Args:
      names: the files' paths.
      many: whether more than 100 folders are classes, too.
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


def every_tenth(count: int) -> tuple[np.ndarray, np.ndarray]:
    """(training, test) indices of a data set without splits: every tenth is a test image."""
    is_test = np.arange(count) % 10 == 9
    return np.flatnonzero(~is_test), np.flatnonzero(is_test)


def last_part(count: int, parts: int) -> tuple[np.ndarray, np.ndarray]:
    """(training, test) indices where the last of `parts` equal parts is the test split."""
    num_test = count // parts
    return np.arange(count - num_test), np.arange(count - num_test, count)
