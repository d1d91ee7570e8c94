"""Arrays in .npy and .npz files: uint8 images, and stacks of any size, channels and units."""

import dataclasses
import hashlib
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from configs.errors import UserError
from data.labels import folder_labels
from readers import layout
from readers.containers import Folder, file_identity
from readers.splits import TEST_NAMES, TRAIN_NAMES, choose_splits, divide
from runtime.progress import Progress

_SPLITS = ("x_train", "y_train", "x_test", "y_test")  # as in Keras's mnist.npz
_IN_MEMORY = 2**30  # bytes of a block of images


def load(path: pathlib.Path, option: str = "data.path") -> dict[str, np.ndarray]:
    """The arrays of an .npz file by name, or the memory-mapped array of an .npy as `images`.

    Raises:
      UserError: it can't be read; `option` is the config's field of the path.
    """
    try:
        loaded = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return {"images": loaded}
        with loaded:
            arrays = {name: loaded[name] for name in loaded.files}
        if not all(isinstance(array, np.ndarray) for array in arrays.values()):
            raise ValueError("a member is no array")
        return arrays
    except FileNotFoundError as error:
        raise UserError(f"{option}: there is no file or folder {path}") from error
    except Exception as error:  # a damaged archive can raise any kind of error
        reason = "it has objects" if "bject" in str(error) else str(error)
        # NumPy takes any other file for a pickle, and advises to allow pickles.
        reason = "it is no file of arrays" if "pickle" in reason else reason
        raise UserError(f"{option}: {path} can't be read: {reason}") from error


def _labels(path: pathlib.Path, labels: np.ndarray | None, count: int) -> np.ndarray | None:
    """Check the labels (N,) or (N, 1) of `count` images, and return them as (N,)."""
    if labels is None:
        return None
    flat = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if flat.dtype.kind not in "iu" or flat.shape != (count,) or (count and flat.min() < 0):
        raise UserError(
            f"data.path: {path} has {count} images and labels of {labels.dtype}, {labels.shape}; "
            "whole numbers from 0 on, one for each image, are needed"
        )
    return flat


def images_and_labels(
    path: pathlib.Path, found: dict[str, np.ndarray], option: str
) -> tuple[np.ndarray, np.ndarray | None]:
    """The array of images among those of a file, and that of labels if there is one.

    They are `images`, `samples` or `arr_0`, and `labels`, or `arr_1` beside arr_0.

    Raises:
      UserError: it is not known which array is of images.
    """
    others = [name for name in found if name != "labels"]
    known = [name for name in others if name in ("images", "samples", "arr_0")] or others
    if len(known) != 1:
        raise UserError(
            f"{option}: {path} has the arrays {', '.join(found)}; needed are images (and labels), "
            f"or {', '.join(_SPLITS)}, or one array alone"
        )
    return found[known[0]], found.get("labels", found.get("arr_1") if known == ["arr_0"] else None)


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
      identity: a value that changes when the files change.
      notes: sentences for the log and the report.
    """

    rows: Callable[[np.ndarray], np.ndarray]
    indices: np.ndarray
    labels: np.ndarray | None
    shape: tuple[int, int, int]
    dtype: np.dtype[Any]
    name: str
    identity: tuple[object, ...]
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, chosen: np.ndarray) -> np.ndarray:
        """The examples (n, H, W, C) at these indices of the stack."""
        return self.rows(self.indices[chosen])

    def subset(self, indices: np.ndarray, labels: np.ndarray | None = None) -> "Stack":
        """The examples at these indices of the stack, with these labels."""
        return dataclasses.replace(self, indices=self.indices[indices], labels=labels)

    def channels_last(self) -> "Stack":
        """The same examples, if their first axis is the channels'."""
        channels, height, width = self.shape

        def rows(indices: np.ndarray) -> np.ndarray:
            return np.moveaxis(self.rows(indices), 1, 3)

        return dataclasses.replace(self, rows=rows, shape=(height, width, channels))

    def blocks(self, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(their indices, the examples), in order, `size` bytes at a time or a little less."""
        count = max(1, size // (int(np.prod(self.shape)) * self.dtype.itemsize))
        for start in range(0, len(self), count):
            chosen = np.arange(start, min(start + count, len(self)))
            yield chosen, self.read(chosen)

    def extremes(self, progress: Progress) -> tuple[np.ndarray, np.ndarray]:
        """The lowest and the highest value of each channel, (C,) float64 each.

        Raises:
          UserError: a value is not finite.
        """
        low, high = np.full(self.shape[2], np.inf), np.full(self.shape[2], -np.inf)
        for chosen, part in self.blocks(2**23):
            odd = chosen[~np.isfinite(part).all(axis=(1, 2, 3))]
            if len(odd):
                raise UserError(
                    f"{self.name} has NaN or infinite values in example {self.indices[odd[0]]}; "
                    "remove or replace them"
                )
            low = np.minimum(low, part.min(axis=(0, 1, 2)))
            high = np.maximum(high, part.max(axis=(0, 1, 2)))
            progress.advance(len(part))
        return low, high


def _check_stack(where: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[int, int, int]:
    """The shape (H, W, C) of an example of shape (H, W) or (H, W, C)."""
    right = dtype.kind == "f" or (dtype.kind == "u" and dtype.itemsize <= 2)
    if not right or len(shape) not in (2, 3) or 0 in shape:
        raise UserError(
            f"{where} has examples of {dtype}, {shape}; uint8, uint16 or floats of (H, W) or "
            "(H, W, C) are needed"
        )
    if len(shape) == 2 and shape[1] in (3, 4) and shape[0] > 4:
        raise UserError(
            f"{where} has examples of {shape}: if it is one picture, bring several, as (N, H, W, "
            f"{shape[1]}); if they are so narrow, bring them as (N, {shape[0]}, {shape[1]}, 1)"
        )
    height, width, channels = shape if len(shape) == 3 else (*shape, 1)
    return height, width, channels


def _stack(
    path: pathlib.Path, images: np.ndarray, labels: np.ndarray | None, option: str = "data.path"
) -> Stack:
    name = f"{option}: {path}"
    shape = _check_stack(name, images.shape[1:], images.dtype)
    native = images.dtype.newbyteorder("=")

    def rows(indices: np.ndarray) -> np.ndarray:
        return np.asarray(images[indices], native).reshape(len(indices), *shape)

    known, identity = _labels(path, labels, len(images)), file_identity(path)
    return Stack(rows, np.arange(len(images)), known, shape, native, name, identity)


def _stack_of_files(folder: Folder, prefix: str, names: Sequence[str]) -> Stack:
    """The stack of an example a file; subfolders are classes, whose names become the labels."""
    path = folder.path / prefix
    names = [name for name in names if name.startswith(prefix)]
    if not names:
        raise UserError(f"data.path: {path} has no .npy files")
    first = load(folder.path / names[0])["images"]
    shape = _check_stack(f"data.path: {folder.path / names[0]}", first.shape, first.dtype)
    native = first.dtype.newbyteorder("=")

    def rows(indices: np.ndarray) -> np.ndarray:
        examples = []
        for i in indices:
            file = folder.path / names[i]
            example = load(file).get("images")
            if example is None or example.shape != first.shape or example.dtype != first.dtype:
                raise UserError(
                    f"data.path: {file} has another shape or type than {folder.path / names[0]}"
                )
            examples.append(np.asarray(example, native).reshape(shape))
        return np.stack(examples)

    digest = hashlib.sha256()
    for name in names:
        size = folder.files[name][0]
        with folder.open(name) as file:
            for place in (0, size // 2, max(0, size - 1024)):
                file.seek(place)
                digest.update(file.read(1024))
    folders, note = folder_labels([name.removeprefix(prefix) for name in names], True)
    labels, notes = None if folders is None else np.array(folders), (note,) if note else ()
    identity, where = (*folder.identity(), digest.hexdigest()), f"data.path: {path}"
    return Stack(rows, np.arange(len(names)), labels, shape, native, where, identity, notes)


def _stacks_in_folder(path: pathlib.Path) -> list[Stack]:
    folder = Folder(path)
    names = [name for name in folder.names() if name.lower().endswith(".npy")]
    names.sort(key=lambda name: name.split("/"))
    tops = {name[:-4].lower(): path / name for name in names if "/" not in name}
    pair = [next((n for n in known if n in tops), "") for known in (TRAIN_NAMES, TEST_NAMES)]
    if any(pair):
        if not all(pair):
            raise UserError(f"data.path: {path} has {''.join(pair)}.npy and no other split")
        files = [(tops[name], tops.get(f"{name}_labels")) for name in pair]
        return [
            _stack(file, load(file)["images"], load(of)["images"] if of else None)
            for file, of in files
        ]
    chosen = choose_splits(sorted({n.split("/")[0] for n in names if "/" in n}), str(path))
    prefixes = [f"{name}/" for name in chosen] if chosen else [""]
    stacks = [_stack_of_files(folder, prefix, names) for prefix in prefixes]
    notes = stacks[0].notes + folder.passed_over(set(names).__contains__)
    stacks[0] = dataclasses.replace(stacks[0], notes=notes)
    return stacks


def _open_stacks(path: pathlib.Path, needs_splits: bool) -> list[Stack]:
    if path.is_dir():
        return _stacks_in_folder(path)
    found = load(path)
    if "x_train" in found and "x_test" in found:
        return [_stack(path, found[f"x_{s}"], found.get(f"y_{s}")) for s in ("train", "test")]
    if needs_splits:
        raise UserError(f"data.path: {path} has no splits; needed are {', '.join(_SPLITS)}")
    return [_stack(path, *images_and_labels(path, found, "data.path"))]


def open_stacks(path: pathlib.Path, needs_splits: bool = False) -> layout.Splits[Stack]:
    """The training and test examples of arrays, with their labels numbered.

    They are an .npy of (N, H, W) or (N, H, W, C), memory-mapped; an .npz of the same as `images` or
    alone, with `labels` if there are any, or of x_train, y_train, x_test, y_test, which is read
    whole; a folder of train.npy and test.npy (and train_labels.npy, test_labels.npy); or a folder
    of .npy files of an example each, with subfolders as classes, and with or without splits train/
    and test/. Without splits every tenth is a test example; with `needs_splits` that is refused.

    Raises:
      UserError: there are no such arrays, or they can't be read.
    """
    if not path.exists() or (path.is_file() and path.suffix.lower() not in (".npy", ".npz")):
        raise UserError(f"data.path: {path} is no .npy or .npz file and no folder of .npy files")
    stacks = _open_stacks(path, needs_splits)
    least = 10 if len(stacks) == 1 else 1
    for stack in stacks:
        if len(stack) < least:
            raise UserError(f"{stack.name} has {len(stack)} examples; {least} or more are needed")
    train, test = stacks[0], stacks[-1]
    if (train.shape, train.dtype) != (test.shape, test.dtype):
        raise UserError(
            f"data.path: the training examples of {path} are {train.dtype} {train.shape}, the test "
            f"examples {test.dtype} {test.shape}"
        )
    divided = divide(stacks, [stack.labels for stack in stacks])
    notes = dict.fromkeys((*train.notes, *test.notes, *divided.notes))
    return divided._replace(notes=tuple(notes))


def _as_images(stack: Stack) -> layout.Arrays:
    """A stack's images (N, H, W, 1 or 3) uint8 in blocks, which are not kept."""
    if stack.dtype != np.uint8 or stack.shape[2] not in (1, 3):
        raise UserError(
            f"{stack.name} has images of {stack.dtype}, {stack.shape}; uint8 of (N, H, W), "
            "(N, H, W, 1) or (N, H, W, 3) is needed, and configs/vp/array_st.py reads others"
        )

    labels = np.zeros(len(stack), np.int64) if stack.labels is None else stack.labels

    def blocks() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        return ((images, labels[chosen]) for chosen, images in stack.blocks(_IN_MEMORY))

    return layout.Arrays(blocks, is_single=len(stack) * int(np.prod(stack.shape)) <= _IN_MEMORY)


def find(path: pathlib.Path, needs_splits: bool = False) -> layout.Found | None:
    """An .npy of images, or an .npz of images (and labels) or of x_train, y_train, x_test, y_test.

    Images are uint8, (N, H, W), (N, H, W, 1) or (N, H, W, 3). In a file without splits every tenth
    image is a test image; with `needs_splits` such a file is refused.
    """
    if path.suffix.lower() not in (".npy", ".npz") or not path.is_file():
        return None

    def opened() -> layout.Opened:
        train, test, classes, notes = open_stacks(path, needs_splits)
        return layout.Opened(_as_images(train), _as_images(test), classes, notes)

    return layout.Found(f"the arrays of {path}", file_identity(path), opened)


def whole_stack(path: pathlib.Path, option: str) -> Stack:
    """All examples of an .npy or .npz file; `option` is the config's field of the path.

    Raises:
      UserError: there is no such file, or it can't be read.
    """
    if not path.is_file() or path.suffix.lower() not in (".npy", ".npz"):
        raise UserError(f"{option}: {path} is no .npy or .npz file")
    return _stack(path, *images_and_labels(path, load(path, option), option), option)
