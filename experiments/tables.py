"""Make tables and figures from the rows of a sweep.

    python -m experiments.tables results/digits

reads results/digits/rows and loss_by_time, and writes tables.md and a PNG file for each table that
has rows. Runs without a row are left out of figures and are marked "not run" in tables.
"""

import argparse
import json
import logging
import pathlib
import re
import sys
from typing import Any

import numpy as np

from errors import UserError
from experiments import figures
from experiments.figures import Score
from experiments.grid import TABLES
from metrics.distances import Estimate
from runtime import environment

log = logging.getLogger("soft_truncation")

# (score in a report, heading of its column).
SCORES = (
    ("nll", "NLL, bits/dim"),
    ("nll_without_residual", "NLL without residual"),
    ("nelbo", "NELBO"),
    ("fd_classifier", "fd_classifier"),
)
_TITLES = {
    "a": "Fixed truncation ε (VP, likelihood weighting)",
    "b": "Soft truncation by the prior's exponent k (VP, likelihood weighting)",
    "c": "Soft truncation on and off",
    "d": "Soft truncation and the equivalent weight (VP)",
}
_TRADEOFF = "Likelihood against samples (VP, likelihood weighting)"
_NOTES = """± is the standard error: over seeds where there are two or more; where there is
one, marked *, of the evaluation alone (over test images and their noise, or over samples), which
says nothing of another training. NLL and NELBO are with the residual and at each run's own ε, which
bounds the likelihood whatever ε is; NLL without residual does not compare rows of different ε.
fd_classifier is a Fréchet distance between features of a small classifier, no FID; its bias by the
number of samples is the same in all rows. Less is better everywhere."""

Rows = dict[str, list[dict[str, Any]]]  # {point: its rows, ordered by seed}


def load_rows(folder: pathlib.Path) -> Rows:
    """Read the rows of a sweep.

    Raises:
      UserError: there are none, one can't be read, or their scores are not comparable.
    """
    rows: Rows = {}
    for path in sorted((folder / "rows").glob("*.json")):
        try:
            row = json.loads(path.read_text())
            _ = row["sweep"], row["seed"], row["scores"]
            rows.setdefault(row["point"], []).append(row)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is no row of a sweep ({error}); delete it") from error
    if not rows:
        raise UserError(f"{folder}/rows has no rows; python -m experiments.run makes them")
    every = [row for of_point in rows.values() for row in of_point]

    def solver(scores: dict[str, Any]) -> str | None:
        if scores.get("nll_steps"):
            return f"{scores['nll_nfe']:.0f} evaluations"
        return "adaptive" if "rtol" in scores else None

    for name, kinds in (
        ("sweep", {row["sweep"] for row in every}),
        ("NLL solver", {solver(row["scores"]) for row in every} - {None}),
        ("classifier", {row["scores"].get("classifier_weights") for row in every} - {None}),
    ):
        if len(kinds) > 1:
            names = ", ".join(sorted(str(kind) for kind in kinds))
            raise UserError(
                f"{folder}/rows are of more than one {name} ({names}), whose "
                "scores don't compare; keep those of one"
            )
    return {point: sorted(of_point, key=lambda r: r["seed"]) for point, of_point in rows.items()}


def get_score(rows: list[dict[str, Any]], name: str) -> Score | None:
    """A score of a point, from its rows; None if no row has it."""
    values = [row["scores"][name] for row in rows if name in row["scores"]]
    if not values:
        return None
    if len(values) > 1:
        estimate = Estimate.of(np.array(values))
        return Score(estimate.value, estimate.stderr, len(values))
    return Score(values[0], rows[0]["scores"].get(f"{name}_stderr"), 1)


def get_difference(
    first: list[dict[str, Any]], second: list[dict[str, Any]], name: str
) -> Score | None:
    """The second point's score minus the first's, seed by seed; None without a common seed.

    The error of one seed is that of the mean of the images' differences, where both rows have them.
    """
    values = [
        {r["seed"]: r["scores"][name] for r in p if name in r["scores"]} for p in (first, second)
    ]
    seeds = sorted(values[0].keys() & values[1].keys())
    if not seeds:
        return None
    differences = np.array([values[1][seed] - values[0][seed] for seed in seeds])
    if len(seeds) > 1:
        estimate = Estimate.of(differences)
        return Score(estimate.value, estimate.stderr, len(seeds))
    same = [[row for row in p if row["seed"] == seeds[0]] for p in (first, second)]
    of_images = [np.array(row.get("of_images", {}).get(name, ())) for (row,) in same]
    if len(of_images[0]) == len(of_images[1]) > 1:
        return Score(float(differences[0]), Estimate.of(of_images[1] - of_images[0]).stderr, 1)
    errors = [get_score(p, name) for p in same]
    known = [e.error for e in errors if e is not None and e.error is not None]
    return Score(
        float(differences[0]), float(np.linalg.norm(known)) if len(known) == 2 else None, 1
    )


def line(*cells: Any) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def _table(rows: Rows, letter: str) -> list[str]:
    lines = [line("", *(head for _, head in SCORES), "seeds"), "|" + "---|" * (len(SCORES) + 2)]
    for label, point in TABLES[letter]:
        of_point = rows.get(point, [])
        scores = [get_score(of_point, name) for name, _ in SCORES]
        lines.append(line(label, *("not run" if s is None else s for s in scores), len(of_point)))
    return lines


def _differences(rows: Rows, letter: str) -> list[str]:
    """The differences of a table's pairs, second minus first."""
    lines = [line("second less first", *(head for _, head in SCORES), "seeds")]
    lines.append("|" + "---|" * (len(SCORES) + 2))
    entries = TABLES[letter]
    for (label, first), (other, second) in zip(entries[::2], entries[1::2], strict=True):
        pair = rows.get(first, []), rows.get(second, [])
        scores = [get_difference(*pair, name) for name, _ in SCORES]
        count = max((s.num_seeds for s in scores if s is not None), default=0)
        name = f"{label.split(': ')[0]}: {other.split(': ')[1]} less {label.split(': ')[1]}"
        lines.append(line(name, *("not run" if s is None else s for s in scores), count))
    return lines


def origin(rows: Rows) -> str:
    """What the rows are of, and what made them."""
    every = [row for of_point in rows.values() for row in of_point]

    def values(*keys: str) -> str:
        found = set()
        for row in every:
            value: Any = row
            for key in keys:
                value = value.get(key) if isinstance(value, dict) else None
            found.add(f"{value:.3g}" if isinstance(value, float) else str(value))
        return ", ".join(sorted(found))

    commits = re.sub(r"\b([0-9a-f]{7})[0-9a-f]{33}\b", r"\1", values("versions", "commit"))
    return (
        f"Sweep {values('sweep')}: {len(every)} runs of {len(rows)} points, {values('steps')} "
        f"steps each; {values('scores', 'num_test_images')} test images, "
        f"{values('scores', 'num_samples')} samples of {values('scores', 'sampling_nfe')} score "
        f"evaluations. For scale, fd_classifier of real test images: "
        f"{values('scores', 'fd_classifier_of_test_images')}. On {values('device')}; JAX "
        f"{values('versions', 'jax')}, Flax {values('versions', 'flax')}, Python "
        f"{values('versions', 'python')}, commit {commits}."
    )


def load_curves(folder: pathlib.Path) -> list[dict[str, Any]]:
    """Read the results of experiments.loss_by_time, one for each run."""
    return [json.loads(p.read_text()) for p in sorted((folder / "loss_by_time").glob("*.json"))]


def gradient_table(curves: list[dict[str, Any]]) -> list[str]:
    """A table of the losses and gradients for each truncation, at each run's parameters."""
    heads = ("loss", "its variance", "norm of the mean gradient", "gradient's variance", "batches")
    lines = [line("parameters of", "truncation", *heads), "|" + "---|" * (len(heads) + 2)]
    for curve in curves:
        for truncation, of in curve["objectives"].items():
            names = ("loss", "loss_variance", "grad_norm", "grad_variance")
            cells = (f"{of[name]:.4g}" for name in names)
            lines.append(
                line(curve["run"], truncation.replace("_", " "), *cells, of["num_batches"])
            )
    return lines


def _points(rows: Rows, entries: tuple[tuple[str, str], ...]) -> list[figures.Point]:
    """The points of a table's figure: the table's rows that were run."""
    return [
        (label, get_score(rows[point], "nll"), get_score(rows[point], "fd_classifier"))
        for label, point in entries
        if point in rows
    ]


def _tradeoff(points: dict[str, list[figures.Point]]) -> dict[str, list[figures.Point]]:
    """The lines of the trade-off figure; k < 1 is left out, since it is far off on both axes."""
    soft = [point for point in points["b"] if point[0] not in ("k = 0", "k = 0.5")]
    weight = [
        (label.split(": ")[0], nll, distance)
        for label, nll, distance in points["d"]
        if "weight" in label
    ]
    return {
        "fixed truncation at ε": points["a"],
        "soft truncation, k": [point for point in soft if "∞" not in point[0]],
        "equivalent weight, k": weight,
    }


def write_tables(folder: pathlib.Path, out: pathlib.Path) -> list[pathlib.Path]:
    """Write tables.md and figures of the rows in `folder` to `out`.

    Returns:
      The paths of the figures.

    Raises:
      UserError: there are no rows, or their scores are not comparable.
    """
    rows, curves, drawn = load_rows(folder), load_curves(folder), []
    out.mkdir(parents=True, exist_ok=True)
    text = [f"# {next(iter(rows.values()))[0]['sweep']}", "", origin(rows), "", _NOTES]
    points = {letter: _points(rows, entries) for letter, entries in TABLES.items()}
    series = _tradeoff(points)
    if all(series.values()):
        drawn.append(out / "tradeoff.png")
        figures.draw_tradeoff(_TRADEOFF, series, drawn[-1])
        text += ["", f"![{_TRADEOFF}](tradeoff.png)"]
    for letter in TABLES:
        text += ["", f"## ({letter}) {_TITLES[letter]}", "", *_table(rows, letter)]
        if letter in "cd":
            text += ["", *_differences(rows, letter)]
        if points[letter]:
            drawn.append(out / f"{letter}.png")
            draw = figures.draw_pairs if letter in "cd" else figures.draw_curve
            draw(_TITLES[letter], points[letter], drawn[-1])
            text += ["", f"![{_TITLES[letter]}]({letter}.png)"]
    if curves:
        drawn.append(out / "e.png")
        figures.draw_times(curves, drawn[-1])
        text += ["", "## (e) Loss and gradient by diffusion time", "", *gradient_table(curves)]
        text += ["", "![Loss and gradient by diffusion time](e.png)"]
    (out / "tables.md").write_text("\n".join(text) + "\n")
    return drawn


def main(arguments: list[str] | None = None) -> int:
    """Make the tables that the command line asks for; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="experiments.tables", description="Make tables and figures from the rows of a sweep."
    )
    parser.add_argument("folder", type=pathlib.Path, help="the --out of experiments.run")
    parser.add_argument("--out", type=pathlib.Path, help="by default the folder itself")
    options = parser.parse_args(arguments)
    environment.prepare()
    log.setLevel(logging.INFO)
    out = options.out or options.folder
    try:
        drawn = write_tables(options.folder, out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    log.info("wrote %s and %d figures", out / "tables.md", len(drawn))
    return 0


if __name__ == "__main__":
    sys.exit(main())
