"""Gaussian random fields of a known spectrum, to try arrays as a data set.

    python -m experiments.random_fields make FIELDS.npy
    python -m experiments.random_fields plot FIELDS.npy SAMPLES.npz PICTURE.png

The first writes 4,000 periodic fields of 24×40 float32 with mean 280, standard deviation 15 and
power k⁻³, and prints their entropy, which no model's bits/dim can be below. The second draws the
spectra of samples, of test examples and the true one, and four fields of each.
"""

import argparse
import math
import pathlib

import numpy as np

SHAPE, MEAN, STD, SLOPE = (24, 40), 280.0, 15.0, 3.0


def power() -> np.ndarray:
    """The variance of each mode of the unitary Fourier transform, (H, W)."""
    height, width = SHAPE
    k = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width))
    k[0, 0] = 1 / width  # so that the mean varies as the longest wave does
    shape = k**-SLOPE
    return shape * (STD**2 / shape.mean())


def fields(count: int) -> np.ndarray:
    """`count` fields, (count, H, W) float32."""
    white = np.random.default_rng(0).normal(size=(count, *SHAPE))
    colored = np.fft.ifft2(np.fft.fft2(white) * np.sqrt(power())).real
    return (MEAN + colored).astype(np.float32)


def entropy_in_bits() -> float:
    """The differential entropy a value: the mean of ½ log₂ 2πe P over the modes."""
    return float(np.mean(np.log2(2 * math.pi * math.e * power()) / 2))


def spectrum(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean power of the modes in rings of the wave number k: (k, power) of 12 rings."""
    modes = np.abs(np.fft.fft2(images - MEAN, norm="ortho")) ** 2
    return _rings(modes.mean(axis=0))


def _rings(modes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    k = np.hypot(np.fft.fftfreq(SHAPE[0])[:, None], np.fft.fftfreq(SHAPE[1]))
    edges = np.geomspace(1 / 41, 0.5, 13)
    ring = np.digitize(k, edges)
    kept = [i for i in range(1, 13) if (ring == i).any()]
    return (
        np.array([k[ring == i].mean() for i in kept]),
        np.array([modes[ring == i].mean() for i in kept]),
    )


def plot(real: np.ndarray, samples: np.ndarray, path: pathlib.Path) -> None:
    """Write the picture, and print the spectra."""
    from matplotlib.figure import Figure

    k, drawn = spectrum(samples)
    of_data, true = spectrum(real)[1], _rings(power())[1]
    figure = Figure(figsize=(9, 4), layout="constrained")
    grid = figure.add_gridspec(4, 4)
    axes = figure.add_subplot(grid[:, :2])
    axes.loglog(k, true, color="black", label="true")
    axes.loglog(k, of_data, "o", markerfacecolor="none", label=f"{len(real)} test examples")
    axes.loglog(k, drawn, "x", label=f"{len(samples)} samples")
    axes.set(xlabel="wave number k [1/pixel]", ylabel="power")
    axes.legend()
    for column, (images, title) in enumerate(((real, "test examples"), (samples, "samples"))):
        for row in range(4):
            picture = figure.add_subplot(grid[row, 2 + column])
            picture.imshow(images[row], vmin=MEAN - 3 * STD, vmax=MEAN + 3 * STD)
            picture.axis("off")
            if row == 0:
                picture.set_title(title)
    figure.savefig(path, dpi=110)
    print("| k | true | test examples | samples | samples / true |\n|---|---|---|---|---|")
    for values in zip(k, true, of_data, drawn, drawn / true, strict=True):
        print("| " + " | ".join(f"{value:.3g}" for value in values) + " |")


def main() -> None:
    """Make the fields, or plot their spectra."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("make").add_argument("fields", type=pathlib.Path)
    plotter = commands.add_parser("plot")
    for name in ("fields", "samples", "picture"):
        plotter.add_argument(name, type=pathlib.Path)
    flags = parser.parse_args()
    if flags.command == "make":
        np.save(flags.fields, fields(4000))
        print(f"entropy: {entropy_in_bits():.4f} bits a value")
        return
    with np.load(flags.samples) as file:
        samples = file["samples"][..., 0]
    plot(np.load(flags.fields)[9::10], samples, flags.picture)


if __name__ == "__main__":
    main()
