"""Tiny data sets in their authors' layouts: `python -m tests.make_datasets DIR [--only NAME ...]`.

Each function writes one layout below an empty folder and returns a `Made`, which says what a reader
has to find there. Nothing here imports the project: the files follow the formats' descriptions, so
that they test the project's readers independently.

The splits differ in brightness (`LEVELS`), so that a mixed-up split shows. In images that are
stored without loss, the three channels have offsets of their own and rows and columns have
different gradients, so that swapped channels or transposed images show as well.
"""

import argparse
import dataclasses
import functools
import gzip
import hashlib
import io
import json
import pathlib
import pickle
import struct
import tarfile
import typing
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence

import lmdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import scipy.io
from PIL import Image

LEVELS = {"train": 60, "test": 180, "validation": 120, "unused": 120}
NUM_TRAIN, NUM_TEST = 40, 12
CIFAR10_CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)


@dataclasses.dataclass(frozen=True)
class Made:
    """One data set written in one layout.

    Attributes:
      dataset: the value of `config.data.dataset`.
      path: what a user gives as `data.path`.
      counts: the number of images in "train" and "test", the splits that training and evaluation
        use, and in "validation" or "unused", whose images must be in neither.
      means: the mean grey value (0 to 255) of each image of each split, before any lossy coding.
      labels: the labels (0, 1, …) of "train" and "test" in the data set's order; None if the layout
        has none.
      options: further config overrides that the user gives, by field.
      images: the (N, H, W, C) uint8 images of "train" and "test" in the data set's order, in the
        size in which they are stored; None if the coding is lossy or the order is not defined.
    """

    dataset: str
    path: pathlib.Path
    counts: dict[str, int]
    means: dict[str, list[float]]
    labels: dict[str, list[int]] | None
    options: dict[str, object]
    images: dict[str, np.ndarray] | None = None

    @property
    def brightness(self):
        """The mean grey value of each split."""
        return {split: float(np.mean(means)) for split, means in self.means.items()}


def made(dataset, path, images, labels=None, options=None, exact=True):
    """What was written, as a `Made`.

    Args:
      dataset: the value of `config.data.dataset`.
      path: what a user gives as `data.path`.
      images: the images of each split: arrays (N, H, W, C), or lists of arrays (H, W, C).
      labels: of "train" and "test".
      options: further config overrides.
      exact: whether a reader gets exactly these images, and in this order.
    """
    return Made(
        dataset,
        path,
        counts={split: len(several) for split, several in images.items()},
        means={split: [image.mean() for image in several] for split, several in images.items()},
        labels=labels and {split: [int(n) for n in several] for split, several in labels.items()},
        options=options or {},
        images={split: images[split] for split in ("train", "test")} if exact else None,
    )


LAYOUTS: dict[str, Callable[[pathlib.Path], Made]] = {}
BROKEN: dict[str, Callable[[pathlib.Path], Made]] = {}  # to be refused


def layout(name, /, makers=LAYOUTS, **options):
    """Registers a maker under a name, with these of its arguments."""

    def register(make):
        makers[name] = functools.partial(make, **options)
        return make

    return register


broken = functools.partial(layout, makers=BROKEN)


# Images and labels.


def noisy_images(split, count, height, width=None, channels=3):
    """(count, height, width, channels) uint8 noise, at most 30 from the split's level."""
    width = width or height
    rng = np.random.default_rng([zlib.crc32(split.encode()), count, height, width, channels])
    rows = np.linspace(-9, 9, height)[:, None, None]
    columns = np.linspace(-4, 4, width)[None, :, None]
    offsets = np.array([10, 0, -10] if channels == 3 else [0])
    noise = rng.integers(-6, 7, (count, height, width, channels))
    return (np.round(LEVELS[split] + rows + columns + offsets).astype(int) + noise).astype(np.uint8)


def smooth_images(split, sizes):
    """One uint8 image (H, W, 3) for each (H, W) of `sizes`; lossy coding leaves its brightness."""
    rng = np.random.default_rng([zlib.crc32(split.encode()), len(sizes), 1])
    images = []
    for height, width in sizes:
        constant, rise, fall = rng.uniform(-6, 6), rng.uniform(2, 8), rng.uniform(2, 8)
        rows = np.linspace(-rise, rise, height)[:, None]
        columns = np.linspace(fall, -fall, width)[None, :]
        grey = np.round(LEVELS[split] + constant + rows + columns).astype(np.uint8)
        images.append(np.repeat(grey[..., None], 3, axis=-1))
    return images


def splits(height, width=None, channels=3, num_train=NUM_TRAIN, num_test=NUM_TEST):
    """Noisy images for "train" and "test"."""
    return {
        "train": noisy_images("train", num_train, height, width, channels),
        "test": noisy_images("test", num_test, height, width, channels),
    }


def random_labels(images, num_classes):
    """Labels 0 … num_classes - 1 for each split, in random order; every class occurs if it can."""
    return {
        split: np.random.default_rng(len(several)).permutation(len(several)) % num_classes
        for split, several in images.items()
    }


def every_tenth_is_test(count):
    """Indices into a data set without splits, by split: 9, 19, … are "test"."""
    indices = np.arange(count)
    return {"train": indices[indices % 10 != 9], "test": indices[indices % 10 == 9]}


def without_splits(count, size, channels=3):
    """All images of a data set without splits (in its order), and the same by split."""
    indices = every_tenth_is_test(count)
    together = np.empty((count, size, size, channels), np.uint8)
    for split, where in indices.items():
        together[where] = noisy_images(split, len(where), size, channels=channels)
    return together, {split: together[where] for split, where in indices.items()}


def encoded(image, kind="PNG", **options):
    """The bytes of an image file."""
    file = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, kind, **options)
    return file.getvalue()


# Files, folders and archives: `files` are contents by path.


def write_folder(root, files):
    """Write `files` below the folder `root`."""
    root.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def _folders(files):
    """The folders that hold `files`, outer ones first."""
    parents = {parent for name in files for parent in pathlib.PurePosixPath(name).parents}
    return sorted(str(parent) for parent in parents if parent != pathlib.PurePosixPath("."))


def write_tar(path, files):
    """Write a tar, compressed if the name ends in .gz, with entries for folders as tar makes."""
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
        for name in _folders(files):
            entry = tarfile.TarInfo(name)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(entry)
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def write_zip(path, files, compression=zipfile.ZIP_DEFLATED, with_folders=True):
    """Write a zip, with entries for folders as the program zip makes."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name in _folders(files) if with_folders else ():
            archive.writestr(f"{name}/", b"")
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def shuffled(files):
    """The same files in another order."""
    names = list(files)
    return {names[i]: files[names[i]] for i in np.random.default_rng(0).permutation(len(names))}


# Pickles as older Pythons with their NumPy wrote them.


@dataclasses.dataclass(frozen=True)
class Global:
    """A function or class that a pickle names, as "module name"."""

    name: str

    def __call__(self):
        raise AssertionError("only its name is written")


@dataclasses.dataclass(frozen=True)
class Call:
    """An object that unpickling makes by a call: `function(*arguments)`, then its state."""

    function: str  # "module name"
    arguments: tuple
    state: tuple | None = None


class OldPickler(pickle._Pickler):
    """Python's own pickler in Python, but for strings, arrays and what is named only."""

    dispatch: typing.ClassVar = dict(pickle._Pickler.dispatch)

    def __init__(self, file, python, protocol):
        super().__init__(file, protocol)
        self.python = python

    def save_string(self, text):
        if self.python == 2:
            self.save_packed(text.encode(), text)
        else:
            self.save_str(text)

    def save_raw(self, data):
        if self.python == 2:
            self.save_packed(data, data)
        elif self.proto == 2:  # which has no bytes
            self.save(Call("_codecs encode", (data.decode("latin1"), "latin1")))
        else:
            self.save_bytes(data)

    def save_packed(self, data, value):
        """A string of Python 2, which is bytes."""
        length = struct.pack("<B" if len(data) < 256 else "<I", len(data))
        self.write((b"U" if len(data) < 256 else b"T") + length + data)
        self.memoize(value)

    def save_named(self, value):
        module, name = value.name.split()
        self.write(f"c{module}\n{name}\n".encode())
        self.memoize(value)

    def save_call(self, call):
        self.save_reduce(Global(call.function), call.arguments, call.state, obj=call)

    def save_array(self, array):
        kind, order = array.dtype.str[1:], array.dtype.str[0]
        dtype = Call("numpy dtype", (kind, 0, 1), (3, order, None, None, None, -1, -1, 0))
        made, state = (Global("numpy ndarray"), (0,), b"b"), array.tobytes()
        state = (1, array.shape, dtype, False, state)
        self.save(Call("numpy.core.multiarray _reconstruct", made, state))


OldPickler.save_str = pickle._Pickler.dispatch[str]
OldPickler.save_bytes = pickle._Pickler.dispatch[bytes]
OldPickler.dispatch |= {
    str: OldPickler.save_string,
    bytes: OldPickler.save_raw,
    Global: OldPickler.save_named,
    Call: OldPickler.save_call,
    np.ndarray: OldPickler.save_array,
}


def pickled(value, python=2, protocol=2):
    """The pickle of `value` as Python 2 or 3 wrote it."""
    file = io.BytesIO()
    OldPickler(file, python, protocol).dump(value)
    return file.getvalue()


# CIFAR-10.


def channels_first(images):
    """(N, H, W, C) as rows (N, C · H · W): red row by row, then green, then blue."""
    return images.transpose(0, 3, 1, 2).reshape(len(images), -1)


def cifar10_splits():
    """Images and labels of the splits."""
    images = splits(32)
    return images, random_labels(images, 10)


def cifar10_batches():
    """(name, images, labels) of the five training batches and the test batch."""
    images, labels = cifar10_splits()
    parts = zip(np.split(images["train"], 5), np.split(labels["train"], 5), strict=True)
    batches = [(f"data_batch_{i}", *part) for i, part in enumerate(parts, 1)]
    return [*batches, ("test_batch", images["test"], labels["test"])]


def cifar10_batch(name, images, labels):
    """The dict that is pickled."""
    return {
        "batch_label": f"{name} of 6",
        "labels": [int(label) for label in labels],
        "data": channels_first(images),
        "filenames": [f"{name}_s_{i:06d}.png" for i in range(len(images))],
    }


def cifar10_python_files():
    """The files of cifar-10-python.tar.gz."""
    meta = {"num_cases_per_batch": 8, "label_names": list(CIFAR10_CLASSES), "num_vis": 3072}
    files = {"batches.meta": pickled(meta), "readme.html": b"<html></html>\n"}
    for name, images, labels in cifar10_batches():
        files[name] = pickled(cifar10_batch(name, images, labels))
    return {f"cifar-10-batches-py/{name}": content for name, content in files.items()}


def cifar10_binary_files():
    """The files of cifar-10-binary.tar.gz."""
    names = "\n".join(CIFAR10_CLASSES) + "\n\n"
    files = {"batches.meta.txt": names.encode(), "readme.html": b"<html></html>\n"}
    for name, images, labels in cifar10_batches():
        records = np.concatenate([labels[:, None], channels_first(images)], axis=1)
        files[f"{name}.bin"] = records.astype(np.uint8).tobytes()
    return {f"cifar-10-batches-bin/{name}": content for name, content in files.items()}


@layout("cifar10_python_tar", kind="python", path="cifar-10-python.tar.gz")
@layout("cifar10_python_tar_in_folder", kind="python", path="tar_in_folder")
@layout("cifar10_python_folder", kind="python", path=".")
@layout("cifar10_python_batches", kind="python", path="cifar-10-batches-py")
@layout("cifar10_binary_tar", kind="binary", path="cifar-10-binary.tar.gz")
@layout("cifar10_binary_folder", kind="binary", path=".")
def make_cifar10(root, kind, path):
    """CIFAR-10: `kind` is python or binary, `path` what the user gives, below `root`."""
    files = {"python": cifar10_python_files, "binary": cifar10_binary_files}[kind]()
    if "tar" in path:
        write_tar(root / f"cifar-10-{kind}.tar.gz", files)
    else:
        write_folder(root, files)
    images, labels = cifar10_splits()
    return made("CIFAR10", root / path.removesuffix("tar_in_folder"), images, labels)


# SVHN and STL-10.


@layout("svhn_mat")
def make_svhn(root):
    """SVHN's MATLAB files; the extra images are not used."""
    images = {**splits(32), "unused": noisy_images("unused", 8, 32)}
    labels = random_labels(images, 10)
    for split, several in images.items():
        digits = np.where(labels[split] == 0, 10, labels[split]).astype(np.uint8)
        name = "extra" if split == "unused" else split
        content = {"X": several.transpose(1, 2, 3, 0), "y": digits[:, None]}
        scipy.io.savemat(root / f"{name}_32x32.mat", content, do_compression=True)
    return made("SVHN", root, images, {split: labels[split] for split in ("train", "test")})


@layout("stl10_tar", tar=True)
@layout("stl10_folder", tar=False)
def make_stl10(root, tar):
    """STL-10; training takes the labelled images, then the unlabelled ones."""
    images = splits(96)
    parts = {"train": images["train"][:5], "test": images["test"]}
    contents = {**parts, "unlabeled": images["train"][5:]}
    files = {
        # Of each image: channel, column, row.
        f"{name}_X.bin": several.transpose(0, 3, 2, 1).tobytes()
        for name, several in contents.items()
    }
    for name, labels in random_labels(parts, 10).items():
        files[f"{name}_y.bin"] = (labels + 1).astype(np.uint8).tobytes()
    files["class_names.txt"] = b"airplane\nbird\ncar\ncat\ndeer\ndog\nhorse\nmonkey\nship\ntruck\n"
    files["fold_indices.txt"] = b"0 1 2 \n" * 10
    files = {f"stl10_binary/{name}": content for name, content in files.items()}
    if tar:
        write_tar(root / "stl10_binary.tar.gz", files)
    else:
        write_folder(root, files)
    return made("STL10", root, images, options={"data.image_size": 48})


# ImageNet, 32×32.


@layout("imagenet32_tar", kind="tar")
@layout("imagenet32_zip", kind="zip")
@layout("imagenet32_folder", kind="folder")
def make_imagenet32(root, kind):
    """The older set of PNGs, as `kind`: tar, zip or folder."""
    images = splits(32)
    for split, name in (("train", "train_32x32"), ("test", "valid_32x32")):
        files = {f"{name}/{i:07d}.png": encoded(x) for i, x in enumerate(images[split], 1)}
        if kind == "tar":
            write_tar(root / f"{name}.tar", files)
        elif kind == "zip":
            write_zip(root / f"{name}.zip", files)
        else:
            write_folder(root, files)
    return made("IMAGENET32", root, images)


@layout("imagenet32_2017_zip", unpacked=False)
@layout("imagenet32_2017_folder", unpacked=True)
def make_imagenet32_2017(root, unpacked):
    """The newer set, pickled by Python 3: by protocol 3 in the zips, by protocol 2 unpacked."""
    images = splits(32)
    labels = {
        split: np.random.default_rng(len(several)).integers(0, 1000, len(several))
        for split, several in images.items()
    }
    mean = channels_first(images["train"]).mean(0)
    train = {}
    for i in range(10):
        part = slice(4 * i, 4 * i + 4)
        train[f"train_data_batch_{i + 1}"] = {
            "data": channels_first(images["train"][part]),
            "labels": [int(label) + 1 for label in labels["train"][part]],
            "mean": mean,
        }
    test = {
        "val_data": {
            "data": channels_first(images["test"]),
            "labels": [int(label) + 1 for label in labels["test"]],
        }
    }
    for name, batches in (("train", train), ("val", test)):
        protocol = 2 if unpacked else 3
        files = {key: pickled(batch, 3, protocol) for key, batch in batches.items()}
        if unpacked:
            write_folder(root, files)
        else:
            write_zip(root / f"Imagenet32_{name}.zip", files)
    return made("IMAGENET32_2017", root, images, labels)


# CelebA, CelebA-HQ and FFHQ.


def celeba_splits(interleaved):
    """The split of each image in the order of names, and the images in that order and by split."""
    names = ["train"] * NUM_TRAIN + ["validation"] * 6 + ["test"] * NUM_TEST
    if interleaved:
        names = [names[i] for i in np.random.default_rng(0).permutation(len(names))]
    images = {
        split: smooth_images(split, [(218, 178)] * names.count(split))
        for split in ("train", "validation", "test")
    }
    rest = {split: iter(several) for split, several in images.items()}
    return names, [next(rest[split]) for split in names], images


def celeba_images(images):
    """The folder of JPEGs."""
    return {
        f"img_align_celeba/{i:06d}.jpg": encoded(image, "JPEG", quality=95)
        for i, image in enumerate(images, 1)
    }


def celeba_partition(names, ending="\r\n"):
    """The partition file; the authors' lines are of 14 bytes, so that they end in two."""
    numbers = {"train": 0, "validation": 1, "test": 2}
    lines = [f"{i:06d}.jpg {numbers[split]}{ending}" for i, split in enumerate(names, 1)]
    return {"list_eval_partition.txt": "".join(lines).encode()}


@layout("celeba_zip", kind="zip")
@layout("celeba_folder", kind="folder")
@layout("celeba_inner", kind="inner")
def make_celeba(root, kind):
    """CelebA as `kind`: zip, folder (the one above the images) or inner (that of the images)."""
    names, together, images = celeba_splits(interleaved=kind == "folder")
    files = celeba_images(together)
    if kind == "zip":
        write_zip(root / "img_align_celeba.zip", files)
    else:
        write_folder(root, files)
    endings = {"zip": "\r\n", "folder": " \n", "inner": "\n"}
    write_folder(root, celeba_partition(names, endings[kind]))
    path = root / "img_align_celeba" if kind == "inner" else root
    return made("CELEBA", path, images, options={"data.image_size": 64}, exact=False)


@layout("celeba_no_partition")
def make_celeba_no_partition(root):
    """CelebA's images alone, all of one brightness: every tenth is a test image."""
    together = smooth_images("train", [(218, 178)] * 52)
    write_folder(root, celeba_images(together))
    images = {
        split: [together[i] for i in indices] for split, indices in every_tenth_is_test(52).items()
    }
    path = root / "img_align_celeba"
    return made("CELEBA", path, images, options={"data.image_size": 64}, exact=False)


def crc32c(data):
    """The Castagnoli checksum."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC32C_TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def _crc32c_entry(byte):
    for _ in range(8):
        byte = (byte >> 1) ^ (0x82F63B78 if byte & 1 else 0)
    return byte


_CRC32C_TABLE = [_crc32c_entry(byte) for byte in range(256)]


def tfrecord(data):
    """One record: length, its checksum, the data, their checksum."""

    def masked(part):
        crc = crc32c(part)
        return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)

    length = struct.pack("<Q", len(data))
    return length + masked(length) + data + masked(data)


def _varint(value):
    out = b""
    while value >= 0x80:
        out, value = out + bytes([value & 0x7F | 0x80]), value >> 7
    return out + bytes([value])


def _field(number, content):
    """A length-delimited field of a protocol buffer."""
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def tf_example(image):
    """A serialised tf.train.Example with the features `shape` (C, H, W) and `data`."""
    planes = image.transpose(2, 0, 1)
    int64_list = _field(3, _field(1, b"".join(_varint(n) for n in planes.shape)))
    bytes_list = _field(1, _field(1, planes.tobytes()))
    entries = {"shape": int64_list, "data": bytes_list}
    features = b"".join(
        _field(1, _field(1, name.encode()) + _field(2, feature))
        for name, feature in entries.items()
    )
    return _field(1, features)


def tfrecords(images):
    """The bytes of a TFRecord file of ProGAN's dataset_tool.py."""
    return b"".join(tfrecord(tf_example(image)) for image in images)


def held_out_last(dataset, size):
    """Images whose last tenth (CelebA-HQ) or seventh (FFHQ) is the test split."""
    num_train, num_test = {"CelebAHQ": (36, 4), "FFHQ": (36, 6)}[dataset]
    return splits(size, num_train=num_train, num_test=num_test)


@layout("celebahq_tfrecords", dataset="CelebAHQ", name="celebahq-r05.tfrecords", size=32)
@layout("ffhq_tfrecords", dataset="FFHQ", name="ffhq-r06.tfrecords", size=64)
def make_tfrecords(root, dataset, name, size):
    """CelebA-HQ or FFHQ as ProGAN's and StyleGAN's dataset_tool.py write it."""
    images = held_out_last(dataset, size)
    (root / name).write_bytes(tfrecords([*images["train"], *images["test"]]))
    return made(dataset, root / name, images, options={"data.image_size": size})


@layout("ffhq_folders")
def make_ffhq_folders(root):
    """FFHQ's folders of PNGs, with 6 rather than 1,000 images in each."""
    images = held_out_last("FFHQ", 16)
    files = {}
    for i, image in enumerate([*images["train"], *images["test"]]):
        folder, number = divmod(i, 6)
        files[f"{folder * 1000:05d}/{folder * 1000 + number:05d}.png"] = encoded(image)
    path = write_folder(root / "images1024x1024", files)
    return made("FFHQ", path, images, options={"data.image_size": 16})


# LSUN.


def lsun_values(split, count, kind):
    """Image files by key, and the images. A smaller side is 32 pixels; `kind`: WEBP or mixed."""
    sizes = [(32, 32 + i % 3 * 8) if i % 2 else (40, 32) for i in range(count)]
    images, values = smooth_images(split, sizes), {}
    for i, image in enumerate(images):
        key = hashlib.sha1(f"{split} {i}".encode()).hexdigest()
        jpeg = kind == "mixed" and i % 4 == 0
        values[key] = encoded(image, "JPEG" if jpeg else "WEBP", quality=90)
    return values, images


def write_lmdb(path, values):
    """Write an LMDB environment, as the authors publish."""
    with lmdb.open(str(path), map_size=2**26) as environment, environment.begin(write=True) as edit:
        for key, value in values.items():
            edit.put(key.encode(), value)


LSUN_OPTIONS = {"data.category": "bedroom", "data.image_size": 32}


@layout("lsun_lmdb")
def make_lsun_lmdb(root):
    """LSUN's bedrooms, and churches beside them that are not used."""
    images = {}
    for split, name, count in (
        ("train", "bedroom_train", NUM_TRAIN),
        ("test", "bedroom_val", NUM_TEST),
        ("unused", "church_outdoor_train", 8),
    ):
        values, images[split] = lsun_values(split, count, "mixed")
        write_lmdb(root / f"{name}_lmdb", values)
    return made("LSUN", root, images, options=dict(LSUN_OPTIONS), exact=False)


@layout("lsun_export_flat", nested=False)
@layout("lsun_export_nested", nested=True)
def make_lsun_export(root, nested):
    """LSUN's bedrooms as `data.py export` writes them, flat or below folders of six characters."""
    images = {}
    for split, name, count in (("train", "train", NUM_TRAIN), ("test", "val", NUM_TEST)):
        values, images[split] = lsun_values(split, count, "WEBP")
        folder = f"bedroom_{name}" if nested else name
        for key, value in values.items():
            below = "/".join([*key[:6], key]) if nested else key
            write_folder(root, {f"{folder}/{below}.webp": value})
    return made("LSUN", root, images, options=dict(LSUN_OPTIONS), exact=False)


# Fashion-MNIST.


def idx(array):
    """The bytes of an IDX file."""
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


@layout("fashion_mnist_gz", compressed=True)
@layout("fashion_mnist_raw", compressed=False)
def make_fashion_mnist(root, compressed):
    """Fashion-MNIST's four IDX files."""
    images = splits(28, channels=1)
    labels = random_labels(images, 10)
    for split, name in (("train", "train"), ("test", "t10k")):
        files = {
            f"{name}-images-idx3-ubyte": idx(images[split][..., 0]),
            f"{name}-labels-idx1-ubyte": idx(labels[split].astype(np.uint8)),
        }
        if compressed:
            files = {f"{key}.gz": gzip.compress(content) for key, content in files.items()}
        write_folder(root, files)
    return made("fashion_mnist", root, images, labels, {"data.num_channels": 1})


# Folders, archives and tables of any images.


def _options(size):
    return {"data.image_size": size}


def edm_files(images, labels, shuffle_labels=False):
    """The files of EDM's and StyleGAN's dataset_tool.py; `labels` may be None."""
    names = [f"{i:08d}"[:5] + f"/img{i:08d}.png" for i in range(len(images))]
    files = {name: encoded(image) for name, image in zip(names, images, strict=True)}
    pairs = labels and [[name, int(n)] for name, n in zip(names, labels, strict=True)]
    if pairs and shuffle_labels:
        pairs = [pairs[i] for i in np.random.default_rng(0).permutation(len(pairs))]
    return {**files, "dataset.json": json.dumps({"labels": pairs}).encode()}


def write_edm_zip(path, files):
    """A zip as EDM's dataset_tool.py writes it."""
    return write_zip(path, files, zipfile.ZIP_STORED, with_folders=False)


@layout("edm_zip", labelled=True, unpacked=False)
@layout("edm_zip_unlabelled", labelled=False, unpacked=False)
@layout("edm_folder", labelled=True, unpacked=True)
def make_edm(root, labelled, unpacked):
    """EDM's zip, or the same unpacked with the labels in another order than the files."""
    together, images = without_splits(60, 16)
    all_labels = [i * 7 % 3 for i in range(60)] if labelled else None
    files = edm_files(together, all_labels, shuffle_labels=unpacked)
    if unpacked:
        path = write_folder(root / "dataset", files)
    else:
        path = write_edm_zip(root / "dataset.zip", files)
    labels = all_labels and {
        split: [all_labels[i] for i in indices]
        for split, indices in every_tenth_is_test(60).items()
    }
    return made("folder", path, images, labels, _options(16))


@layout("plain_zip", kind="zip")
@layout("plain_tar", kind="tar")
def make_plain_archive(root, kind):
    """A zip or tar of the class folders cat and dog; its entries are not in the order of names."""
    together, images = without_splits(60, 8)
    class_names = ["cat"] * 30 + ["dog"] * 30
    files = shuffled(
        {
            f"{name}/{i:03d}.png": encoded(image)
            for i, (name, image) in enumerate(zip(class_names, together, strict=True))
        }
    )
    write = {"zip": write_zip, "tar": write_tar}[kind]
    path = write(root / f"pets.{kind}", files)
    labels = {
        split: [int(i >= 30) for i in indices] for split, indices in every_tenth_is_test(60).items()
    }
    return made("folder", path, images, labels, _options(8))


@layout("folder_splits")
def make_folder_splits(root):
    """Folders train and val, each with the class folders cat and dog."""
    images, labels = splits(8), {}
    for split, name in (("train", "train"), ("test", "val")):
        half = len(images[split]) // 2
        labels[split] = [0] * half + [1] * half
        files = {
            f"{name}/{('cat', 'dog')[label]}/{i:03d}.png": encoded(image)
            for i, (label, image) in enumerate(zip(labels[split], images[split], strict=True))
        }
        write_folder(root, files)
    return made("folder", root, images, labels, _options(8))


@layout("folder_flat")
def make_folder_flat(root):
    """A folder of images without splits and classes."""
    together, images = without_splits(60, 8)
    write_folder(root, {f"{i:03d}.png": encoded(image) for i, image in enumerate(together)})
    return made("folder", root, images, options=_options(8))


def write_parquet(path, images, labels, column="image", class_names=("ant", "bee", "cow")):
    """A Parquet file as Hugging Face's `datasets` writes it, with four rows in a row group."""
    features = {
        column: {"_type": "Image"},
        "label": {"names": list(class_names), "_type": "ClassLabel"},
    }
    schema = pa.schema(
        [
            (column, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            ("label", pa.int64()),
        ],
        metadata={b"huggingface": json.dumps({"info": {"features": features}}).encode()},
    )
    rows = {
        column: [{"bytes": encoded(x), "path": f"{i}.png"} for i, x in enumerate(images)],
        "label": [None if label is None else int(label) for label in labels],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(rows, schema=schema), path, row_group_size=4)


@layout("parquet_hub")
def make_parquet_hub(root):
    """A repository of the Hugging Face hub, two of whose files are the training split."""
    images = {**splits(8), "validation": noisy_images("validation", 6, 8)}
    labels = random_labels(images, 3)
    for split, several in images.items():
        shards = 2 if split == "train" else 1
        parts = zip(np.split(several, shards), np.split(labels[split], shards), strict=True)
        for i, part in enumerate(parts):
            write_parquet(root / f"data/{split}-{i:05d}-of-{shards:05d}.parquet", *part)
    (root / "README.md").write_text("---\ntask_categories:\n- image-classification\n---\n")
    used = {split: labels[split] for split in ("train", "test")}
    return made("folder", root, images, used, _options(8))


@layout("parquet_hub_cifar10")
def make_parquet_hub_cifar10(root):
    """The hub's CIFAR-10, below the folder of its only configuration."""
    images, labels = cifar10_splits()
    for split in images:
        path = root / f"plain_text/{split}-00000-of-00001.parquet"
        write_parquet(path, images[split], labels[split], "img", CIFAR10_CLASSES)
    return made("CIFAR10", root, images, labels)


@layout("npz_splits")
def make_npz_splits(root):
    """Arrays named as in Keras's mnist.npz: grey images without an axis of channels."""
    images = splits(16, channels=1)
    labels = random_labels(images, 10)
    arrays = {}
    for split in images:
        arrays[f"x_{split}"] = images[split][..., 0]
        arrays[f"y_{split}"] = labels[split].astype(np.uint8)
    np.savez(root / "digits.npz", **arrays)
    options = {**_options(16), "data.num_channels": 1}
    return made("folder", root / "digits.npz", images, labels, options)


@layout("npz_images")
def make_npz_images(root):
    """Arrays `images` and `labels` without splits."""
    together, images = without_splits(60, 8)
    all_labels = np.random.default_rng(0).permutation(60) % 5
    np.savez(root / "all.npz", images=together, labels=all_labels)
    labels = {split: all_labels[where] for split, where in every_tenth_is_test(60).items()}
    return made("folder", root / "all.npz", images, labels, _options(8))


@layout("npy_images")
def make_npy_images(root):
    """One array of images."""
    together, images = without_splits(60, 8)
    np.save(root / "all.npy", together)
    return made("folder", root / "all.npy", images, options=_options(8))


# Inputs that are to be refused. Their `Made` says which images the files would hold if whole.


@broken("cifar10_cut", whole="cifar10_python_tar", file="cifar-10-python.tar.gz")
@broken("lsun_cut", whole="lsun_lmdb", file="bedroom_train_lmdb/data.mdb")
@broken("tfrecord_cut", whole="ffhq_tfrecords", file="ffhq-r06.tfrecords")
@broken("png_broken", whole="folder_flat", file="023.png")
def break_cut(root, whole, file):
    """A file ends in its middle, as after a download that was interrupted."""
    made, content = LAYOUTS[whole](root), (root / file).read_bytes()
    (root / file).write_bytes(content[: len(content) // 2 + 10])
    return made


@broken("cifar10_corrupt")
def break_cifar10_corrupt(root):
    """Bytes in the archive's middle are wrong."""
    whole = LAYOUTS["cifar10_python_tar"](root)
    content = bytearray(whole.path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(byte ^ 0xFF for byte in content[middle : middle + 64])
    whole.path.write_bytes(content)
    return whole


@broken("cifar10_code")
def break_cifar10_code(root):
    """A batch whose pickle calls os.system; the command creates the file options["canary"]."""
    whole = LAYOUTS["cifar10_python_batches"](root)
    canary = (root / "canary").resolve()
    name, images, labels = cifar10_batches()[1]
    batch = cifar10_batch(name, images, labels)
    batch["filenames"] = Call("os system", (f"touch '{canary}'",))
    (whole.path / name).write_bytes(pickled(batch))
    return dataclasses.replace(whole, options={"canary": str(canary)})


@broken("cifar10_missing_batch")
def break_cifar10_missing_batch(root):
    """The third training batch is missing."""
    whole = LAYOUTS["cifar10_python_batches"](root)
    (whole.path / "data_batch_3").unlink()
    return whole


@broken("cifar10_other_size")
def break_cifar10_other_size(root):
    """Folders of CIFAR-10's classes, one of whose images is larger than the others."""
    images = splits(32, num_train=20, num_test=10)
    for split, several in images.items():
        files = {f"{split}/{i % 10}/{i:03d}.png": encoded(x) for i, x in enumerate(several)}
        write_folder(root, files)
    write_folder(root, {"train/3/013.png": encoded(noisy_images("train", 1, 40)[0])})
    return made("CIFAR10", root, images, exact=False)


@broken("zip_with_traversal")
def break_zip_with_traversal(root):
    """A zip with an entry outside the folder in which it is unpacked."""
    whole = LAYOUTS["plain_zip"](root)
    with zipfile.ZipFile(whole.path, "a") as archive:
        archive.writestr("../evil.png", encoded(noisy_images("train", 1, 8)[0]))
    return whole


@broken("tar_with_link")
def break_tar_with_link(root):
    """A tar with a symbolic link to a file of the system."""
    whole = LAYOUTS["plain_tar"](root)
    with tarfile.open(whole.path, "a") as tar:
        link = tarfile.TarInfo("img.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(link)
    return whole


@broken("celeba_short_partition", edit=lambda lines: lines[:-3])
@broken("celeba_long_partition", edit=lambda lines: [*lines, "000059.jpg 0", "000060.jpg 2"])
@broken("celeba_bad_partition", edit=lambda lines: [*lines[:5], "000006.jpg training", *lines[6:]])
def break_celeba_partition(root, edit):
    """CelebA whose partition file's lines are what `edit` makes of the right ones."""
    whole = LAYOUTS["celeba_inner"](root)
    path = root / "list_eval_partition.txt"
    lines = edit(path.read_text().splitlines())
    path.write_text("".join(f"{line}\n" for line in lines))
    return whole


@broken("drive_page")
def break_drive_page(root):
    """In place of CelebA's zip the page by which Google Drive warns of large files."""
    page = (
        "<!DOCTYPE html><html><head><title>Google Drive - Virus scan warning</title></head><body>"
        '<p class="uc-warning-caption">Google Drive can\'t scan this file for viruses.</p>'
        '<p class="uc-warning-subcaption"><span class="uc-name-size">'
        '<a href="/open?id=0B7EVK8r0v71pZjFTYXZWM3FlRnM">img_align_celeba.zip</a> (1.3G)</span> is '
        "too large for Google to scan for viruses. Would you still like to download this file?</p>"
        '<form id="download-form" action="https://drive.usercontent.google.com/download" '
        'method="get"><input type="submit" value="Download anyway"/></form></body></html>'
    )
    names, _, images = celeba_splits(interleaved=False)
    write_folder(root, {"img_align_celeba.zip": page.encode(), **celeba_partition(names)})
    return made("CELEBA", root, images, options={"data.image_size": 64}, exact=False)


@broken("edm_label_missing")
def break_edm_label_missing(root):
    """dataset.json has no label for one of the files."""
    together, images = without_splits(60, 16)
    files = edm_files(together, [i % 3 for i in range(60)])
    pairs = json.loads(files["dataset.json"])["labels"]
    files["dataset.json"] = json.dumps({"labels": pairs[:17] + pairs[18:]}).encode()
    path = write_edm_zip(root / "dataset.zip", files)
    return made("folder", path, images, options=_options(16), exact=False)


@broken("parquet_label_missing")
def break_parquet_label_missing(root):
    """One label is null."""
    images = splits(8)
    labels = {split: list(several) for split, several in random_labels(images, 3).items()}
    labels["train"][7] = None
    for split in images:
        path = root / f"data/{split}-00000-of-00001.parquet"
        write_parquet(path, images[split], labels[split])
    return made("folder", root, images, options=_options(8), exact=False)


@broken("parquet_two_configurations")
def break_parquet_two_configurations(root):
    """A repository with two configurations, of which the user has named neither."""
    images = splits(8)
    labels = random_labels(images, 3)
    for configuration in ("cropped", "full"):
        for split in images:
            path = root / configuration / f"{split}-00000-of-00001.parquet"
            write_parquet(path, images[split], labels[split])
    return made("folder", root, images, options=_options(8), exact=False)


@broken("lsun_no_val")
def break_lsun_no_val(root):
    """LSUN's training images without the validation images."""
    values, images = lsun_values("train", NUM_TRAIN, "WEBP")
    write_lmdb(root / "bedroom_train_lmdb", values)
    return made("LSUN", root, {"train": images}, options=dict(LSUN_OPTIONS), exact=False)


@broken("imagenet32_as_2017", dataset="IMAGENET32", layout="imagenet32_2017_zip")
@broken("imagenet32_2017_as_old", dataset="IMAGENET32_2017", layout="imagenet32_tar")
def break_other_imagenet32(root, dataset, layout):
    """One of the two sets, given as the other."""
    return dataclasses.replace(LAYOUTS[layout](root), dataset=dataset)


@broken("lsun_page")
def break_lsun_page(root):
    """The page of the last key is no leaf; LMDB's library ends a process that comes to it."""
    whole = LAYOUTS["lsun_lmdb"](root)
    path = root / "bedroom_train_lmdb" / "data.mdb"
    content = bytearray(path.read_bytes())
    values, _ = lsun_values("train", NUM_TRAIN, "mixed")
    place = content.index(max(values).encode())
    content[place - place % 4096 + 10] = 4  # the flag of a page that continues a large value
    path.write_bytes(content)
    return whole


@broken("npz_floats")
def break_npz_floats(root):
    """Images as floats, whose range no reader can know."""
    images = splits(8)
    arrays = {f"x_{split}": (images[split] / 255).astype(np.float32) for split in images}
    labels = {f"y_{split}": several for split, several in random_labels(images, 3).items()}
    np.savez(root / "floats.npz", **arrays, **labels)
    return made("folder", root / "floats.npz", images, options=_options(8), exact=False)


@broken("npz_object")
def break_npz_object(root):
    """Images as an array of objects, which NumPy stores as a pickle."""
    together, images = without_splits(60, 8)
    objects = np.empty(60, object)
    objects[:] = list(together)
    np.savez(root / "objects.npz", images=objects, labels=np.arange(60) % 5)
    return made("folder", root / "objects.npz", images, options=_options(8), exact=False)


@broken("tfrecord_other_shape")
def break_tfrecord_other_shape(root):
    """One record's image is smaller than the others."""
    whole = LAYOUTS["celebahq_tfrecords"](root)
    together = [*whole.images["train"], *whole.images["test"]]
    together[11] = noisy_images("train", 1, 16)[0]
    whole.path.write_bytes(tfrecords(together))
    return whole


@broken("splits_without_test")
def break_splits_without_test(root):
    """Folders train and extra: some split is meant, but none is the test split."""
    images = {
        "train": noisy_images("train", NUM_TRAIN, 8),
        "unused": noisy_images("unused", NUM_TEST, 8),
    }
    for split, name in (("train", "train"), ("unused", "extra")):
        files = {f"{name}/{i:03d}.png": encoded(x) for i, x in enumerate(images[split])}
        write_folder(root, files)
    return made("folder", root, images, options=_options(8), exact=False)


@broken("empty_folder")
def break_empty_folder(root):
    """A folder without files."""
    (root / "empty").mkdir()
    return made("folder", root / "empty", {}, options=_options(8), exact=False)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the layouts that the command line names, or all, and print a table of them."""
    makers: Mapping[str, Callable[[pathlib.Path], Made]] = {**LAYOUTS, **BROKEN}
    parser = argparse.ArgumentParser(prog="tests.make_datasets", description=__doc__)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--only", nargs="+", choices=makers, metavar="NAME", default=list(makers))
    given = parser.parse_args(arguments)
    rows = [("layout", "data set", "path", "counts", "brightness")]
    for name in given.only:
        folder = given.folder / name
        if folder.exists() and any(folder.iterdir()):
            parser.error(f"{folder} is not empty")
        folder.mkdir(parents=True, exist_ok=True)
        written = makers[name](folder)
        counts = " ".join(f"{split} {n}" for split, n in written.counts.items())
        brightness = " ".join(f"{split} {x:.1f}" for split, x in written.brightness.items())
        path = str(written.path.relative_to(given.folder))
        rows.append((name, written.dataset, path, counts, brightness))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())


if __name__ == "__main__":
    main()
