"""STL-10's binary files: 96×96 images, each channel column by column."""

import pathlib
from collections.abc import Iterator

import numpy as np

from readers.containers import Container, damaged, member, open_holder, reading
from readers.layout import Arrays, Found, Opened

_IMAGE = 3 * 96 * 96
_BLOCK = 1000  # images read at a time


def _blocks(container: Container, file: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    with container.open(member(container, file)) as opened:
        while True:
            with reading(container.path):
                raw = opened.read(_BLOCK * _IMAGE)
            if not raw:
                return
            if len(raw) % _IMAGE:
                raise damaged(container.path, f"{file} ends within an image")
            images = np.frombuffer(raw, np.uint8).reshape(-1, 3, 96, 96).transpose(0, 3, 2, 1)
            yield images, np.zeros(len(images), np.int64)


def find(path: pathlib.Path) -> Found | None:
    """The authors' archive or its folder; the labelled and unlabelled images are for training.

    Labels are not read, since most training images have none.
    """
    container = open_holder(path, "train_X.bin", "stl10_binary", "stl10_binary.tar.gz")
    if container is None:
        return None

    def train() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        yield from _blocks(container, "train_X.bin")
        yield from _blocks(container, "unlabeled_X.bin")

    def opened() -> Opened:
        for file in ("train_X.bin", "unlabeled_X.bin", "test_X.bin"):
            member(container, file)
        return Opened(Arrays(train), Arrays(lambda: _blocks(container, "test_X.bin")))

    what = f"the authors' binary {container.kind} {container.path}"
    return Found(what, (container.identity(),), opened)
