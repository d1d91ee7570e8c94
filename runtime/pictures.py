"""Grids of images, and the plot of the training losses."""

import pathlib

import numpy as np
from PIL import Image

from runtime.metrics_log import read_metrics


def image_grid(images: np.ndarray, columns: int = 0) -> np.ndarray:
    """One near-square picture (…, …, C) of images (N, H, W, C) uint8; small ones are enlarged."""
    count, height, width, channels = images.shape
    columns = columns or int(np.ceil(np.sqrt(count)))
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
    Image.fromarray(canvas[..., 0] if canvas.shape[-1] == 1 else canvas).save(path)


def plot_training(metrics: pathlib.Path, path: pathlib.Path) -> None:
    """Plot the losses of a metrics.jsonl file against the steps, as a PNG file."""
    from matplotlib.figure import Figure  # not pyplot, which would show it in a notebook

    if not metrics.exists():
        return
    rows = read_metrics(metrics)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, label in (("loss", "training batches"), ("test_loss", "test images, EMA weights")):
        points = [(r["step"], r[name]) for r in rows if name in r]
        if points:
            axes.plot(
                *zip(*points, strict=True), label=label, marker="." if len(points) < 20 else ""
            )
    axes.set(xlabel="step", ylabel="loss", yscale="log", title="Training")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
