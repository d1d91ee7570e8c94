"""TFRecord files of ProGAN's and StyleGAN's tools and of TFDS, read without TensorFlow."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import google_crc32c
import numpy as np

from configs.errors import UserError
from readers.containers import file_identity, reading
from readers.layout import Found, Item, Opened, Records
from readers.splits import divide


def parse_example(record: bytes) -> Any:
    """Parse a serialised `tf.train.Example`; returns its features by name."""
    from tensorflow_datasets.proto import tf_example_generated_pb2  # it imports no TensorFlow

    return tf_example_generated_pb2.Example.FromString(record).features.feature


def masked_crc32c(data: bytes) -> int:
    """The checksum of a record's data in TFRecord's form: CRC-32C, rotated and shifted."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32


def index(path: pathlib.Path) -> np.ndarray:
    """Read the offset and length of each record, (N, 2), without reading the records.

    Raises:
      UserError: the file is truncated or empty.
    """
    places: list[tuple[int, int]] = []
    position, size = 0, path.stat().st_size
    with path.open("rb") as file:
        while position < size:
            # Eight bytes of length, four of its checksum, the payload, four of its checksum.
            file.seek(position)
            header = file.read(8)
            length = int.from_bytes(header, "little")
            position += 12 + length + 4
            if len(header) < 8 or position > size:
                raise UserError(f"{path} ends within record {len(places)}; bring the file again")
            places.append((position - 4 - length, length))
    if not places:
        raise UserError(f"{path} is empty")
    return np.array(places)


def records_of(path: pathlib.Path, parse: Callable[[Any], Item]) -> Records:
    """The records of a file; `parse` makes an item of features, and may raise any kind of error."""
    places = index(path)

    def read(i: int) -> Item:
        offset, length = places[i]
        with path.open("rb") as file:
            file.seek(offset)
            record, checksum = file.read(length), file.read(4)
        if masked_crc32c(record) != int.from_bytes(checksum, "little"):
            raise ValueError("its checksum is wrong")
        return parse(parse_example(record))

    return Records(len(places), read, lambda i: f"{path}, record {i}")


def _pixels(features: Any) -> Item:
    """The item of features `shape` (C, H, W) and `data`, raw bytes."""
    shape = tuple(features["shape"].int64_list.value)
    data = features["data"].bytes_list.value[0]
    if len(shape) != 3:
        raise ValueError(f"its shape is {shape}")
    return np.frombuffer(data, np.uint8).reshape(shape).transpose(1, 2, 0), 0


def find(path: pathlib.Path, held_out: int, what: str) -> Found | None:
    """A .tfrecords file of ProGAN's or StyleGAN's dataset_tool.py, with images of one size.

    The last of `held_out` equal parts is for testing; `what` describes it.
    """
    if not path.is_file() or path.suffix != ".tfrecords":
        return None

    def opened() -> Opened:
        records = records_of(path, _pixels)
        with reading(path):
            height, width = np.shape(records.read(0)[0])[:2]
        records = dataclasses.replace(records, size=(width, height))
        if len(records) < held_out:
            raise UserError(f"{path} has {len(records)} images, too few to hold some out")
        return Opened(*divide([records], [None], held_out=held_out))

    return Found(f"{path}, {what}", (*file_identity(path), what), opened)
