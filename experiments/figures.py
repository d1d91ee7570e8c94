"""The figures of experiments.tables, as PNG files."""

import dataclasses
import math
import pathlib
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullLocator

_AXES = ("NLL with residual (bits/dim)", "Fréchet distance, classifier")
_COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown")


@dataclasses.dataclass(frozen=True)
class Score:
    """A score with its standard error.

    Attributes:
      value: the mean over seeds.
      error: the standard error over seeds, or of the evaluation if there is one seed; None if it is
        not known.
      num_seeds: the number of seeds.
    """

    value: float
    error: float | None
    num_seeds: int

    def __str__(self) -> str:
        """The cell of a table, with the error's first two digits, but four decimals at most."""
        star = "" if self.num_seeds > 1 else "*"
        if self.error is None:
            return f"{self.value:.3f}{star}"
        digits = 1 - math.floor(math.log10(self.error)) if self.error else 4
        decimals = min(max(digits, 0), 4)
        return f"{self.value:.{decimals}f} ± {self.error:.{decimals}f}{star}"


Point = tuple[str, Score | None, Score | None]  # label, NLL, Fréchet distance


def _known(scores: list[Score | None]) -> tuple[list[int], list[float], list[float]]:
    """(indices, values, standard errors) of the scores that are not None."""
    known = [(i, score) for i, score in enumerate(scores) if score is not None]
    return [i for i, _ in known], [s.value for _, s in known], [s.error or 0 for _, s in known]


def _save(figure: Any, path: pathlib.Path) -> None:
    figure.savefig(path, dpi=100)
    plt.close(figure)


def draw_curve(title: str, points: list[Point], path: pathlib.Path) -> None:
    """Plot both scores against ε or k, with standard errors; labels are "name = value"."""
    figure, panels = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    name = points[0][0].split(" = ")[0]
    labels = [label.split(" = ")[1] for label, *_ in points]
    for place, axes in enumerate(panels):
        x, values, errors = _known([(nll, distance)[place] for _, nll, distance in points])
        axes.errorbar(x, values, errors, marker="o", capsize=3, color=_COLOURS[place])
        axes.set(
            xticks=range(len(labels)),
            xticklabels=[label.replace(" ", "\n") for label in labels],
            xlabel={"ε": "smallest time ε of training", "k": "exponent k of the prior on τ"}[name],
            ylabel=_AXES[place],
            xlim=(-0.4, len(labels) - 0.6),
        )
        axes.grid(alpha=0.3)
    figure.suptitle(title, fontsize=11)
    _save(figure, path)


def draw_tradeoff(title: str, series: dict[str, list[Point]], path: pathlib.Path) -> None:
    """Plot Fréchet distance against NLL, a line for each series, with the errors over seeds."""
    figure, axes = plt.subplots(figsize=(6.5, 4.2), layout="constrained")
    for i, (name, points) in enumerate(series.items()):
        known = [(label, x, y) for label, x, y in points if x is not None and y is not None]
        x, y = [x for _, x, _ in known], [y for *_, y in known]
        errors = [[s.error or 0 if s.num_seeds > 1 else 0 for s in of] for of in (x, y)]
        axes.errorbar(
            [s.value for s in x],
            [s.value for s in y],
            errors[1],
            errors[0],
            marker="osD"[i % 3],
            color=_COLOURS[i],
            elinewidth=0.8,
            label=name,
        )
        place, align = (((5, 4), "left"), ((5, -11), "left"), ((-5, -11), "right"))[i % 3]
        for label, nll, distance in known:
            axes.annotate(
                label,
                (nll.value, distance.value),
                place,
                textcoords="offset points",
                ha=align,
                color=_COLOURS[i],
                fontsize=8,
            )
    axes.set(
        xlabel=f"{_AXES[0]}: less is better",
        ylabel=f"{_AXES[1]}: less is better",
        yscale="log",
    )
    axes.margins(0.12, 0.08)
    axes.grid(alpha=0.3, which="both")
    axes.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.legend()
    figure.suptitle(title, fontsize=11)
    _save(figure, path)


def draw_losses(title: str, losses: dict[str, dict[int, float]], path: pathlib.Path) -> None:
    """Plot the test losses of runs against the step; {label: {step: loss}}."""
    figure, axes = plt.subplots(figsize=(6.5, 3.6), layout="constrained")
    for i, (label, of_run) in enumerate(losses.items()):
        x, y = list(of_run), list(of_run.values())
        axes.plot(x, y, marker="osD"[i % 3], markersize=4, color=_COLOURS[i], label=label)
    axes.set(xscale="log", yscale="log", xlabel="step", ylabel="loss on test images, EMA weights")
    steps = sorted({step for of_run in losses.values() for step in of_run})
    halves = [step for step in steps if math.log2(steps[-1] / step).is_integer()]
    axes.set_xticks(halves, map(str, halves))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:.2f}")
    axes.yaxis.set_minor_formatter("{x:.2f}")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.suptitle(title, fontsize=11)
    _save(figure, path)


def draw_pairs(title: str, points: list[Point], path: pathlib.Path) -> None:
    """Plot both scores of pairs, a row for each pair; labels are "group: kind"."""
    groups = list(dict.fromkeys(label.split(": ")[0] for label, *_ in points))
    kinds = list(dict.fromkeys(label.split(": ")[1] for label, *_ in points))
    height = 1.5 + 0.45 * len(groups)
    figure, panels = plt.subplots(1, 2, figsize=(8, height), sharey=True, layout="constrained")
    for place, axes in enumerate(panels):
        for i, kind in enumerate(kinds):
            chosen = [point for point in points if point[0].split(": ")[1] == kind]
            x, values, errors = _known([(nll, distance)[place] for _, nll, distance in chosen])
            rows = [groups.index(chosen[j][0].split(": ")[0]) + 0.12 * (2 * i - 1) for j in x]
            style = {"fmt": "os"[i % 2], "color": _COLOURS[i], "capsize": 3}
            axes.errorbar(values, rows, xerr=errors, label=kind, **style)
        axes.set(xlabel=_AXES[place], ylim=(len(groups) - 0.5, -0.5))
        axes.set_yticks(range(len(groups)), groups)
        axes.locator_params(axis="x", nbins=6)
        axes.grid(alpha=0.3)
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=2,
        fontsize=9,
    )
    figure.suptitle(title, fontsize=11)
    _save(figure, path)


def _by_time(axes: Axes, curves: list[dict[str, Any]], name: str, deviation: str) -> None:
    for colour, curve in zip(_COLOURS, curves, strict=False):
        rows = [row for row in curve["by_time"] if row[name] is not None]
        t, values = (np.array([row[key] for row in rows]) for key in ("t", name))
        axes.plot(t, values, color=colour, label=curve["run"])
        if deviation:
            spread = np.sqrt([row[deviation] for row in rows])
            axes.plot(t, spread, color=colour, linestyle=":")
    axes.set(xscale="log", xlabel="diffusion time t")
    axes.grid(alpha=0.3)


def draw_times(curves: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Plot losses, gradient and share of steps against t, with a colour for each run."""
    figure, panels = plt.subplots(2, 2, figsize=(8, 5.5), sharex=True, layout="constrained")
    for axes, name, deviation, label in (
        (panels[0, 0], "plain_loss", "plain_loss_variance", "loss at t, times λ(t), per dimension"),
        (panels[0, 1], "trained_loss", "trained_loss_variance", "what training adds up at t"),
        (panels[1, 0], "grad_norm", "grad_variance", "gradient of the latter, norm"),
        (panels[1, 1], "share_of_steps", "", "share of steps with τ ≤ t"),
    ):
        _by_time(axes, curves, name, deviation)
        axes.set_ylabel(label)
        if deviation:
            axes.set_yscale("log")
    panels[1, 1].set_ylim(0, 1.05)
    for axes in panels[0]:
        axes.set_xlabel("")
    figure.legend(
        *panels[0, 0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=3,
        fontsize=9,
    )
    figure.suptitle(
        "Solid: mean. Dotted: standard deviation (of images; of mini-batches)", fontsize=11
    )
    _save(figure, path)
