"""Grids of images, folders of PNG files, and the plot of the training losses."""

import concurrent.futures
import contextlib
import io
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from PIL import Image

from configs.errors import UserError
from runtime.files import replacing, write_text
from runtime.metrics_log import read_metrics


def image_grid(images: np.ndarray, columns: int = 0) -> np.ndarray:
    """One nearly square picture (…, …, C) of images (N, H, W, C) uint8; small ones are enlarged."""
    count, height, width, channels = images.shape
    columns = columns or int(np.ceil(np.sqrt(count * height / width)))
    rows = -(-count // columns)
    factor = max(1, 48 // height)
    images = images.repeat(factor, axis=1).repeat(factor, axis=2)
    gap = 2
    canvas = np.full(
        (rows * (height * factor + gap) + gap, columns * (width * factor + gap) + gap, channels),
        128,
        np.uint8,
    )
    for i, image in enumerate(images):
        top = gap + (i // columns) * (height * factor + gap)
        left = gap + (i % columns) * (width * factor + gap)
        canvas[top : top + height * factor, left : left + width * factor] = image
    return canvas


def save_grid(images: np.ndarray, path: pathlib.Path, columns: int = 0) -> None:
    """Write the `image_grid` of images to a file."""
    canvas = image_grid(images, columns)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        _as_picture(canvas).save(file, format="png")


def save_animation(frames: np.ndarray, path: pathlib.Path) -> None:
    """Write a GIF whose frames are grids of images (F, N, H, W, C) uint8; the last one stays."""
    first, *others = (_as_picture(image_grid(images)) for images in frames)
    times = [120] * len(others) + [2000]  # ms
    with replacing(path) as file:
        first.save(file, "gif", save_all=True, append_images=others, duration=times, loop=0)


def _as_picture(image: np.ndarray) -> Image.Image:
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def start_png_folder(folder: pathlib.Path, source: dict[str, Any]) -> set[int]:
    """Make a folder for numbered PNG files, or check that an existing one can be completed.

    Args:
      folder: its path.
      source: what the images depend on in addition to their index; recorded in source.json.

    Returns:
      The indices of the images that are there.

    Raises:
      UserError: the folder has images from another source.
    """
    present = {int(path.stem) for path in folder.glob("*.png") if path.stem.isdecimal()}
    record, text = folder / "source.json", json.dumps(source, indent=1, default=list)
    if present and not (record.is_file() and record.read_text() == text):
        raise UserError(
            f"{folder} has images of other weights, another seed or other settings; move it away"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".*.part"):
        left.unlink()
    write_text(record, text)
    return present


@contextlib.contextmanager
def png_writer(folder: pathlib.Path) -> Iterator[Callable[[int, np.ndarray], None]]:
    """A function (start, images) that writes images as PNG files in threads, in the background.

    Images (N, H, W, C) uint8 have the indices start … start + N - 1. Each file is written
    completely or not at all. A call waits for the files of the call before, and raises their
    errors; when the context ends, all files are written.
    """
    pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count())
    writing: list[concurrent.futures.Future[None]] = []

    def write_one(index: int, image: np.ndarray) -> None:
        data = io.BytesIO()
        _as_picture(image).save(data, format="png")
        with replacing(folder / _png_name(index), sync=False) as file:
            file.write(data.getvalue())

    def settle() -> None:
        while writing:
            writing.pop().result()

    def write(start: int, images: np.ndarray) -> None:
        settle()
        writing.extend(pool.submit(write_one, i, image) for i, image in enumerate(images, start))

    try:
        yield write
        settle()
    finally:
        pool.shutdown(cancel_futures=True)


def _png_name(index: int) -> str:
    return f"{index:08}.png"


def write_labels(folder: pathlib.Path, labels: np.ndarray) -> None:
    """Write the labels of the PNG files 0, 1, … as dataset.json, which `data.path` reads."""
    pairs = [[_png_name(i), int(label)] for i, label in enumerate(labels)]
    write_text(folder / "dataset.json", json.dumps({"labels": pairs}))


def read_pngs(folder: pathlib.Path, count: int) -> np.ndarray:
    """The PNG files 0 … count - 1, (count, H, W, C) uint8."""
    images = np.stack([np.asarray(Image.open(folder / _png_name(i))) for i in range(count)])
    return images[..., None] if images.ndim == 3 else images


def plot_training(metrics: pathlib.Path, path: pathlib.Path) -> None:
    """Plot the losses of a metrics.jsonl file against the steps, as a PNG file."""
    if metrics.exists():
        plot_curves({"": read_metrics(metrics)}, path)


def plot_curves(runs: Mapping[str, list[dict[str, Any]]], path: pathlib.Path) -> None:
    """Plot the losses of runs, by their names, against the steps, as a PNG file."""
    from matplotlib.figure import Figure  # not pyplot, which would show it in a notebook

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for run, rows in runs.items():
        for name, what in (("loss", "training batches"), ("test_loss", "test images, EMA weights")):
            points = [(r["step"], r[name]) for r in rows if name in r]
            label, marker = f"{run}: {what}" if run else what, "." if len(points) < 20 else ""
            if points:
                axes.plot(*zip(*points, strict=True), label=label, marker=marker)
    axes.set(xlabel="step", ylabel="loss", yscale="log", title="Training")
    axes.grid(alpha=0.3, which="both")
    if axes.lines:
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=120)
