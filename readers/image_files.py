"""Image files in folders, zip and tar archives, with or without splits and classes."""

import json
import pathlib
import re
from collections.abc import Callable, Sequence

import numpy as np

from configs.default import UserError
from readers.containers import (
    Container,
    Folder,
    archive_stem,
    is_archive_name,
    open_container,
)
from readers.decode import is_image_name, open_image
from readers.layout import Found, Item, Labels, Opened, Records, every_tenth, number_labels

TRAIN_NAMES = ("train", "train_32x32")
TEST_NAMES = ("test", "val", "valid", "valid_32x32", "validation")  # the first one found
_MOST_CLASSES = 100
_LABELS = "dataset.json"

Splitter = Callable[[int], tuple[np.ndarray, np.ndarray]]  # count → (training, test) indices


def records_of(
    container: Container,
    names: Sequence[str],
    labels: np.ndarray | None = None,
    size: tuple[int, int] | None = None,
) -> Records:
    """Records of some of a container's files; without `labels` all labels are 0."""
    of = np.zeros(len(names), np.int64) if labels is None else labels

    def read(i: int) -> Item:
        return container.read(names[i]), int(of[i])

    def name(i: int) -> str:
        return f"{container.path}/{names[i]}"

    return Records(len(names), read, name, size, container.in_order)


def _common_folder(names: Sequence[str]) -> str:
    """The longest folder path, ending with a slash, that all names begin with."""
    if not names:
        return ""
    first, last = (name.split("/")[:-1] for name in (min(names), max(names)))
    shared = []
    for one, other in zip(first, last, strict=False):
        if one != other:
            break
        shared.append(one)
    return "".join(f"{part}/" for part in shared)


class _Part:
    """The image files of a split, or of a data set without splits."""

    def __init__(self, container: Container, prefix: str = "") -> None:
        self.container = container
        self.names = [n for n in container.names() if is_image_name(n) and n.startswith(prefix)]
        self.root = prefix + _common_folder([n.removeprefix(prefix) for n in self.names])

    def class_names(self) -> list[str] | None:
        """The folder of each image, if all lie one level below the root; else None."""
        below = [name.removeprefix(self.root).split("/") for name in self.names]
        # In a split with a single class, the class folder is the root.
        if any(len(parts) != 2 for parts in below):
            return None
        return [parts[0] for parts in below]


def _folder_labels(parts: Sequence[_Part], wanted: int | None) -> list[list[str] | None]:
    """The class folder of each image of each part; None if folders are not classes.

    Args:
      parts: the splits, or one part of a data set without splits.
      wanted: the number of classes; another number is refused. None: 2 to 100 folders are classes.
    """
    none: list[list[str] | None] = [None] * len(parts)
    if wanted == 0:
        return none
    folders = [part.class_names() for part in parts]
    known = sorted(set(folders[0] or []))
    if wanted:
        if len(known) != wanted or any(set(names or ["/"]) - set(known) for names in folders):
            raise UserError(
                f"{parts[0].container.path} must have {wanted} class folders below each split, "
                f"the same in both; it has {', '.join(known[:12]) or 'none'}"
            )
    elif not 2 <= len(known) <= _MOST_CLASSES:
        return none
    elif all(re.fullmatch(r"\d{4,}", name) for name in known):
        return none  # numbered folders, as in FFHQ and EDM
    return folders


def _labels_file(part: _Part) -> str | None:
    """The path of a dataset.json in a folder that contains all images, or None."""
    for name in part.container.names():
        if name.split("/")[-1] == _LABELS and part.root.startswith(name.removesuffix(_LABELS)):
            return name
    return None


def _edm_labels(part: _Part, file: str) -> list[int] | None:
    """Labels in dataset.json, the format of EDM's and StyleGAN's dataset_tool.py."""
    container = part.container
    where = f"{container.path}/{file}"
    try:
        given = json.loads(container.read(file)).get("labels")
        by_name = None if given is None else {name: int(label) for name, label in given}
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{where} can't be understood: {error}") from error
    if by_name is None:
        return None
    names = [name.removeprefix(file.removesuffix(_LABELS)) for name in part.names]
    missing = [name for name in names if name not in by_name]
    if missing:
        raise UserError(
            f"{where} has no label for {missing[0]} ({len(missing)} of {len(names)} are missing)"
        )
    labels = [by_name[name] for name in names]
    if min(labels) < 0:
        raise UserError(f"{where} has the negative label {min(labels)}")
    return labels


def labels_of(container: Container, classes: int | None = None) -> Labels | None:
    """The labels of all image files of a container, in the order of their names.

    They are those of dataset.json, or the names of class folders; None: there are none.
    """
    part = _Part(container)
    file = _labels_file(part)
    return _folder_labels([part], classes)[0] if file is None else _edm_labels(part, file)


def _open_unsplit(container: Container, classes: int | None, note: str) -> Opened:
    names = [name for name in container.names() if is_image_name(name)]
    if not names:
        raise UserError(f"data.path: {container.path} has no images")
    if len(names) < 10:
        raise UserError(
            f"data.path: {container.path} has {len(names)} images; every tenth is held out "
            "for testing, so 10 or more are needed"
        )
    size = None
    if _labels_file(_Part(container)) is not None:
        size = open_image(container.read(names[0])).size
    labels, indices = labels_of(container, classes), every_tenth(len(names))
    numbered = number_labels(
        [None if labels is None else [labels[i] for i in part] for part in indices]
    )
    records = [
        records_of(container, [names[i] for i in part], of, size)
        for part, of in zip(indices, (numbered.train, numbered.test), strict=True)
    ]
    notes = ((note,) if note else ()) + numbered.notes
    return Opened(records[0], records[1], numbered.classes, notes)


def _open_splits(train: _Part, test: _Part, classes: int | None) -> Opened:
    for part in (train, test):
        if not part.names:
            raise UserError(f"data.path: {part.container.path}/{part.root} has no images")
    of_train, of_test, known, notes = number_labels(_folder_labels([train, test], classes))
    return Opened(
        records_of(train.container, train.names, of_train),
        records_of(test.container, test.names, of_test),
        known,
        notes,
    )


def _split_names(names: Sequence[str], prefix: str, path: pathlib.Path) -> tuple[str, str] | None:
    """The (training, test) names among `names`; None if none of them names a split.

    Raises:
      UserError: a split is missing, or there are names beside the splits.
    """
    train = [name for name in names if name.removeprefix(prefix) in TRAIN_NAMES]
    tests = [prefix + name for name in TEST_NAMES if prefix + name in names]
    tests += [name for name in TEST_NAMES if prefix and name in names]
    if not train and not tests:
        return None
    others = sorted(set(names) - set(train) - set(tests))
    if len(train) != 1 or not tests:
        have = ", ".join(sorted(names)[:8])
        raise UserError(
            f"data.path: {path} has {have}; a training split is called {' or '.join(TRAIN_NAMES)}, "
            f"and a test split beside it {', '.join(TEST_NAMES)}"
        )
    if others:
        raise UserError(
            f"data.path: {path} has splits, {train[0]} and {tests[0]}, and beside them "
            f"{', '.join(others[:8])}; move these away"
        )
    return train[0], tests[0]


def _places(path: pathlib.Path) -> dict[str, pathlib.Path]:
    """The folders and archives in a folder, by their names without suffix."""
    return {
        archive_stem(entry.name): entry
        for entry in sorted(path.iterdir())
        if not entry.name.startswith((".", "__MACOSX"))
        and (entry.is_dir() or is_archive_name(entry.name))
    }


def find_splits(
    path: pathlib.Path, classes: int | None = None, prefix: str = "", what: str = "images"
) -> Found | None:
    """Image files in train/ and test/ (val/, valid/, …), each a folder or an archive.

    Args:
      path: the folder that contains both, or an archive with both.
      classes: the number of classes; 0: no labels; None: as `_classes` finds.
      prefix: a prefix that the splits' names may have.
      what: a name for the images in the log.
    """
    if path.is_dir():
        places = _places(path)
        loose = [p.name for p in path.iterdir() if p.is_file() and is_image_name(p.name)]
        chosen = _split_names([*places, *loose[:1]], prefix, path)
        if chosen is None:
            return None
        train, test = (open_container(places[name]) for name in chosen)
        names = " and ".join(places[name].name for name in chosen)
        return Found(
            f"{what} in {path}, splits {names}",
            (train.identity(), test.identity(), classes),
            lambda: _open_splits(_Part(train), _Part(test), classes),
        )
    container = open_container(path)
    files = [name for name in container.names() if is_image_name(name)]
    root = _common_folder(files)
    tops = sorted({name.removeprefix(root).split("/")[0] for name in files})
    # A folder with many entries has no splits.
    chosen = _split_names(tops, prefix, path) if len(tops) <= 8 else None
    if chosen is None:
        return None
    train_root, test_root = (f"{root}{name}/" for name in chosen)
    return Found(
        f"{what} in {path}, splits {' and '.join(chosen)}",
        (container.identity(), classes),
        lambda: _open_splits(_Part(container, train_root), _Part(container, test_root), classes),
    )


def find_unsplit(path: pathlib.Path, classes: int | None = None, note: str = "") -> Found:
    """Image files in a folder or an archive without splits; every tenth is a test image.

    Labels are read from dataset.json, as in EDM's and StyleGAN's zips; without it, folders may be
    classes.

    Args:
      path: the folder or archive.
      classes: the number of classes; 0: no labels; None: as `_classes` finds.
      note: a sentence for the log and the report.
    """
    container = open_container(path)
    kind = "image files" if isinstance(container, Folder) else "images of the archive"
    return Found(
        f"{kind} {path}, every tenth held out",
        (container.identity(), classes, "every tenth"),
        lambda: _open_unsplit(container, classes, note),
    )


def find_held_out(path: pathlib.Path, split: Splitter, what: str) -> Found:
    """Image files without labels; `split` divides them in the order of their names."""
    container = open_container(path)

    def opened() -> Opened:
        names = [name for name in container.names() if is_image_name(name)]
        train, test = split(len(names))
        if not len(test):
            raise UserError(f"data.path: {path} has {len(names)} images, too few to hold some out")
        records = records_of(container, names)
        return Opened(records.subset(train), records.subset(test))

    return Found(f"{path}, {what}", (container.identity(), what), opened)
