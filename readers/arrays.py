"""Arrays in .npy and .npz files: uint8 images, and stacks of any size, channels and units."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from configs.default import UserError
from readers.containers import file_identity
from readers.layout import Found, Opened, arrays_of, every_tenth, number_labels
from runtime.progress import Progress

_SPLITS = ("x_train", "y_train", "x_test", "y_test")  # as in Keras's mnist.npz


def _load(path: pathlib.Path, option: str = "data.path") -> dict[str, np.ndarray]:
    """The arrays of an .npz file by name, or the memory-mapped array of an .npy as `images`."""
    try:
        loaded = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return {"images": loaded}
        with loaded:
            arrays = {name: loaded[name] for name in loaded.files}
        if not all(isinstance(array, np.ndarray) for array in arrays.values()):
            raise ValueError("a member is no array")
        return arrays
    except Exception as error:  # a damaged archive can raise any kind of error
        reason = "it has objects" if "bject" in str(error) else str(error)
        # NumPy takes any other file for a pickle, and advises to allow pickles.
        reason = "it is no file of arrays" if "pickle" in reason else reason
        raise UserError(f"{option}: {path} can't be read: {reason}") from error


def _images(path: pathlib.Path, name: str, images: np.ndarray) -> np.ndarray:
    """Check images (N, H, W, C) or (N, H, W), and return them as (N, H, W, C)."""
    images = images[..., None] if images.ndim == 3 else images
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise UserError(
            f"data.path: {path} has {name} of {images.dtype}, {images.shape}; uint8 of (N, H, W), "
            "(N, H, W, 1) or (N, H, W, 3) is needed"
        )
    return images


def _labels(path: pathlib.Path, labels: np.ndarray | None, count: int) -> np.ndarray | None:
    """Check the labels (N,) or (N, 1) of `count` images, and return them as (N,)."""
    if labels is None:
        return None
    labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    whole = np.issubdtype(labels.dtype, np.integer)
    if not whole or labels.shape != (count,) or (count and labels.min() < 0):
        raise UserError(
            f"data.path: {path} has {count} images and labels of {labels.dtype}, {labels.shape}; "
            "whole numbers from 0 on, one for each image, are needed"
        )
    return labels


def _name_of_images(path: pathlib.Path, found: dict[str, np.ndarray], option: str) -> str:
    """The name of the array of images among those of a file."""
    known = [name for name in found if name in ("images", "samples", "arr_0")] or list(found)
    if len(known) != 1:
        raise UserError(
            f"{option}: {path} has the arrays {', '.join(found)}; needed are images (and labels), "
            f"or {', '.join(_SPLITS)}, or one array alone"
        )
    return known[0]


def _open(path: pathlib.Path, needs_splits: bool) -> Opened:
    found = _load(path)
    if "x_train" in found and "x_test" in found:
        parts = [_images(path, name, found[name]) for name in ("x_train", "x_test")]
        labels = [
            _labels(path, found.get(name), len(part))
            for name, part in zip(("y_train", "y_test"), parts, strict=True)
        ]
    else:
        if needs_splits:
            raise UserError(f"data.path: {path} has no splits; needed are {', '.join(_SPLITS)}")
        name = _name_of_images(path, found, "data.path")
        images = _images(path, name, found[name])
        of = _labels(path, found.get("labels"), len(images))
        indices = every_tenth(len(images))
        if not len(indices[1]):
            raise UserError(f"data.path: {path} has {len(images)} images; 10 or more are needed")
        parts = [images[part] for part in indices]
        labels = [None if of is None else of[part] for part in indices]
    train, test, classes, notes = number_labels(labels)
    return Opened(arrays_of(parts[0], train), arrays_of(parts[1], test), classes, notes)


def find(path: pathlib.Path, needs_splits: bool = False) -> Found | None:
    """An .npy of images, or an .npz of images (and labels) or of x_train, y_train, x_test, y_test.

    Images are uint8, (N, H, W), (N, H, W, 1) or (N, H, W, 3). In a file without splits every tenth
    image is a test image; with `needs_splits` such a file is refused.
    """
    if path.suffix not in (".npy", ".npz") or not path.is_file():
        return None
    return Found(f"the arrays of {path}", file_identity(path), lambda: _open(path, needs_splits))


@dataclasses.dataclass(frozen=True)
class Stack:
    """Examples of one shape and type, in an array or a file each, read when they are needed.

    Attributes:
      rows: returns the examples (n, H, W, C) at indices (n,) of the whole array.
      indices: those of this stack's examples.
      labels: (len(indices),), numbers or names of classes; None: there are none.
      shape: (H, W, C).
      dtype: uint8, uint16 or floats.
      name: the config's field and the path of the files, for messages.
      identity: paths, sizes and modification times of the files.
    """

    rows: Callable[[np.ndarray], np.ndarray]
    indices: np.ndarray
    labels: np.ndarray | None
    shape: tuple[int, int, int]
    dtype: np.dtype[Any]
    name: str
    identity: tuple[object, ...]

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, chosen: np.ndarray) -> np.ndarray:
        """The examples (n, H, W, C) at these indices of the stack."""
        return self.rows(self.indices[chosen])

    def extremes(self, progress: Progress) -> tuple[np.ndarray, np.ndarray]:
        """The lowest and the highest value of each channel, (C,) float64 each.

        Raises:
          UserError: a value is not finite.
        """
        low, high = np.full(self.shape[2], np.inf), np.full(self.shape[2], -np.inf)
        size = max(1, 2**23 // (int(np.prod(self.shape)) * self.dtype.itemsize))
        for start in range(0, len(self), size):
            part = self.read(np.arange(start, min(start + size, len(self))))
            finite = np.isfinite(part).all(axis=(1, 2, 3)) if self.dtype.kind == "f" else None
            if finite is not None and not finite.all():
                index = self.indices[start + int(np.argmin(finite))]
                raise UserError(
                    f"{self.name} has NaN or infinite values in example {index}; remove "
                    "or replace them"
                )
            low = np.minimum(low, part.min(axis=(0, 1, 2)))
            high = np.maximum(high, part.max(axis=(0, 1, 2)))
            progress.advance(len(part))
        return low, high


def _check_stack(where: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[int, int, int]:
    """The shape (H, W, C) of an example of shape (H, W) or (H, W, C)."""
    right = dtype.kind == "f" or dtype in (np.dtype(np.uint8), np.dtype(np.uint16))
    if not right or len(shape) not in (2, 3) or 0 in shape:
        raise UserError(
            f"{where} has examples of {dtype}, {shape}; uint8, uint16 or floats of (H, W) or "
            "(H, W, C) are needed"
        )
    height, width, channels = shape if len(shape) == 3 else (*shape, 1)
    return height, width, channels


def _stack(
    path: pathlib.Path, images: np.ndarray, labels: np.ndarray | None, option: str = "data.path"
) -> Stack:
    name = f"{option}: {path}"
    shape = _check_stack(name, images.shape[1:], images.dtype)

    def rows(indices: np.ndarray) -> np.ndarray:
        return np.asarray(images[indices]).reshape(len(indices), *shape)

    known, identity = _labels(path, labels, len(images)), file_identity(path)
    return Stack(rows, np.arange(len(images)), known, shape, images.dtype, name, identity)


def _stack_of_files(folder: pathlib.Path, files: Sequence[pathlib.Path]) -> Stack:
    """The stack of an example a file; subfolders are classes, whose names become the labels."""
    first = _load(files[0])["images"]
    shape = _check_stack(f"data.path: {files[0]}", first.shape, first.dtype)

    def rows(indices: np.ndarray) -> np.ndarray:
        examples = []
        for i in indices:
            example = _load(files[i]).get("images")
            if example is None or example.shape != first.shape or example.dtype != first.dtype:
                raise UserError(f"data.path: {files[i]} has another shape or type than {files[0]}")
            examples.append(np.asarray(example).reshape(shape))
        return np.stack(examples)

    parents = [file.relative_to(folder).parts[:-1] for file in files]
    are_classes = all(len(parent) == 1 for parent in parents)
    labels = np.array([parent[0] for parent in parents]) if are_classes else None
    status = [file.stat() for file in files]
    changes = sum(s.st_size for s in status), max(s.st_mtime_ns for s in status), len(files)
    identity = (str(folder.resolve()), *changes)
    name = f"data.path: {folder}"
    return Stack(rows, np.arange(len(files)), labels, shape, first.dtype, name, identity)


def _every_tenth(stack: Stack) -> list[Stack]:
    """The training and test examples of a stack without splits."""
    if len(stack) < 10:
        raise UserError(f"{stack.name} has {len(stack)} examples; 10 or more are needed")
    return [
        dataclasses.replace(
            stack, indices=part, labels=None if stack.labels is None else stack.labels[part]
        )
        for part in every_tenth(len(stack))
    ]


def _stacks_in_folder(path: pathlib.Path) -> list[Stack]:
    pair = path / "train.npy", path / "test.npy"
    if any(file.is_file() for file in pair):
        stacks = []
        for file in pair:
            if not file.is_file():
                raise UserError(f"data.path: {path} has no {file.name} beside the other split")
            of_labels = file.with_name(f"{file.stem}_labels.npy")
            labels = _load(of_labels)["images"] if of_labels.is_file() else None
            stacks.append(_stack(file, _load(file)["images"], labels))
        return stacks
    splits = [path / "train", path / "test"]
    if not any(split.is_dir() for split in splits):
        splits = [path]
    found = [(split, sorted(split.rglob("*.npy"))) for split in splits]
    for split, files in found:
        if not files:
            raise UserError(f"data.path: {split} has no .npy files")
    stacks = [_stack_of_files(split, files) for split, files in found]
    return stacks if len(stacks) == 2 else _every_tenth(stacks[0])


def _open_stacks(path: pathlib.Path) -> list[Stack]:
    if path.is_dir():
        return _stacks_in_folder(path)
    found = _load(path)
    if "x_train" in found and "x_test" in found:
        return [_stack(path, found[f"x_{s}"], found.get(f"y_{s}")) for s in ("train", "test")]
    name = _name_of_images(path, found, "data.path")
    return _every_tenth(_stack(path, found[name], found.get("labels")))


class Stacks(NamedTuple):
    """The splits of arrays; `classes` and `notes` are as in `Opened`."""

    train: Stack
    test: Stack
    classes: tuple[str, ...]
    notes: tuple[str, ...]


def open_stacks(path: pathlib.Path) -> Stacks:
    """The training and test examples of arrays, with their labels numbered.

    Args:
      path: an .npy of (N, H, W) or (N, H, W, C), memory-mapped; an .npz of the same as `images`
        or alone, with `labels` if there are any, or of x_train, y_train, x_test, y_test, which is
        read whole; a folder of train.npy and test.npy (and train_labels.npy, test_labels.npy); or
        a folder of .npy files of an example each, with subfolders as classes, and with or without
        splits train/ and test/. Without splits every tenth is a test example.

    Raises:
      UserError: there are no such arrays, or they can't be read.
    """
    if not path.exists() or (path.is_file() and path.suffix not in (".npy", ".npz")):
        raise UserError(f"data.path: {path} is no .npy or .npz file and no folder of .npy files")
    train, test = _open_stacks(path)
    for stack in (train, test):
        if not len(stack):
            raise UserError(f"{stack.name} has no examples")
    if (train.shape, train.dtype) != (test.shape, test.dtype):
        raise UserError(
            f"data.path: the training examples of {path} are {train.dtype} {train.shape}, the test "
            f"examples {test.dtype} {test.shape}"
        )
    labels = number_labels((train.labels, test.labels))
    return Stacks(
        dataclasses.replace(train, labels=labels.train),
        dataclasses.replace(test, labels=labels.test),
        labels.classes,
        labels.notes,
    )


def whole_stack(path: pathlib.Path, option: str) -> Stack:
    """All examples of an .npy or .npz file; `option` is the config's field of the path.

    Raises:
      UserError: there is no such file, or it can't be read.
    """
    if not path.is_file() or path.suffix not in (".npy", ".npz"):
        raise UserError(f"{option}: {path} is no .npy or .npz file")
    found = _load(path, option)
    return _stack(path, found[_name_of_images(path, found, option)], None, option)
