"""TFRecord files of ProGAN's and StyleGAN's tools and of TFDS, read without TensorFlow."""

import functools
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from configs.default import UserError
from readers.containers import damaged, file_identity
from readers.layout import Found, Item, Opened, Records


@functools.cache
def _example_class() -> Any:
    """The message `tf.train.Example`: a map from names to lists of bytes, floats or integers."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    field = descriptor_pb2.FieldDescriptorProto
    package = "soft_truncation.records"
    file = descriptor_pb2.FileDescriptorProto(
        name="soft_truncation_example.proto", package=package, syntax="proto3"
    )

    def message(name: str, fields: list[tuple[str, int, int, str]], repeated: bool = False) -> Any:
        added = file.message_type.add(name=name)
        for number, (field_name, type_, label, type_name) in enumerate(fields, start=1):
            made = added.field.add(name=field_name, number=number, type=type_, label=label)
            if type_name:
                made.type_name = f".{package}.{type_name}"
        return added

    one, many, nested = field.LABEL_OPTIONAL, field.LABEL_REPEATED, field.TYPE_MESSAGE
    message("BytesList", [("value", field.TYPE_BYTES, many, "")])
    message("FloatList", [("value", field.TYPE_FLOAT, many, "")])
    message("Int64List", [("value", field.TYPE_INT64, many, "")])
    lists = (("bytes_list", "BytesList"), ("float_list", "FloatList"), ("int64_list", "Int64List"))
    message("Feature", [(name, nested, one, kind) for name, kind in lists])
    features = message("Features", [("feature", nested, many, "Features.FeatureEntry")])
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, type=field.TYPE_STRING, label=one)
    entry.field.add(name="value", number=2, type=nested, label=one, type_name=f".{package}.Feature")
    message("Example", [("features", nested, one, "Features")])
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{package}.Example"))


def parse_example(record: bytes) -> Any:
    """Parse a serialised `tf.train.Example`; returns its features by name."""
    return _example_class().FromString(record).features.feature


@functools.cache
def _zeros_behind(level: int) -> np.ndarray:
    """(2, 65536): CRC-32C of each value of each half of a word that 4·2^level zeros follow."""
    if level:
        return _append_zeros(_zeros_behind(level - 1), level - 1)
    crc = np.arange(2**16, dtype=np.uint32) << np.array([[0], [16]], np.uint32)
    for _ in range(32):
        crc = np.where(crc & 1, crc >> 1 ^ np.uint32(0x82F63B78), crc >> 1)
    return crc


def _append_zeros(words: np.ndarray, level: int) -> np.ndarray:
    low, high = _zeros_behind(level)
    halves = np.ascontiguousarray(words, "<u4").view("<u2").reshape(*words.shape, 2)
    return np.take(low, halves[..., 0], mode="clip") ^ np.take(high, halves[..., 1], mode="clip")


def masked_crc32c(data: bytes) -> int:
    """The checksum of a record's `data`, of four bytes or more.

    CRC-32C is linear, and zeros in front do not change it: of words (a, b) it is that of a with
    zeros behind, plus that of b, so that halves of all pairs are joined at once.
    """
    start = bytes(255 - byte for byte in data[:4])
    words = np.frombuffer(bytes(-len(data) % 4) + start + data[4:], "<u4")
    level = 0
    while len(words) > 1:
        words = np.pad(words, (len(words) % 2, 0))
        words = _append_zeros(words[::2], level) ^ words[1::2]
        level += 1
    crc = ~int(_append_zeros(words, 0)[0]) % 2**32
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
        if length < 4 or masked_crc32c(record) != int.from_bytes(checksum, "little"):
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


def find(
    path: pathlib.Path, split: Callable[[int], tuple[np.ndarray, np.ndarray]], what: str
) -> Found | None:
    """A .tfrecords file of ProGAN's or StyleGAN's dataset_tool.py, with images of one size.

    `split` is the number of images → (training, test) indices, and `what` describes it.
    """
    if not path.is_file() or path.suffix != ".tfrecords":
        return None

    def opened() -> Opened:
        records = records_of(path, _pixels)
        try:
            height, width = np.shape(records.read(0)[0])[:2]
        except Exception as error:  # an error of protobuf, or of `_pixels`
            raise damaged(path, f"record 0: {error}") from error
        records = Records(len(records), records.read, records.name, (width, height))
        train, test = split(len(records))
        if not len(test):
            raise UserError(f"{path} has {len(records)} images, too few to hold some out")
        return Opened(records.subset(train), records.subset(test))

    return Found(f"{path}, {what}", (*file_identity(path), what), opened)
