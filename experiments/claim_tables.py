"""Make the tables and figures of the claim from the rows of its sweeps.

    python -m experiments.claim_tables results/claim_*

reads the rows in each folder, and loss_by_time if it is there, and writes tables.md and figures
beside them; samples.png, of experiments.sample_rows, is shown too. Of several folders, it prints
the differences that answer the paper's claim, the tables of results/README.md.
"""

import argparse
import logging
import math
import pathlib
import sys

import numpy as np

from errors import UserError
from experiments import figures
from experiments.tables import (
    Rows,
    get_difference,
    get_score,
    gradient_table,
    line,
    load_curves,
    load_rows,
    origin,
)
from runtime import environment

log = logging.getLogger("soft_truncation")

_SCORES = (
    ("nll", "NLL"),
    ("nelbo", "NELBO"),
    ("fd_classifier", "distance"),
    ("precision_classifier", "precision"),
    ("recall_classifier", "recall"),
)
_NAMES = {
    "fixed_1e-2": "fixed, ε = 1e-2",
    "fixed_1e-3": "fixed, ε = 1e-3",
    "fixed_1e-4": "fixed, ε = 1e-4",
    "fixed_1e-5": "fixed, ε = 1e-5",
    "soft_k0.8": "soft, k = 0.8",
    "soft_k1": "soft, k = 1",
    "soft_k1.2": "soft, k = 1.2",
    "soft_k1_from_1e-4": "soft, k = 1, from ε = 1e-4",
    "soft_k1_from_1e-3": "soft, k = 1, from ε = 1e-3",
    "soft_k1_from_1e-2": "soft, k = 1, from ε = 1e-2",
    "weight_k1": "equivalent weight, k = 1",
    "weight_k1.2": "equivalent weight, k = 1.2",
    "weight_k1.5": "equivalent weight, k = 1.5",
    "sigmoid": "soft, sigmoid prior",
    "soft_k1_independent": "soft, k = 1, independent times",
    "fixed_1e-5_unclipped": "fixed, ε = 1e-5, gradients not clipped",
    "soft_k1_unclipped": "soft, k = 1, gradients not clipped",
    "weight_k1_unclipped": "equivalent weight, k = 1, gradients not clipped",
}
_FIXED = ("fixed_1e-5", "fixed_1e-4", "fixed_1e-3")
# The tables of results/README.md: {question: ((heading, point, what it is compared with), …)}.
_COMPARISONS = {
    f"{name}, {parametrization}": tuple(
        (
            f"minus that of {_NAMES[other].split(', ')[-1]}",
            f"{parametrization}_{point}",
            f"{parametrization}_{other}",
        )
        for other in _FIXED
    )
    for name, point in (("soft", "soft_k1"), ("weight", "weight_k1"))
    for parametrization in ("noise", "velocity")
} | {
    f"{name} minus weight": tuple(
        (parametrization, f"{parametrization}_{point}", f"{parametrization}_weight_k1")
        for parametrization in ("noise", "velocity")
    )
    for name, point in (("soft", "soft_k1"), ("sigmoid", "sigmoid"))
}
_NOTES = """Less is better but for precision and recall. NLL and NELBO are in bits/dim, with
residual, each at the run's own ε. *distance* is a Fréchet distance between features of a classifier
of the data's labels, no FID. ± is the standard error over seeds; one seed is marked *, and its
error is of the evaluation alone (images or samples). Differences are within seeds; of one seed the
error of NLL and NELBO is that of the images' differences, if the rows have each image's bits, and
that of distances as if the two were independent."""


def best_fixed(rows: Rows, parametrization: str) -> str | None:
    """The fixed truncation with the least NLL on validation images in seed 0; None without rows.

    A row without that NLL is the best only if it is alone.
    """
    found = {}
    for name in ("fixed_1e-2", "fixed_1e-3", "fixed_1e-4", "fixed_1e-5"):
        of_point = rows.get(f"{parametrization}_{name}", [])
        if of_point and of_point[0]["seed"] == 0:
            found[name] = of_point[0]["scores"].get("validation_nll", math.inf)
    return min(found, key=lambda name: found[name]) if found else None


def _table(rows: Rows, parametrization: str) -> list[str]:
    heads = ("", "NLL, validation", *(head for _, head in _SCORES), "seeds")
    lines = [line(*heads), "|" + "---|" * len(heads)]
    for name, label in _NAMES.items():
        of_point = rows.get(f"{parametrization}_{name}", [])
        if of_point:
            names = ("validation_nll", *(score for score, _ in _SCORES))
            scores = [get_score(of_point, score) for score in names]
            lines.append(line(label, *(s or "" for s in scores), len(of_point)))
    return lines


def _differences(rows: Rows, pairs: list[tuple[str, str, str]]) -> list[str]:
    """A line for each (label, point, what it is compared with)."""
    heads = ("", *(head for _, head in _SCORES), "seeds")
    lines = [line(*heads), "|" + "---|" * len(heads)]
    for label, point, other in pairs:
        both = rows.get(other, []), rows.get(point, [])
        scores = [get_difference(*both, name) for name, _ in _SCORES]
        count = max((s.num_seeds for s in scores if s is not None), default=0)
        if count:
            lines.append(line(label, *("" if s is None else f"{s}" for s in scores), count))
    return lines


def _points(rows: Rows, names: dict[str, str]) -> list[figures.Point]:
    return [
        (label, get_score(rows[point], "nll"), get_score(rows[point], "fd_classifier"))
        for point, label in names.items()
        if point in rows
    ]


Losses = dict[str, tuple[dict[int, float], dict[int, float]]]


def _losses(rows: Rows) -> Losses:
    """{parametrization: test losses by step, of soft truncation and its weight, first seed}."""
    losses = {}
    for parametrization in ("noise", "velocity"):
        soft, weight = (
            dict(rows[point][0].get("test_loss", ())) if point in rows else {}
            for point in (f"{parametrization}_soft_k1", f"{parametrization}_weight_k1")
        )
        if soft and weight:
            losses[parametrization] = soft, weight
    return losses


def _speeds(rows: Rows) -> dict[str, list[float]]:
    """{parametrization: of each seed, how many times as early the weight has soft's last loss}."""
    speeds = {}
    for parametrization in ("noise", "velocity"):
        runs = [rows.get(f"{parametrization}_{point}", []) for point in ("soft_k1", "weight_k1")]
        softs, weights = ({row["seed"]: dict(row.get("test_loss", ())) for row in r} for r in runs)
        steps = {
            seed: (max(soft), _step_of(weights[seed], soft[max(soft)]))
            for seed, soft in softs.items()
            if soft and weights.get(seed)
        }
        speeds[parametrization] = [last / same for last, same in steps.values() if same]
    return {name: of_seeds for name, of_seeds in speeds.items() if len(of_seeds) > 1}


def _step_of(losses: dict[int, float], loss: float) -> float | None:
    """The step, interpolated in its logarithm, by which a run had a loss; None if unknown."""
    steps, values = np.array(list(losses)), np.minimum.accumulate(list(losses.values()))
    if not values[-1] <= loss <= values[0]:
        return None
    return float(np.exp(np.interp(-loss, -values, np.log(steps))))


def _loss_table(losses: Losses) -> list[str]:
    """Test losses of soft truncation and of its equivalent weight after 2^-j of all steps."""
    lines = [line("", "step", "soft", "weight", "soft's after this step of the weight's")]
    lines.append("|" + "---|" * 5)
    for parametrization, (soft, weight) in losses.items():
        for step in (step for step in soft if math.log2(max(soft) / step).is_integer()):
            same = _step_of(weight, soft[step])
            cells = (f"{soft[step]:.4f}", f"{weight[step]:.4f}", f"{same:.0f}" if same else "")
            lines.append(line(parametrization, step, *cells))
    return lines


def write_tables(folder: pathlib.Path) -> None:
    """Write tables.md and its figures; UserError if there are no rows or they don't compare."""
    rows = load_rows(folder)
    every = [row for of_point in rows.values() for row in of_point]
    first = every[0]
    text = [f"# {first['sweep']}", ""]
    if not any(point.split("_", 1)[-1] in _NAMES for point in rows):
        raise UserError(f"{folder}/rows has no row of a point of experiments.claim")
    text += [
        origin(rows),
        "",
        _NOTES,
    ]
    series = {}
    both = ("noise", "velocity")
    parametrizations = [name for name in both if any(point.startswith(name) for point in rows)]
    for parametrization in parametrizations:
        best = best_fixed(rows, parametrization)
        text += ["", f"## The network predicts the {parametrization}", ""]
        text += _table(rows, parametrization)
        if best:
            point = f"{parametrization}_{best}"
            compared = "validation_nll" in rows[point][0]["scores"]
            which = "the best fixed ε by validation NLL" if compared else "the only fixed ε here"
            text += ["", f"Less {_NAMES[best]}, {which}:", ""]
            others = [name for name in _NAMES if name != best]
            text += _differences(
                rows, [(_NAMES[n], f"{parametrization}_{n}", point) for n in others]
            )
        for kind in ("fixed", "soft", "equivalent weight"):
            short = {
                f"{parametrization}_{n}": label.split(", ")[1]
                for n, label in _NAMES.items()
                if label.startswith(f"{kind}, ") and label.count(",") == 1 and " = " in label
            }
            if points := _points(rows, short):
                series[f"{parametrization}, {kind}"] = points
    if len(parametrizations) > 1:
        text += ["", "## Velocity less noise", ""]
        text += _differences(
            rows, [(label, f"velocity_{n}", f"noise_{n}") for n, label in _NAMES.items()]
        )
    pairs = [
        ("soft, k = 1, less its equivalent weight", "soft_k1", "weight_k1"),
        ("soft, k = 1, less fixed, ε = 1e-5", "soft_k1", "fixed_1e-5"),
        ("equivalent weight, k = 1, less fixed, ε = 1e-5", "weight_k1", "fixed_1e-5"),
    ]
    pairs += [
        (f"{label}, gradients not clipped", f"{a}_unclipped", f"{b}_unclipped")
        for label, a, b in pairs
    ]
    pairs += [("stratified times less independent", "soft_k1", "soft_k1_independent")]
    text += ["", "## Drawing or weighing, stratified or not", ""]
    text += _differences(
        rows,
        [
            (f"{parametrization}: {label}", f"{parametrization}_{a}", f"{parametrization}_{b}")
            for parametrization in parametrizations
            for label, a, b in pairs
        ],
    )
    if losses := _losses(rows):
        title = "Test loss by step: drawing or weighing, k = 1, first seed"
        figures.draw_losses(
            title,
            {
                f"{parametrization}, {label}": of_run
                for parametrization, pair in losses.items()
                for label, of_run in zip(("soft", "equivalent weight"), pair, strict=True)
            },
            folder / "losses.png",
        )
        text += ["", f"## {title}", ""]
        text += ["The same expectation, of the same images and noise, with EMA weights.", ""]
        text += [*_loss_table(losses), ""]
        for parametrization, speeds in _speeds(rows).items():
            shown = ", ".join(f"{speed:.2f}" for speed in speeds)
            text += [f"The {parametrization}: the weight is {shown} times as early, by seed.", ""]
        text += [f"![{title}](losses.png)"]
    if series and len(rows) > 2:
        figures.draw_tradeoff("Likelihood against samples", series, folder / "tradeoff.png")
        text += ["", "![Likelihood against samples](tradeoff.png)"]
    if curves := load_curves(folder):
        figures.draw_times(curves, folder / "times.png")
        text += ["", "## Loss and gradient by diffusion time", "", *gradient_table(curves)]
        text += ["", "![Loss and gradient by diffusion time](times.png)"]
    if (folder / "samples.png").exists():
        text += ["", "## Samples, each point's first seed, from the same noise", ""]
        text += ["![Samples](samples.png)"]
    (folder / "tables.md").write_text("\n".join(text) + "\n")


def get_comparisons(folders: list[pathlib.Path]) -> str:
    """The tables of results/README.md: differences of points, with a line for each folder."""
    every = [load_rows(folder) for folder in folders]
    text = []
    for question, columns in _COMPARISONS.items():
        heads = [f"{score}, {head}" for head, *_ in columns for score in ("NLL", "distance")]
        lines = [line(question, *heads), "|" + "---|" * (len(heads) + 1)]
        for rows in every:
            row = next(iter(rows.values()))[0]
            differences = [
                get_difference(rows.get(other, []), rows.get(point, []), score)
                for _, point, other in columns
                for score in ("nll", "fd_classifier")
            ]
            if any(differences):
                cells = ["" if d is None else f"{'+' * (d.value > 0)}{d}" for d in differences]
                lines.append(line(_label(row["sweep"], row["steps"]), *cells))
        if len(lines) > 2:
            text.append("\n".join(lines))
    return "\n\n".join(text)


def _label(sweep: str, steps: int) -> str:
    """The name of a sweep's line: its images, and its steps."""
    images = {"claim_photographs": "photographs", "claim_fashion_mnist": "Fashion-MNIST, 16×16"}
    large = "Fashion-MNIST, 32×32" if sweep.startswith("claim_fashion_mnist_32") else sweep
    return f"{images.get(sweep, large)}, {steps:,} steps"


def main() -> int:
    """Make the tables of the folders that the command line names; returns the exit status."""
    parser = argparse.ArgumentParser(prog="experiments.claim_tables")
    parser.add_argument(
        "folders", type=pathlib.Path, nargs="+", help="each the --out of experiments.run"
    )
    folders = parser.parse_args().folders
    environment.prepare()
    log.setLevel(logging.INFO)
    try:
        for folder in folders:
            write_tables(folder)
            log.info("wrote %s", folder / "tables.md")
        if len(folders) > 1:
            print(get_comparisons(folders))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
