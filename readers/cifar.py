"""Batches of CIFAR-10 and of ImageNet 32 (2017): rows of 3,072 bytes, channel by channel.

Pickled batches are read by an unpickler that calls nothing; arrays are then made of their bytes.
"""

import functools
import io
import math
import pathlib
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np

from configs.errors import UserError
from data.labels import plain_classes
from readers.containers import Container, member, open_holder, reading
from readers.layout import Arrays, Found, Opened, arrays_of
from runtime.unpickling import Called, InertUnpickler, Named

_TYPES = ("u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f4", "f8")
_ARRAY = ("_reconstruct", "dtype", "encode")


class _ArrayUnpickler(InertUnpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in (*_ARRAY, "ndarray") or module.split(".")[0] not in ("numpy", "_codecs"):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is not run")
        return super().find_class(module, name)


def _function(value: Any) -> str:
    """The name of the function that `value` is the result of, if it is one that arrays need."""
    known = type(value) is Called and type(value.function) is Named
    return value.function.name if known and value.function.name in _ARRAY else ""


def _bytes(value: Any) -> Any:
    """Bytes, also as Python 3 writes them for Python 2: text, to be encoded."""
    if _function(value) == "encode" and [type(a) for a in value.arguments] == [str, str]:
        return value.arguments[0].encode("latin1")
    return value


def _array(value: Any) -> Any:
    """The array that a pickle describes, from its shape, type and bytes; others as they are."""
    if _function(value) != "_reconstruct":
        return value
    _, shape, dtype, is_fortran, data = value.state[0]
    data, kind = _bytes(data), _bytes(dtype.arguments[0]) if _function(dtype) == "dtype" else ""
    kind = kind.decode() if type(kind) is bytes else kind
    order = _bytes(dtype.state[0][1]) if kind in _TYPES else ""
    if kind not in _TYPES or type(data) is not bytes or type(shape) is not tuple:
        raise pickle.UnpicklingError("it has an array that is not of numbers")
    swapped = np.dtype(kind).newbyteorder(">" if order in (">", b">") else "<")
    plain = all(type(n) is int and n >= 0 for n in shape) and len(shape) <= 4
    if not plain or math.prod(shape) * swapped.itemsize != len(data):
        raise pickle.UnpicklingError(f"it has an array of shape {shape} in {len(data)} bytes")
    return np.frombuffer(data, swapped).reshape(shape, order="F" if is_fortran else "C")


def _read_pickle(file: BinaryIO) -> dict[str, Any]:
    """Read the arrays or lists `data` and `labels` of a pickled batch; any error if it is none."""
    batch = _ArrayUnpickler(io.BytesIO(file.read())).load()
    found = {key.decode() if type(key) is bytes else key: batch[key] for key in batch}
    return {name: _array(found.get(name)) for name in ("data", "labels")}


def _to_images(rows: Any, where: str) -> np.ndarray:
    """Rows (n, 3072) → (n, 32, 32, 3)."""
    is_array = isinstance(rows, np.ndarray)
    if not is_array or rows.dtype != np.uint8 or rows.shape[1:] != (3072,):
        has = f"{rows.dtype} of shape {rows.shape}" if is_array else "no array"
        raise UserError(f"{where} has {has}; rows of 3072 bytes are needed")
    return np.ascontiguousarray(rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


def _labels(batch: dict[str, Any], count: int, first: int, where: str) -> np.ndarray:
    given = batch["labels"]
    labels = np.array(given) if type(given) is list and set(map(type, given)) == {int} else given
    if not isinstance(labels, np.ndarray) or labels.dtype.kind not in "iu" or len(labels) != count:
        raise UserError(f"{where} has {count} images and no whole numbers as labels of each")
    return labels.astype(np.int64) - first


Reader = Callable[[BinaryIO, str], tuple[np.ndarray, np.ndarray]]


def _pickled(first_label: int) -> Reader:
    def read(file: BinaryIO, where: str) -> tuple[np.ndarray, np.ndarray]:
        batch = _read_pickle(file)
        images = _to_images(batch["data"], where)
        return images, _labels(batch, len(images), first_label, where)

    return read


def _binary(file: BinaryIO, where: str) -> tuple[np.ndarray, np.ndarray]:
    raw = np.frombuffer(file.read(), np.uint8)
    if not len(raw) or len(raw) % 3073:
        raise UserError(f"{where} has {len(raw)} bytes, which are no whole records of 3,073")
    rows = raw.reshape(-1, 3073)
    return _to_images(rows[:, 1:], where), rows[:, 0].astype(np.int64)


def _read(
    container: Container, batches: Sequence[str], read: Reader
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(images, labels) of each batch."""
    members = {member(container, batch): batch for batch in batches}
    found = {}
    # In the container's order, since a compressed archive is read from its start otherwise.
    for name in filter(members.__contains__, container.files):
        with reading(container.path / name), container.open(name) as file:
            found[members[name]] = read(file, f"{container.path}/{name}")
    return found


def find_cifar10(path: pathlib.Path) -> Found | None:
    """CIFAR-10's python or binary files: the archive, its folder, or the parent folder."""
    kinds: list[tuple[str, str, str, str, Reader]] = [
        ("python", "cifar-10-batches-py", "cifar-10-python.tar.gz", "", _pickled(0)),
        ("binary", "cifar-10-batches-bin", "cifar-10-binary.tar.gz", ".bin", _binary),
    ]
    for kind, folder, archive, suffix, read in kinds:
        container = open_holder(path, f"data_batch_1{suffix}", folder, archive)
        if container is None:
            continue
        what = f"the authors' {kind} {container.kind} {container.path}"
        opened = functools.partial(_open_cifar10, container, suffix, read)
        return Found(what, (kind, container.identity()), opened)
    return None


def _open_cifar10(container: Container, suffix: str, read: Reader) -> Opened:
    train = [f"data_batch_{i}{suffix}" for i in range(1, 6)]
    batches = _read(container, [*train, f"test_batch{suffix}"], read)
    images, labels = map(np.concatenate, zip(*(batches[name] for name in train), strict=True))
    test = arrays_of(*batches[f"test_batch{suffix}"])
    return Opened(arrays_of(images, labels), test, plain_classes(10))


def find_imagenet32_2017(path: pathlib.Path) -> Found | None:
    """The pickled batches of ImageNet 32 (Chrabaszcz et al.), in the authors' zips or unpacked."""
    if not path.is_dir():
        return None
    train = open_holder(path, "train_data_batch_1", "Imagenet32_train", "Imagenet32_train.zip")
    test = open_holder(path, "val_data", "Imagenet32_val", "Imagenet32_val.zip")
    if train is None and test is None:
        return None
    if train is None or test is None:
        missing = "Imagenet32_train.zip" if train is None else "Imagenet32_val.zip"
        raise UserError(
            f"data.path: {path} has no {missing} of the authors, nor what was unpacked from it"
        )

    def opened() -> Opened:
        batches = [f"train_data_batch_{i}" for i in range(1, 11)]
        for batch in batches:
            member(train, batch)

        def blocks() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for batch in batches:
                yield from _read(train, [batch], _pickled(1)).values()

        held_out = _read(test, ["val_data"], _pickled(1))["val_data"]
        return Opened(Arrays(blocks), arrays_of(*held_out), plain_classes(1000))

    what = f"the authors' pickled batches in {path}"
    return Found(what, (train.identity(), test.identity()), opened)
