"""Training and test splits: the names that they have, and how images are held out without."""

import posixpath
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from configs.errors import UserError
from data.labels import Labels, number_labels
from readers.layout import Splits

TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("test", "testing", "val", "valid", "validation", "dev", "eval", "evaluation")


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
    common = posixpath.commonpath(map(posixpath.dirname, (min(names), max(names))))
    return common and f"{common}/"


def every_tenth(count: int) -> tuple[np.ndarray, np.ndarray]:
    """(training, test) indices of a data set without splits: every tenth is a test image."""
    is_test = np.arange(count) % 10 == 9
    return np.flatnonzero(~is_test), np.flatnonzero(is_test)


def last_part(count: int, parts: int) -> tuple[np.ndarray, np.ndarray]:
    """(training, test) indices where the last of `parts` equal parts is the test split."""
    num_test = count // parts
    return np.arange(count - num_test), np.arange(count - num_test, count)


def divide(
    parts: Sequence[Any],
    labels: Sequence[Labels | None],
    names: Sequence[str] = (),
    dropped: Iterable[str] = (),
    held_out: int = 0,
) -> Splits[Any]:
    """The training and the test split of a data set, with their labels numbered.

    Args:
      parts: both splits; or all examples, of which every tenth is for testing. They have a method
        `subset(indices, labels)`.
      labels: of each part; None: it has none.
      names, dropped: as of `number_labels`.
      held_out: without splits, the last of this many equal parts is for testing instead.
    """
    rows: Sequence[np.ndarray] = [np.arange(len(part)) for part in parts]
    if len(parts) == 1:
        rows = last_part(len(parts[0]), held_out) if held_out else every_tenth(len(parts[0]))
        parts, labels = [*parts] * 2, [*labels] * 2
    known = [of.tolist() if isinstance(of, np.ndarray) else of for of in labels]
    given = [of and [of[i] for i in chosen] for of, chosen in zip(known, rows, strict=True)]
    numbers, classes, note = number_labels(given, names, dropped)
    train, test = (
        part.subset(chosen, of) for part, chosen, of in zip(parts, rows, numbers, strict=True)
    )
    return Splits(train, test, classes, (note,) if note else ())
