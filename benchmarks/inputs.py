"""Input pipeline throughput, measured without training: images/s and CPU time per image.

python -m benchmarks.inputs

Batches are made as in training, by `train_batches`, and discarded. The files are random
images of CIFAR-10's size in a temporary folder. They are decoded once into the cache and
memory-mapped from there; with data.cache=False they are decoded for every batch. Data sets of up to
1 GiB are kept in device memory, so that a step receives only the indices of its images; this is the
first row.
"""

import argparse
import os
import pathlib
import tempfile
import time

import numpy as np
from PIL import Image

from benchmarks.measure import Table, get_parser
from data.batches import Dataset, train_batches
from readers import cache, image_files
from readers.decode import Fit
from readers.layout import Found
from readers.source import ArraySource


def speed(
    dataset: Dataset, batch: int, seconds: float, indices_only: bool = False
) -> tuple[float, float]:
    """(images per second, microseconds of CPU time per image), after the first batch."""
    batches = train_batches(dataset, batch, seed=0, indices_only=indices_only)
    next(batches)
    start, start_cpu, count = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - start < seconds:
        next(batches)
        count += batch
    cpu = time.process_time() - start_cpu  # over all threads
    return count / (time.perf_counter() - start), 1e6 * cpu / count


def add_files(table: Table, name: str, found: Found, flags: argparse.Namespace) -> None:
    """Add rows of decoding into the cache, of batches from it, and of batches without it."""
    fit, start, start_cpu = Fit(32, 3), time.perf_counter(), time.process_time()
    kept = cache.decode("benchmark", found, fit).train
    seconds, cpu = time.perf_counter() - start, time.process_time() - start_cpu
    table.add(f"{name}: decoding into the cache", len(kept) / seconds, 1e6 * cpu / len(kept))
    not_kept = cache.decode("benchmark", found, fit, keep=False).train
    for how, source in (("from the cache", kept), ("data.cache=False", not_kept)):
        dataset = Dataset(name, source, 256)
        table.add(f"{name}: {how}", *speed(dataset, flags.batch, flags.seconds))


def main() -> None:
    """Measure all kinds of data, and print the table."""
    parser = get_parser(__doc__)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--seconds", type=float, default=5.0)
    flags = parser.parse_args()
    rng, shape = np.random.default_rng(0), (flags.images, 32, 32, 3)
    # Smooth noise, whose PNG files are as large as those of photographs.
    coarse = rng.integers(0, 256, (flags.images, 8, 8, 3), dtype=np.uint8)
    images = coarse.repeat(4, axis=1).repeat(4, axis=2) // 2 + rng.integers(0, 64, shape)
    images = images.astype(np.uint8)
    table = Table("data", "images/s", "CPU µs an image")
    memory = Dataset("memory", ArraySource(images, np.zeros(len(images))), 256)
    indices = speed(memory, flags.batch, flags.seconds, indices_only=True)
    table.add("indices, of data in the device's memory", *indices)
    table.add("memory", *speed(memory, flags.batch, flags.seconds))
    with tempfile.TemporaryDirectory() as name:
        os.environ["XDG_CACHE_HOME"] = name  # the cache of decoded images
        for size in (32, 128):
            folder = pathlib.Path(name) / f"{size}"
            folder.mkdir()
            for i, image in enumerate(images[:2000]):
                Image.fromarray(image).resize((size, size)).save(folder / f"{i:05}.png")
            found = image_files.find_unsplit(folder)
            add_files(table, f"folder of {size}×{size} PNG files", found, flags)
    table.show()


if __name__ == "__main__":
    main()
