"""Images a second, and processor time an image, of each way that training data come, alone.

python -m benchmarks.inputs

Batches are made as in training, by `datasets.train_batches`, and nothing is done with them. The
files hold random images of CIFAR-10's size and are made in a temporary folder.
On an accelerator a set of up to 1 GiB lives on the device, whatever its source is: then only the
places of a batch's images are made here, which is the first row.
"""

import argparse
import pathlib
import tempfile
import time
from typing import Any

import numpy as np
from PIL import Image

import datasets
import environment
import sources
from datasets import Dataset
from sources import ArraySource, Fit, FolderSource


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


def tfds_dataset(images: np.ndarray, folder: pathlib.Path) -> Dataset:
    """The images as a TFDS data set, prepared in `folder`."""
    import tensorflow_datasets as tfds

    class Random32(tfds.core.GeneratorBasedBuilder):
        """Random images."""

        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = folder

        def _info(self) -> Any:
            features = {"image": tfds.features.Image(shape=images.shape[1:])}
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager: Any) -> Any:
            del dl_manager
            return {"train": self._generate_examples()}

        def _generate_examples(self) -> Any:
            yield from ((i, {"image": image}) for i, image in enumerate(images))

    builder = Random32(data_dir=folder, file_format="array_record")
    builder.download_and_prepare()
    source = sources.TFDSSource(builder.as_data_source(split="train"))
    return Dataset("TFDS, PNG in array_record", source, 256, 0)


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
        folder = pathlib.Path(name)
        for size in (32, 128):
            files = []
            for i, image in enumerate(images[:1000]):
                files.append(folder / f"{size}_{i:05}.png")
                Image.fromarray(image).resize((size, size)).save(files[-1])
            source = FolderSource(files, np.zeros(len(files)), Fit(32, 3))
            dataset = Dataset(f"folder of {size}×{size} PNG files", source, 256, 0)
            rows.append((dataset.name, speed(dataset, flags.batch, flags.seconds)))
        dataset = tfds_dataset(images, folder)
        rows.append((dataset.name, speed(dataset, flags.batch, flags.seconds)))
    print(f"\nbatches of {flags.batch} images of 32×32×3\n")
    print("| data | images/s | CPU µs an image |\n|---|---|---|")
    for name, (rate, cpu) in rows:
        print(f"| {name} | {rate:,.0f} | {cpu:,.3g} |")


if __name__ == "__main__":
    main()
