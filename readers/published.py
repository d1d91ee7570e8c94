"""The supported data sets of image files: formats, splits and labels (docs/data.md).

A config file can register one of its own in `PUBLISHED` (docs/extending.md).
"""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Mapping

from PIL import Image

from configs.errors import UserError
from data.spec import DataSpec
from readers import (
    arrays,
    celeba,
    cifar,
    download,
    idx,
    image_files,
    lsun,
    parquet,
    stl10,
    svhn,
    tfds,
    tfrecords,
)
from readers.decode import Fit
from readers.layout import Found, Opened, Records

_FASHION_MNIST = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
_SCENES = (  # of LSUN
    "bedroom",
    "bridge",
    "church_outdoor",
    "classroom",
    "conference_room",
    "dining_room",
    "kitchen",
    "living_room",
    "restaurant",
    "tower",
)


@dataclasses.dataclass(frozen=True)
class Published:
    """The facts about a data set of image files; an entry of `PUBLISHED` is all that one needs.

    Attributes:
      title: its usual name.
      files: the authors' files and where to get them, for messages.
      find: (path, settings) → what a reader of the authors' files found.
      classes: the number of classes; 0: there are no labels; None: folders may be classes.
      counts: the numbers of training and test images.
      native: side of all images in pixels; 0: any.
      tfds: its name in TFDS; empty if TFDS does not have it.
      tfds_splits: the names of the training and the test split in TFDS.
      held_out: the last of this many equal parts is the test split; 0: there is a test split.
      crop, resampling, pad: as in `Fit`.
      downloads: the SHA-256 of each file that is downloaded, by its address; they agree with those
        in TFDS and Keras.
      installed: a folder where a system's package has the files.
      categories: of which `data.category` names one; (): it is not used.
    """

    title: str
    files: str
    find: Callable[[pathlib.Path, DataSpec], Found | None]
    classes: int | None = 0
    counts: tuple[int, int] | None = None
    native: int = 0
    tfds: str = ""
    tfds_splits: tuple[str, str] = ("train", "test")
    held_out: int = 0
    crop: int = 0
    resampling: Image.Resampling = Image.Resampling.BICUBIC
    pad: bool = False
    downloads: Mapping[str, str] = dataclasses.field(default_factory=dict)
    installed: str = ""
    categories: tuple[str, ...] = ()


def _find_imagenet32(path: pathlib.Path, spec: DataSpec) -> Found | None:
    """The older set or that of 2017; UserError if the files are of the one that is not wanted."""
    of_2017 = cifar.find_imagenet32_2017(path)
    older = None if of_2017 else image_files.find_splits(path, 0, what="the authors' images")
    has, other = "the pickled batches of 2017", "IMAGENET32_2017"
    if older:
        has, other = "the older set's folders, which published bits/dim are of", "IMAGENET32"
    if (of_2017 or older) and other != spec.dataset:
        raise UserError(
            f"data.path: {path} has {has}, another data set than {spec.dataset}: "
            f"--config.data.dataset={other}"
        )
    return of_2017 or older


def _find_faces(path: pathlib.Path, spec: DataSpec) -> Found | None:
    known = PUBLISHED[spec.dataset]
    if path.is_dir():
        of_size = f"*-r{round(math.log2(spec.shape[0])):02}.tfrecords"
        files = sorted(path.glob(of_size))
        if len(files) > 1:
            raise UserError(f"data.path: {path} has {', '.join(f.name for f in files)}; name one")
        path = files[0] if files else path
    share = {7: "seventh", 10: "tenth"}.get(known.held_out, f"1/{known.held_out}")
    what = f"of which the last {share} is held out for testing"
    found = tfrecords.find(path, known.held_out, what)
    if found is None and path.is_dir():
        found = image_files.find_splits(path, 0)
    return found or image_files.find_unsplit(path, 0, held_out=known.held_out, what=what)


def _find_folder(path: pathlib.Path, many: bool) -> Found | None:
    return (
        arrays.find(path)
        or parquet.find(path)
        or image_files.find_splits(path, many=many)
        or image_files.find_unsplit(path, many=many)
    )


PUBLISHED = {
    "CIFAR10": Published(
        "CIFAR-10",
        "cifar-10-python.tar.gz or cifar-10-binary.tar.gz, packed or unpacked, of "
        "https://www.cs.toronto.edu/~kriz/cifar.html",
        lambda path, spec: cifar.find_cifar10(path),
        classes=10,
        counts=(50_000, 10_000),
        native=32,
        tfds="cifar10",
        downloads={
            "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz": (
                "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
            ),
        },
    ),
    "SVHN": Published(
        "SVHN",
        "train_32x32.mat and test_32x32.mat of http://ufldl.stanford.edu/housenumbers",
        lambda path, spec: svhn.find(path),
        classes=10,
        counts=(73_257, 26_032),
        native=32,
        tfds="svhn_cropped",
        downloads={
            "http://ufldl.stanford.edu/housenumbers/train_32x32.mat": (
                "435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8"
            ),
            "http://ufldl.stanford.edu/housenumbers/test_32x32.mat": (
                "cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b"
            ),
        },
    ),
    "STL10": Published(
        "STL-10",
        "stl10_binary.tar.gz, packed or unpacked, of https://cs.stanford.edu/~acoates/stl10",
        lambda path, spec: stl10.find(path),
        counts=(105_000, 8_000),
        tfds="stl10",
        tfds_splits=("train+unlabelled", "test"),
        downloads={
            "http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz": (
                "f31fd99273a1acb8609c8db427cebb1de3f71de77758cdc0e22956e1289b9866"
            ),
        },
        resampling=Image.Resampling.BILINEAR,
    ),
    "fashion_mnist": Published(
        "Fashion-MNIST",
        "the four IDX files of https://github.com/zalandoresearch/fashion-mnist, or Debian's "
        "package dataset-fashion-mnist",
        lambda path, spec: idx.find(path),
        classes=10,
        counts=(60_000, 10_000),
        native=28,
        tfds="fashion_mnist",
        installed="/usr/share/datasets/fashion-mnist",  # Debian's package dataset-fashion-mnist
        downloads={
            f"{_FASHION_MNIST}/train-images-idx3-ubyte.gz": (
                "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84"
            ),
            f"{_FASHION_MNIST}/train-labels-idx1-ubyte.gz": (
                "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845"
            ),
            f"{_FASHION_MNIST}/t10k-images-idx3-ubyte.gz": (
                "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073"
            ),
            f"{_FASHION_MNIST}/t10k-labels-idx1-ubyte.gz": (
                "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5"
            ),
        },
        pad=True,
    ),
    "IMAGENET32": Published(
        "ImageNet 32 (the older set, which published bits/dim are of)",
        "train_32x32.tar and valid_32x32.tar (or .zip, or unpacked); their address is gone, and "
        "Academic Torrents has them as Downsampled ImageNet 32x32",
        _find_imagenet32,
        counts=(1_281_149, 49_999),
        native=32,
        tfds="downsampled_imagenet/32x32",
        tfds_splits=("train", "validation"),
    ),
    "IMAGENET32_2017": Published(
        "ImageNet 32 of 2017 (Chrabaszcz et al.)",
        "Imagenet32_train.zip and Imagenet32_val.zip, packed or unpacked, of "
        "https://image-net.org/download-images (after registration)",
        _find_imagenet32,
        classes=1000,
        counts=(1_281_167, 50_000),
        native=32,
        tfds="imagenet_resized/32x32",
        tfds_splits=("train", "validation"),
    ),
    "CELEBA": Published(
        "CelebA",
        "img_align_celeba.zip (or unpacked) and list_eval_partition.txt of "
        "http://mmlab.ie.cuhk.edu.hk/projects/CelebA.html",
        lambda path, spec: celeba.find(path),
        counts=(162_770, 19_962),
        tfds="celeb_a",
        crop=140,
        resampling=Image.Resampling.BILINEAR,
    ),
    "CelebAHQ": Published(
        "CelebA-HQ",
        "celebahq-r08.tfrecords, by dataset_tool.py of "
        "https://github.com/tkarras/progressive_growing_of_gans, or a folder of its PNGs",
        _find_faces,
        counts=(27_000, 3_000),
        tfds="celeb_a_hq/{size}",
        tfds_splits=("train", "train"),
        held_out=10,
    ),
    "FFHQ": Published(
        "FFHQ",
        "ffhq-r08.tfrecords (r10 for 1024×1024) or the folders of PNGs of "
        "https://github.com/NVlabs/ffhq-dataset",
        _find_faces,
        counts=(60_000, 10_000),
        held_out=7,
    ),
    "LSUN": Published(
        "LSUN",
        "SCENE_train_lmdb.zip and SCENE_val_lmdb.zip of https://github.com/fyu/lsun, unpacked, or "
        "what its data.py exports of them, as train/ and val/",
        lambda path, spec: lsun.find(path, spec.category),
        tfds="lsun/{category}",
        categories=_SCENES,
        tfds_splits=("train", "validation"),
    ),
    "folder": Published(
        "images",
        "a folder, a zip or a tar of images, parquet files, or arrays",
        lambda path, spec: _find_folder(path, spec.labelled),
        classes=None,
        resampling=Image.Resampling.LANCZOS,
    ),
}


def _other_ways(known: Published) -> str:
    """A sentence that says how to get a data set."""
    ways = f"bring {known.files}, and name the file or folder by --config.data.path"
    if known.tfds:
        ways += "; or name a folder of TFDS's by --config.data.tfds_dir"
    return f"{ways}; docs/data.md has all ways"


def get_fit(spec: DataSpec) -> Fit:
    """The conversion of a data set's images to the size and channels of training."""
    known, (size, _, channels) = PUBLISHED[spec.dataset], spec.shape
    return Fit(size, channels, known.crop, known.resampling, known.pad, spec.max_pixels)


def find(spec: DataSpec) -> Found:
    """Find a published data set at its path, or download it.

    Raises:
      UserError: it is missing, can't be downloaded, or has an unknown format; the message says
        which files are needed.
    """
    known, path = PUBLISHED[spec.dataset], spec.path
    if not path and spec.tfds_dir:
        return _check_opened(_find_tfds(spec, known), known)
    if not path and known.installed and pathlib.Path(known.installed).is_dir():
        path = known.installed
    if not path and known.downloads:
        path = str(download.fetch(spec.dataset, known.downloads, _other_ways(known)))
    if not path:
        raise UserError(
            f"{known.title} has no stable address to be downloaded from: {_other_ways(known)}"
        )
    place = pathlib.Path(path).expanduser()
    if not place.exists():
        raise UserError(f"data.path: there is no file or folder {place}; {_other_ways(known)}")
    found = known.find(place, spec)
    if found is None and spec.dataset != "folder":
        found = (
            parquet.find(place, needs_splits=True)
            or arrays.find(place, needs_splits=True)
            or image_files.find_splits(place, known.classes)
        )
    if found is None:
        raise UserError(
            f"data.path: {place} has nothing that {known.title} is read from; {_other_ways(known)}"
        )
    return _check_opened(found, known)


def _find_tfds(spec: DataSpec, known: Published) -> Found:
    if not known.tfds:
        raise UserError(f"data.tfds_dir: TFDS does not have {known.title}; {_other_ways(known)}")
    return tfds.find(
        known.tfds.format(size=spec.shape[0], category=spec.category),
        pathlib.Path(spec.tfds_dir).expanduser(),
        known.tfds_splits,
        known.classes or 0,
        known.held_out,
    )


def _check_opened(found: Found, known: Published) -> Found:
    """`found`, with a check of the images' size and of the number of classes when it is opened."""

    def opened() -> Opened:
        got = found.open()
        if known.classes and len(got.classes) not in (0, known.classes):
            raise UserError(
                f"{found.what}: {len(got.classes)} classes; {known.title} has {known.classes}"
            )
        train, test = (
            dataclasses.replace(split, size=(known.native, known.native))
            if known.native and isinstance(split, Records)
            else split
            for split in (got.train, got.test)
        )
        return got._replace(train=train, test=test)

    return dataclasses.replace(found, open=opened)
