"""A folder of images as people have them: `python -m tests.make_folder DIR [--count 500]`.

Patches of scikit-learn's two photographs, of many sizes, kinds and names.
"""

import argparse
import pathlib

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

MODES = ("RGB", "L", "RGBA", "P", "I;16")


def make_folder(folder, count):
    """Write `count` PNGs below `folder`; returns their paths."""
    photos, rng, paths = load_sample_images().images, np.random.default_rng(0), []
    for i in range(count):
        height, width = rng.integers(20, 90, 2)
        photo = photos[i % len(photos)]
        top, left = (rng.integers(n - 90) for n in photo.shape[:2])
        patch = Image.fromarray(photo[top : top + height, left : left + width])
        mode = MODES[i % len(MODES)]
        if mode == "I;16":
            patch = Image.fromarray(np.asarray(patch.convert("L"), np.uint16) * 257)
        elif mode == "RGBA":
            patch.putalpha(Image.linear_gradient("L").resize(patch.size))
        else:
            patch = patch.convert(mode)
        paths.append(
            folder / ("my images" if i % 3 else "café") / f"{mode.replace(';', '')} {i}.png"
        )
        paths[-1].parent.mkdir(parents=True, exist_ok=True)
        patch.save(paths[-1])
    return paths


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="tests.make_folder", description=__doc__)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--count", type=int, default=500)
    options = parser.parse_args()
    print(f"{len(make_folder(options.folder, options.count))} images in {options.folder}")
