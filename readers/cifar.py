"""Batches of CIFAR-10 and of ImageNet 32 (2017): rows of 3,072 bytes, channel by channel.

Pickled batches are read by an unpickler that accepts only NumPy arrays and plain containers.
"""

import pathlib
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np

from configs.default import UserError
from readers.containers import Container, Folder, damaged, member, open_container
from readers.layout import Arrays, Found, Opened, arrays_of, plain_classes

_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is not run")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def _read_pickle(file: BinaryIO, where: str) -> dict[str, Any]:
    """Read a pickled batch, with its keys as strings.

    Raises:
      UserError: the file is not a pickle, or has more than arrays and plain containers.
    """
    try:
        batch = _ArrayUnpickler(file, encoding="bytes").load()
        return {k.decode() if isinstance(k, bytes) else k: v for k, v in batch.items()}
    except UserError:
        raise
    except Exception as error:  # a damaged pickle can raise any kind of error
        raise UserError(f"{where} is no batch of images ({error}); bring the file again") from error


def _to_images(rows: Any, size: int, where: str) -> np.ndarray:
    """Rows (n, 3·size²) → (n, size, size, 3)."""
    shape = np.shape(rows)
    dtype = getattr(rows, "dtype", None)
    if dtype != np.uint8 or len(shape) != 2 or shape[1] != 3 * size * size:
        raise UserError(
            f"{where} has {dtype} of shape {shape}; rows of {3 * size * size} bytes are needed"
        )
    return np.ascontiguousarray(rows.reshape(-1, 3, size, size).transpose(0, 2, 3, 1))


def _labels(batch: dict[str, Any], count: int, first: int, where: str) -> np.ndarray:
    labels = batch.get("labels")
    if labels is None or len(labels) != count:
        raise UserError(f"{where} has {count} images and {len(labels or ())} labels")
    return np.asarray(labels, np.int64) - first


Reader = Callable[[BinaryIO, str], tuple[np.ndarray, np.ndarray]]


def _pickled(first_label: int) -> Reader:
    def read(file: BinaryIO, where: str) -> tuple[np.ndarray, np.ndarray]:
        batch = _read_pickle(file, where)
        images = _to_images(batch.get("data"), 32, where)
        return images, _labels(batch, len(images), first_label, where)

    return read


def _binary(file: BinaryIO, where: str) -> tuple[np.ndarray, np.ndarray]:
    raw = np.frombuffer(file.read(), np.uint8)
    if not len(raw) or len(raw) % 3073:
        raise UserError(f"{where} has {len(raw)} bytes, which are no whole records of 3,073")
    rows = raw.reshape(-1, 3073)
    return _to_images(rows[:, 1:], 32, where), rows[:, 0].astype(np.int64)


def _read(
    container: Container, batches: Sequence[str], read: Reader
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(images, labels) of each batch."""
    members = {member(container, batch): batch for batch in batches}
    found = {}
    # In the container's order, since a compressed archive is read from its start otherwise.
    for name in container.names():
        if name in members:
            try:
                with container.open(name) as file:
                    found[members[name]] = read(file, f"{container.path}/{name}")
            except (OSError, EOFError, ValueError) as error:
                raise damaged(container.path, error) from error
    return found


def _holder(path: pathlib.Path, first: str, folder: str, archive: str) -> Container | None:
    """The archive or folder that holds the batches; None if there is none."""
    if path.is_file():
        return open_container(path)
    for place in (path / folder, path):
        if (place / first).exists():
            return Folder(place)
    return open_container(path / archive) if (path / archive).exists() else None


def _has(container: Container, batch: str) -> bool:
    return any(name.split("/")[-1] == batch for name in container.names())


def find_cifar10(path: pathlib.Path) -> Found | None:
    """CIFAR-10's python or binary files: the archive, its folder, or the parent folder."""
    kinds: list[tuple[str, str, str, str, Reader]] = [
        ("python", "cifar-10-batches-py", "cifar-10-python.tar.gz", "", _pickled(0)),
        ("binary", "cifar-10-batches-bin", "cifar-10-binary.tar.gz", ".bin", _binary),
    ]
    for kind, folder, archive, suffix, read in kinds:
        first = f"data_batch_1{suffix}"
        container = _holder(path, first, folder, archive)
        if container is None or not _has(container, first):
            continue
        place = "files" if isinstance(container, Folder) else "archive"

        def opened(
            container: Container = container, suffix: str = suffix, read: Reader = read
        ) -> Opened:
            train = [f"data_batch_{i}{suffix}" for i in range(1, 6)]
            batches = _read(container, [*train, f"test_batch{suffix}"], read)
            images, labels = (
                np.concatenate(parts)
                for parts in zip(*(batches[batch] for batch in train), strict=True)
            )
            test = batches[f"test_batch{suffix}"]
            return Opened(arrays_of(images, labels), arrays_of(*test), plain_classes(10))

        what = f"the authors' {kind} {place} {container.path}"
        return Found(what, (kind, container.identity()), opened)
    return None


def find_imagenet32_2017(path: pathlib.Path) -> Found | None:
    """The pickled batches of ImageNet 32 (Chrabaszcz et al.), in the authors' zips or unpacked."""
    if not path.is_dir():
        return None
    holders = []
    for first, folder, archive in (
        ("train_data_batch_1", "Imagenet32_train", "Imagenet32_train.zip"),
        ("val_data", "Imagenet32_val", "Imagenet32_val.zip"),
    ):
        holders.append(_holder(path, first, folder, archive))
    train, test = holders
    if train is None and test is None:
        return None
    if train is None or test is None:
        missing = "Imagenet32_train.zip" if train is None else "Imagenet32_val.zip"
        raise UserError(
            f"data.path: {path} has no {missing}, and nothing that was unpacked from it"
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
