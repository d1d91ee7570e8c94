"""Make the folders of images that the sweeps of 256 levels train on and are scored with.

    python -m experiments.make_data photographs DIR PHOTOGRAPHS…    # files or folders
    python -m experiments.make_data fashion_mnist DIR

DIR gets `training`, whose train/ and test/ are images of different photographs, `validation`, of
still others, and `features`, with a class folder for each photograph in training: images of them
that no diffusion model sees, on which the classifier of the scores is trained. The photographs are
those of Debian's packages mate-backgrounds (in nature), lomiri-wallpapers-16.04 and
lomiri-wallpapers-20.04, below /usr/share/backgrounds.
"""

import argparse
import pathlib
import sys
from collections.abc import Iterable

import numpy as np
from PIL import Image

import datasets
from configs.errors import UserError
from configs.vp import fashion_mnist_st
from runtime import environment

# The numbers of crops, by the group of photographs that they are of.
CROPS = {
    "train": {"training/train": 12_000, "features/train": 6000, "features/test": 2000},
    "validation": {"validation": 192},
    "test": {"training/test": 1000},
}


def _save(folder: pathlib.Path, images: Iterable[np.ndarray]) -> None:
    """Write images as numbered PNG files."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number:05}.png")


def _crops(pixels: np.ndarray, count: int, size: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Random squares of a photograph."""
    height, width = pixels.shape[:2]
    tops = rng.integers(height - size + 1, size=count)
    lefts = rng.integers(width - size + 1, size=count)
    return [pixels[i : i + size, j : j + size] for i, j in zip(tops, lefts, strict=True)]


def make_photographs(out: pathlib.Path, photographs: list[pathlib.Path], size: int) -> None:
    """Write random crops of photographs, scaled to 320 pixels on the shorter side at first.

    Of each five photographs three are for training, one for validation and one for testing.

    Args:
      out: gets the folders training, validation and features.
      photographs: image files, at least five.
      size: the crops' width in pixels.
    """
    if len(photographs) < 5:
        raise UserError(f"{len(photographs)} photographs were found; 5 or more are needed")
    rng = np.random.default_rng(0)
    groups = {
        "train": [p for i, p in enumerate(photographs) if i % 5 < 3],
        "validation": photographs[3::5],
        "test": photographs[4::5],
    }
    for group, chosen in groups.items():
        for number, path in enumerate(chosen):
            with Image.open(path) as image:
                scale = 320 / min(image.size)
                shape = (round(image.width * scale), round(image.height * scale))
                small = image.convert("RGB").resize(shape, Image.Resampling.BOX)
            for name, total in CROPS[group].items():
                each = -(-total // len(chosen))
                crops = _crops(np.asarray(small), each, size, rng)
                _save(out / name / f"{number:02}", crops)
        print(f"{group}: {len(chosen)} photographs")


def make_fashion_mnist(out: pathlib.Path, size: int, path: str = "") -> None:
    """Write Fashion-MNIST, padded to 32 pixels and averaged to `size`.

    Of its training images 40,000 are for training, 10,000 and 5000 for the classifier's training
    and testing, and 192 of the others for validation.
    """
    config = fashion_mnist_st.get_config()
    config.data.path = path
    data = datasets.load_data(config)
    factor = 32 // size
    for dataset, parts in (
        (
            data.train,
            {
                "training/train": range(40_000),
                "features/train": range(40_000, 50_000),
                "features/test": range(50_000, 55_000),
                "validation": range(55_000, 55_192),
            },
        ),
        (data.test, {"training/test": range(10_000)}),
    ):
        for name, part in parts.items():
            examples = dataset.source.fetch(np.array(part))
            images = examples["image"].astype(np.float32)
            images = images.reshape(-1, size, factor, size, factor).mean((2, 4))
            images = np.round(images).astype(np.uint8)
            classes = np.unique(examples["label"])
            for number in classes:
                _save(out / name / f"{number:02}", images[examples["label"] == number])
            print(f"{name}: {len(images)} images of {len(classes)} classes")


def main() -> int:
    """Make the folders that the command line asks for; returns the exit status."""
    parser = argparse.ArgumentParser(prog="experiments.make_data")
    parser.add_argument("data", choices=("photographs", "fashion_mnist"))
    parser.add_argument("out", type=pathlib.Path, help="an empty or new folder")
    parser.add_argument("photographs", type=pathlib.Path, nargs="*", help="JPEG files or folders")
    parser.add_argument("--path", default="", help="where Fashion-MNIST is, if not found")
    parser.add_argument("--size", type=int, choices=(16, 32), default=16, help="pixels")
    flags = parser.parse_args()
    environment.prepare()
    try:
        if flags.out.exists() and any(flags.out.iterdir()):
            raise UserError(f"{flags.out} is not empty; name a new folder")
        if flags.data == "fashion_mnist":
            if flags.photographs:
                raise UserError(
                    "photographs are not read for fashion_mnist; --path says where it is"
                )
            make_fashion_mnist(flags.out, flags.size, flags.path)
        else:
            paths: list[pathlib.Path] = []
            for given in flags.photographs:
                found = [given] if given.is_file() else sorted(given.rglob("*.jpg"))
                paths += [path for path in found if not path.is_symlink()]
            make_photographs(flags.out, paths, flags.size)
    except (UserError, OSError) as error:  # an OSError: no image, or no room
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
