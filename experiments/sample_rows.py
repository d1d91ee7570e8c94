"""Draw samples of several trained models beside real images, a row for each.

    python -m experiments.sample_rows OUT.png WORKDIR… [--images FOLDER]

The samplers are those of the models' configs, the noise is the same for all models; the labels are
the workdirs' names. The first row is of the images of FOLDER, which `--mode train` could read.
"""

import argparse
import pathlib
import sys

import jax
import matplotlib
import numpy as np

import datasets
from batched_sampling import get_sampler
from build import set_up
from configs import saved
from errors import UserError
from runtime import checkpointing, environment
from runtime.pictures import image_grid

matplotlib.use("Agg")
import matplotlib.pyplot as plt

_SCALE = 2  # pixels of the picture for each of an image


def main(arguments: list[str] | None = None) -> int:
    """Draw the rows of the models that the command line names; returns the exit status."""
    parser = argparse.ArgumentParser(prog="experiments.sample_rows", description=__doc__)
    parser.add_argument("out", type=pathlib.Path, help="the picture, .png")
    parser.add_argument("workdirs", type=pathlib.Path, nargs="+", help="runs or exported models")
    parser.add_argument("--images", help="a folder of real images")
    parser.add_argument("--columns", type=int, default=16)
    options = parser.parse_args(arguments)
    environment.prepare()
    rows: dict[str, np.ndarray] = {}
    try:
        for workdir in options.workdirs:
            config = saved.get_config(workdir)
            setup = set_up(config)
            if options.images and not rows:
                config.data.path = options.images
                images = datasets.get_dataset(config, "test")
                rows["real images"] = datasets.in_order(images, options.columns)["image"]
            state = checkpointing.restore_latest(config, workdir, setup.state_shape)
            draw = get_sampler(setup, options.columns)
            rows[workdir.name] = np.asarray(draw(state.ema_params, jax.random.key(0)).levels)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    grid = image_grid(np.concatenate(list(rows.values())).astype(np.uint8), options.columns)
    height, width = _SCALE * grid.shape[0], _SCALE * grid.shape[1]
    figure = plt.figure(figsize=(width / 100 + 1.8, height / 100), dpi=100)
    axes = figure.add_axes((1.8 / (width / 100 + 1.8), 0, width / (width + 180), 1))
    axes.imshow(grid.squeeze(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes.set_yticks((np.arange(len(rows)) + 0.5) * grid.shape[0] / len(rows), list(rows))
    axes.set_xticks([])
    axes.tick_params(length=0, labelsize=9)
    axes.set_frame_on(False)
    figure.savefig(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
