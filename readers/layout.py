"""The result of a reader: the splits of a data set, located at a path but not decoded yet."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, NamedTuple, TypeVar

import numpy as np

# (an encoded image or an array (H, W, C) uint8, its label)
Item = tuple[bytes | np.ndarray, int]
Of = TypeVar("Of", covariant=True)


@dataclasses.dataclass(frozen=True)
class Records:
    """Images that are decoded one by one.

    Attributes:
      count: their number.
      read: returns the item at an index; several threads may call it at once.
      name: returns a name of the item at an index, for messages.
      size: (width, height) that every image must have; None: any.
      place: of a compressed archive, where each item lies: reading is only fast in this order, and
        only one thread may read; None: any order is fast.
    """

    count: int
    read: Callable[[int], Item]
    name: Callable[[int], str]
    size: tuple[int, int] | None = None
    place: np.ndarray | None = None

    def __len__(self) -> int:
        return self.count

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
        """The records at these indices, with these labels or their own, in a fast order."""
        place = None if self.place is None else self.place[indices]
        if place is not None:
            order = np.argsort(place)
            place, indices = place[order], indices[order]
            labels = None if labels is None else labels[order]

        def read(i: int) -> Item:
            data, label = self.read(int(indices[i]))
            return data, label if labels is None else int(labels[i])

        def name(i: int) -> str:
            return self.name(int(indices[i]))

        return dataclasses.replace(self, count=len(indices), read=read, name=name, place=place)


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


class Splits(NamedTuple, Generic[Of]):
    """The splits of a data set.

    Attributes:
      train, test: their images, or what belongs to these.
      classes: the names of labels 0, 1, …; (): there are no labels.
      notes: sentences that the log and the report show, such as that a split is not official.
    """

    train: Of
    test: Of
    classes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


Opened = Splits[Records | Arrays]


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
