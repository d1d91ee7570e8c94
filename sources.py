"""Where images come from: arrays, folders, TFDS, TFRecords, IDX files; each with random access."""

import concurrent.futures
import dataclasses
import gzip
import hashlib
import logging
import pathlib
import struct
import zlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from PIL import Image, ImageOps

import reporting
from configs.default import UserError

log = logging.getLogger("soft_truncation")

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

Examples = dict[str, np.ndarray]  # `image` (n, H, W, C) uint8 and `label` (n,)


class Source(Protocol):
    """Random access to examples."""

    def __len__(self) -> int: ...

    def fetch(self, indices: np.ndarray) -> Examples: ...

    def describe(self) -> bytes:
        """What tells these examples from others, short of reading them all from disk."""
        ...


@dataclasses.dataclass(frozen=True)
class ArraySource:
    """Images (N, H, W, C) uint8 and labels (N,) in memory."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.images)

    def fetch(self, indices: np.ndarray) -> Examples:
        return {"image": self.images[indices], "label": self.labels[indices]}

    def describe(self) -> bytes:
        return hashlib.sha256(np.ascontiguousarray(self.images).data).digest()


def _flatten(image: Image.Image) -> Image.Image:
    """As viewers show it: turned as its camera says, on white where transparent, of 8 bits."""
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):  # 16 bits a pixel, which PIL would clip at 255
        return Image.fromarray((np.asarray(image, np.uint32) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image


@dataclasses.dataclass(frozen=True)
class Fit:
    """How an image of any size becomes size × size: crop the centre, then resize.

    Attributes:
      size: of the result.
      channels: of the result, 1 or 3.
      crop: side of the centre crop; 0, and for smaller images: the largest square.
      resampling: PIL's filter.
    """

    size: int
    channels: int
    crop: int = 0
    resampling: Image.Resampling = Image.Resampling.BICUBIC

    def __call__(self, image: Image.Image) -> np.ndarray:
        """(size, size, channels) uint8."""
        image = _flatten(image).convert("L" if self.channels == 1 else "RGB")
        if 0 < self.crop <= min(image.size):
            left, top = (image.width - self.crop) // 2, (image.height - self.crop) // 2
            image = image.crop((left, top, left + self.crop, top + self.crop))
        if image.size != (self.size, self.size):
            image = ImageOps.fit(image, (self.size, self.size), self.resampling)
        return np.asarray(image, np.uint8).reshape(self.size, self.size, self.channels)


@dataclasses.dataclass(frozen=True)
class FolderSource:
    """Image files, each read when it is asked for."""

    files: Sequence[pathlib.Path]
    labels: np.ndarray
    fit: Callable[[Image.Image], np.ndarray]

    def __len__(self) -> int:
        return len(self.files)

    def _read(self, file: pathlib.Path) -> np.ndarray:
        try:
            with Image.open(file) as opened:
                return self.fit(opened)
        except Exception as error:  # a damaged file makes PIL raise anything at all
            raise UserError(f"{file} is not a readable image: {error}") from error

    def fetch(self, indices: np.ndarray) -> Examples:
        images = np.stack([self._read(self.files[i]) for i in indices])
        return {"image": images, "label": self.labels[indices]}

    def describe(self) -> bytes:
        sizes = [(file.name, file.stat().st_size) for file in self.files]
        return hashlib.sha256(repr(sizes).encode()).digest()


@dataclasses.dataclass(frozen=True)
class TFDSSource:
    """A TFDS data source (array_record files), read without TensorFlow's runtime."""

    source: Any
    fit: Fit | None = None  # None: the images are as they should be

    def __len__(self) -> int:
        return len(self.source)

    def _fitted(self, image: np.ndarray) -> np.ndarray:
        fit = self.fit
        if fit is None or image.shape == (fit.size, fit.size, fit.channels):
            return image
        return fit(Image.fromarray(image))

    def fetch(self, indices: np.ndarray) -> Examples:
        examples = [self.source[int(i)] for i in indices]
        images = [self._fitted(e["image"]) for e in examples]
        labels = np.array([e.get("label", 0) for e in examples])
        return {"image": np.stack(images), "label": labels}

    def describe(self) -> bytes:
        return b""  # published sets do not change


def load_tfds(name: str, split: str, data_dir: str, fit: Fit | None = None) -> TFDSSource:
    """A split of a TFDS data set, which is downloaded and prepared if it is not there.

    Raises:
      UserError: TFDS is not installed, or can't prepare the data here.
    """
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise UserError(
            f"{name} comes through TFDS, which can't be imported here ({error}); "
            "pip install -r requirements.txt"
        ) from error
    try:
        source = tfds.data_source(name, split=split, data_dir=data_dir or None)
    except Exception as error:  # TFDS and the network raise anything at all
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"TFDS could not prepare {name} ({reason[:300]}); run this once on a machine with "
            "internet, or set data.tfds_dir to a folder that has it; README.md says more"
        ) from error
    return TFDSSource(source, fit)


@dataclasses.dataclass(frozen=True)
class TFRecordSource:
    """Images of a TFRecord file as ProGAN's and StyleGAN's tools write it, without labels.

    A record is a `tf.train.Example` with `shape` (C, H, W) and `data`, raw bytes.
    """

    path: pathlib.Path
    offsets: np.ndarray  # of each record's payload
    lengths: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets)

    def _parse(self, record: bytes, number: int) -> np.ndarray:
        import tensorflow as tf

        try:
            features = tf.train.Example.FromString(record).features.feature
            shape = tuple(features["shape"].int64_list.value)
            data = features["data"].bytes_list.value[0]
            return np.frombuffer(data, np.uint8).reshape(shape).transpose(1, 2, 0)
        except Exception as error:  # protobuf's own, and whatever is missing
            raise UserError(f"{self.path}: record {number} is not an image: {error}") from error

    def fetch(self, indices: np.ndarray) -> Examples:
        images = []
        with self.path.open("rb") as file:
            for i in indices:
                file.seek(self.offsets[i])
                images.append(self._parse(file.read(self.lengths[i]), int(i)))
        return {"image": np.stack(images), "label": np.zeros(len(images), np.int64)}

    def describe(self) -> bytes:
        return str(self.path.stat().st_size).encode()


def load_tfrecords(path: pathlib.Path) -> TFRecordSource:
    """Index a TFRecord file: seeks from record to record, and reads none.

    Raises:
      UserError: there is no such file, or it is cut short.
    """
    if not path.is_file():
        raise UserError(
            f"data.tfrecords_path: there is no file {path}; README.md says how to make it, or set "
            "data.path to a folder of images"
        )
    offsets: list[int] = []
    lengths: list[int] = []
    position, size = 0, path.stat().st_size
    with path.open("rb") as file:
        while position < size:
            # Eight bytes of length, four of its checksum, the payload, four of its checksum.
            file.seek(position)
            header = file.read(8)
            length = int.from_bytes(header, "little")
            position += 12 + length + 4
            if len(header) < 8 or position > size:
                raise UserError(f"data.tfrecords_path: {path} ends within record {len(offsets)}")
            offsets.append(position - 4 - length)
            lengths.append(length)
    if not offsets:
        raise UserError(f"data.tfrecords_path: {path} is empty")
    return TFRecordSource(path, np.array(offsets), np.array(lengths))


def read_idx(path: pathlib.Path) -> np.ndarray:
    """The array of an IDX file of unsigned bytes (the format of MNIST), gzipped or not."""
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if path.suffix == ".gz" else raw
        dims = raw[3]
        shape = struct.unpack(f">{dims}I", raw[4 : 4 + 4 * dims])
        if raw[:3] != b"\0\0\x08":
            raise ValueError("it does not start as an IDX file of bytes does")
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * dims).reshape(shape)
    except (OSError, EOFError, ValueError, IndexError, struct.error, zlib.error) as error:
        raise UserError(f"{path} can't be read as an IDX file: {error}") from error


def readable(files: list[pathlib.Path], skip: bool) -> list[pathlib.Path]:
    """Those of the files that are whole images; all are read once, in threads, and summed up.

    Raises:
      UserError: some are not, and they are not to be skipped; it names the first of them.
    """
    progress = reporting.Progress("checking image files", len(files))

    def read(file: pathlib.Path) -> tuple[str, tuple[int, int], bool]:
        try:
            with Image.open(file) as image:
                image.load()
                return "", image.size, image.mode in ("1", "L", "LA") or image.mode.startswith("I")
        except Exception as error:  # a damaged file makes PIL raise anything at all
            return str(error) or type(error).__name__, (0, 0), False

    problems, sizes, num_grey = {}, [], 0
    with concurrent.futures.ThreadPoolExecutor() as threads:
        for file, (reason, size, grey) in zip(files, threads.map(read, files), strict=True):
            progress.advance(1)
            if reason:
                problems[file] = reason
            else:
                sizes.append(size)
                num_grey += grey
    if problems and not skip:
        file, reason = next(iter(problems.items()))
        raise UserError(
            f"{len(problems)} of {len(files)} files in data.path are no readable images, the first "
            f"of them {file} ({reason}); mend or remove them, or set data.skip_unreadable=True"
        )
    for file, reason in problems.items():
        log.warning("left out: %s is not a readable image (%s)", file, reason)
    if sizes:
        sizes.sort(key=min)
        log.info(
            "%d images of %d × %d to %d × %d pixels, %d of them grey",
            *(len(sizes), *sizes[0], *sizes[-1], num_grey),
        )
    return [file for file in files if file not in problems]


def image_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """All images below a folder, in the order of their names; hidden files are none."""
    files = (p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    return sorted(p for p in files if not p.name.startswith("."))


def load_samples(path: pathlib.Path, size: int, channels: int) -> Source:
    """Images that anyone sampled, as they are: a folder of them, or an .npz.

    Args:
      path: a folder of image files, or an .npz with an array `samples` or `arr_0` (or one array
        only) of (N, H, W, C) uint8 grey values.
      size, channels: that they must have.

    Raises:
      UserError: there are none, or not of this size.
    """

    mode = "L" if channels == 1 else "RGB"

    def as_it_is(image: Image.Image) -> np.ndarray:
        # Another mode would be converted, and then it is not these images that are scored.
        if image.mode != mode:
            raise ValueError(f"its mode is {image.mode}, and {mode} is needed")
        array = np.asarray(image)
        if array.shape[:2] != (size, size):
            raise ValueError(f"it is {image.width}×{image.height}, not {size}×{size} pixels")
        return array.reshape(size, size, channels)

    if path.is_dir():
        files = image_files(path)
        if len(files) < 4:
            raise UserError(f"eval.samples: {path} has {len(files)} images; 4 or more are needed")
        return FolderSource(files, np.zeros(len(files), int), as_it_is)
    try:
        loaded = np.load(path, allow_pickle=False)
        if not isinstance(loaded, np.lib.npyio.NpzFile):
            raise ValueError("it is not an .npz")
        with loaded as file:
            known = [name for name in ("samples", "arr_0") if name in file.files] or file.files
            if len(known) > 1 and known == file.files:
                raise ValueError(f"it has the arrays {', '.join(known)}, and none named samples")
            images = file[known[0]]
    except FileNotFoundError as error:
        raise UserError(f"eval.samples: there is no file or folder {path}") from error
    except Exception as error:  # a damaged archive raises anything at all
        # NumPy takes what is no archive for a pickle, and its advice is to trust it.
        reason = "it is no archive" if "pickle" in str(error) else error
        raise UserError(f"eval.samples: {path} can't be read: {reason}") from error
    expected = ("N ≥ 4", size, size, channels)
    if images.shape[1:] != expected[1:] or images.dtype != np.uint8 or len(images) < 4:
        raise UserError(
            f"eval.samples: {path} has {images.dtype} of shape {images.shape}; uint8 of "
            f"{expected} is needed"
        )
    return ArraySource(images, np.zeros(len(images), int))


def pad_images(images: np.ndarray, size: int, name: str) -> np.ndarray:
    """Pad (N, H, W, C) with black to size × size, as MNIST-like sets are used at 32."""
    height, width = images.shape[1:3]
    if size < height or size < width:
        raise UserError(f"data.image_size is {size}; {name}'s images are {height}×{width}")
    rows, columns = size - height, size - width
    padding = ((0, 0), (rows // 2, rows - rows // 2), (columns // 2, columns - columns // 2))
    return np.pad(images, (*padding, (0, 0)))
