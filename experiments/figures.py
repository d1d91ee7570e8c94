r"""Draw figures from the rows of sweeps, and samples of their runs.

    python -m experiments.figures scores OUT.png results/photographs_16.jsonl \
        --series 'noise, fixed=noise_fixed' 'noise, soft=noise_soft_k[\d.]+$'
    python -m experiments.figures losses OUT.png results/photographs_16.jsonl \
        --series 'soft=velocity_soft_k1$' 'weight=velocity_weight_k1$'
    python -m experiments.figures samples OUT.png WORKDIR… [--images FOLDER]

`scores` plots one score against another, a line for each series: a name and a regular expression
that points' names begin with. `losses` plots the first seed's loss on test images by training step.
`samples` draws a row of samples for each run or exported model, from the same noise by the sampler
of its config, below real images of FOLDER, which `--mode train` could read.
"""

import argparse
import pathlib
import re
import sys
from typing import Any

import jax
import matplotlib
import numpy as np

import datasets
from build import set_up
from configs import saved
from configs.errors import UserError
from data.batches import in_order
from experiments.rows import Row, read_sweep
from experiments.tables import SCORES, get_score, label
from metrics.batched_sampling import get_sampler
from runtime import checkpointing, environment
from runtime.pictures import image_grid

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator

_UNITS = {"nll": "NLL, bits/dim", "nelbo": "NELBO, bits/dim", "fd_classifier": "Fréchet distance"}
_SCALE = 2  # pixels of the picture for each of a sample

Series = dict[str, list[list[Row]]]  # {name in the legend: rows of each of its points}


def get_series(sweep: dict[str, list[Row]], texts: list[str]) -> Series:
    """The points of each series "name=regular expression"; of all points without texts.

    Raises:
      UserError: a series has no points.
    """
    series: Series = {}
    for text in texts or ["points=.*"]:
        name, _, pattern = text.partition("=")
        try:
            series[name] = [rows for point, rows in sweep.items() if re.match(pattern, point)]
        except re.error as error:
            raise UserError(f"--series {text!r}: no regular expression ({error})") from error
        if not series[name]:
            raise UserError(f"--series {text!r}: no point's name begins so; name=expression")
    return series


def draw_scores(axes: Axes, series: Series, x: str, y: str) -> None:
    """Plot the score y against x, with the errors over seeds."""
    for i, (name, points) in enumerate(series.items()):
        scores = [(rows[0]["point"], get_score(rows, x), get_score(rows, y)) for rows in points]
        known = [(point, a, b) for point, a, b in scores if a and b]
        values = [a.value for _, a, _ in known], [b.value for *_, b in known]
        x_errors, y_errors = (
            [(score.error or 0) if score.num_seeds > 1 else 0 for score in of]
            for of in ([a for _, a, _ in known], [b for *_, b in known])
        )
        style: dict[str, Any] = {"marker": "osD"[i % 3], "color": f"C{i}", "elinewidth": 0.8}
        axes.errorbar(*values, y_errors, x_errors, label=name, **style)
        offset, align = (((5, 4), "left"), ((5, -11), "left"), ((-5, -11), "right"))[i % 3]
        for point, a, b in known:
            short = re.split(r"(?=[kε] = )", label(point), maxsplit=1)[-1]
            text = axes.annotate(short, (a.value, b.value), offset, textcoords="offset points")
            text.set(ha=align, color=f"C{i}", fontsize=8)
    axes.set(xlabel=_UNITS.get(x, SCORES.get(x, x)), ylabel=_UNITS.get(y, SCORES.get(y, y)))
    axes.margins(0.12, 0.08)


def draw_losses(axes: Axes, series: Series) -> None:
    """Plot the first seed's loss on test images by training step."""
    for name, points in series.items():
        for rows in points:
            steps = np.array(rows[0].get("test_loss") or np.zeros((0, 2)))
            axes.plot(*steps.T, marker="o", markersize=3, label=name)
    axes.set(xlabel="training step", ylabel="loss on test images, EMA weights", xscale="log")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.xaxis.set_major_formatter("{x:g}")


def draw(options: argparse.Namespace) -> None:
    """Draw the scores or losses of a file of rows."""
    series = get_series(read_sweep(options.rows), options.series)
    figure, axes = plt.subplots(figsize=(6.5, 4.2), layout="constrained")
    if options.what == "scores":
        draw_scores(axes, series, options.x, options.y)
    else:
        draw_losses(axes, series)
    axes.set_yscale("log")
    axes.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(options.out, dpi=100)
    plt.close(figure)


def draw_samples(options: argparse.Namespace) -> None:
    """Draw a row of samples for each workdir, with the workdirs' names."""
    rows: dict[str, np.ndarray] = {}
    for workdir in options.workdirs:
        config = saved.get_config(workdir)
        setup = set_up(config)
        if options.images and not rows:
            config.data.path = options.images
            images = datasets.get_dataset(config, "test")
            rows["real images"] = in_order(images, options.columns)["image"]
        state = checkpointing.restore_latest(config, workdir, setup.state_shape)
        sample = get_sampler(setup, options.columns)
        rows[workdir.name] = np.asarray(sample(state.ema_params, jax.random.key(0)).levels)
    grid = image_grid(np.concatenate(list(rows.values())).astype(np.uint8), options.columns)
    height, width = _SCALE * grid.shape[0] / 100, _SCALE * grid.shape[1] / 100
    figure = plt.figure(figsize=(width + 1.8, height), dpi=100)
    axes = figure.add_axes((1.8 / (width + 1.8), 0, width / (width + 1.8), 1))
    axes.imshow(grid.squeeze(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes.set_yticks((np.arange(len(rows)) + 0.5) * grid.shape[0] / len(rows), list(rows))
    axes.set_xticks([])
    axes.tick_params(length=0, labelsize=9)
    axes.set_frame_on(False)
    figure.savefig(options.out)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    """Draw the figure that the command line asks for; returns the exit status."""
    parser = argparse.ArgumentParser(prog="experiments.figures", description="Draw a figure.")
    commands = parser.add_subparsers(dest="what", required=True)
    for what in ("scores", "losses", "samples"):
        command = commands.add_parser(what)
        command.add_argument("out", type=pathlib.Path, help="the picture, .png")
        if what == "samples":
            command.add_argument("workdirs", type=pathlib.Path, nargs="+", help="runs or models")
            command.add_argument("--images", help="a folder of real images")
            command.add_argument("--columns", type=int, default=16)
        else:
            command.add_argument("rows", type=pathlib.Path, help="the --out of experiments.run")
            command.add_argument("--series", nargs="+", default=[], help="name=expression")
        if what == "scores":
            command.add_argument("--x", default="nll")
            command.add_argument("--y", default="fd_classifier")
    options = parser.parse_args(arguments)
    environment.prepare()
    try:
        draw_samples(options) if options.what == "samples" else draw(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
