"""Input pipeline throughput, measured without training: images a second, processor time an image.

python -m benchmarks.inputs

Batches are made as in training, by `datasets.train_batches`, and nothing is done with them. The
files hold random images of CIFAR-10's size and are made in a temporary folder. Files are decoded
once into the cache and memory-mapped from there; with data.cache=False they are decoded anew each
time. On an accelerator a set of up to 1 GiB lives on the device: then only the indices of a
batch's images are made here, which is the first row.
"""

import argparse
import os
import pathlib
import tempfile
import time
from typing import Any

import numpy as np
from PIL import Image

import datasets
import environment
from datasets import Dataset
from readers import cache, image_files, tfds
from readers.decode import Fit
from readers.layout import Found
from readers.source import ArraySource


def speed(
    dataset: Dataset, batch: int, seconds: float, places: bool = False
) -> tuple[float, float]:
    """(images a second, microseconds of processor time an image), after the first batch."""
    batches = datasets.train_batches(dataset, batch, seed=0, places=places)
    next(batches)
    start, start_cpu, count = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - start < seconds:
        next(batches)
        count += batch
    cpu = time.process_time() - start_cpu  # of all threads
    return count / (time.perf_counter() - start), 1e6 * cpu / count


def prepare_tfds(images: np.ndarray, folder: pathlib.Path) -> None:
    """Have TFDS prepare the images in a folder, as array_record."""
    import tensorflow_datasets

    class Random32(tensorflow_datasets.core.GeneratorBasedBuilder):
        """Random images."""

        VERSION = tensorflow_datasets.core.Version("1.0.0")
        pkg_dir_path = folder

        def _info(self) -> Any:
            features = {"image": tensorflow_datasets.features.Image(shape=images.shape[1:])}
            return tensorflow_datasets.core.DatasetInfo(
                builder=self, features=tensorflow_datasets.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager: Any) -> Any:
            del dl_manager
            return {"train": self._generate_examples()}

        def _generate_examples(self) -> Any:
            yield from ((i, {"image": image}) for i, image in enumerate(images))

    Random32(data_dir=folder, file_format="array_record").download_and_prepare()


def kept_and_not(name: str, found: Found, flags: argparse.Namespace) -> list[tuple[str, Any]]:
    """Rows of decoding into the cache, of batches from it, and of batches without it."""
    rows, fit = [], Fit(32, 3)
    start, start_cpu = time.perf_counter(), time.process_time()
    kept = cache.decode("benchmark", found, fit).train
    seconds, cpu = time.perf_counter() - start, time.process_time() - start_cpu
    rows.append((f"{name}: decoding into the cache", (len(kept) / seconds, 1e6 * cpu / len(kept))))
    not_kept = cache.decode("benchmark", found, fit, keep=False).train
    for how, source in (("from the cache", kept), ("data.cache=False", not_kept)):
        dataset = Dataset(name, source, 256, 0)
        rows.append((f"{name}: {how}", speed(dataset, flags.batch, flags.seconds)))
    return rows


def main() -> None:
    """Do it."""
    environment.prepare()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--seconds", type=float, default=5.0)
    flags = parser.parse_args()
    rng = np.random.default_rng(0)
    shape = (flags.images, 32, 32, 3)
    # Smooth noise: PNG files of it are as large as photographs'.
    coarse = rng.integers(0, 256, (flags.images, 8, 8, 3), dtype=np.uint8)
    images = coarse.repeat(4, axis=1).repeat(4, axis=2) // 2 + rng.integers(0, 64, shape)
    images = images.astype(np.uint8)
    memory = Dataset("memory", ArraySource(images, np.zeros(len(images))), 256, 0)
    rows = [("places, for data on the device", speed(memory, flags.batch, flags.seconds, True))]
    rows.append(("memory", speed(memory, flags.batch, flags.seconds)))
    with tempfile.TemporaryDirectory() as name:
        os.environ["XDG_CACHE_HOME"] = name  # what is decoded goes there
        for size in (32, 128):
            folder = pathlib.Path(name) / f"{size}"
            folder.mkdir()
            for i, image in enumerate(images[:2000]):
                Image.fromarray(image).resize((size, size)).save(folder / f"{i:05}.png")
            found = image_files.find_unsplit(folder)
            rows += kept_and_not(f"folder of {size}×{size} PNG files", found, flags)
        prepare_tfds(images, pathlib.Path(name))
        found = tfds.find("random32", pathlib.Path(name), ("train", "train"), 0)
        rows += kept_and_not("TFDS, PNG in array_record", found, flags)
    print(f"\nbatches of {flags.batch} images of 32×32×3\n")
    print("| data | images/s | CPU µs an image |\n|---|---|---|")
    for name, (rate, cpu) in rows:
        print(f"| {name} | {rate:,.0f} | {cpu:,.3g} |")


if __name__ == "__main__":
    main()
