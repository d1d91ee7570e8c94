"""Make tables from the rows of sweeps, and those of a page of the documentation.

    python -m experiments.tables results/digits.jsonl                 # all points
    python -m experiments.tables results/digits.jsonl --points vp_soft_k1 --minus vp_fixed_1e-5
    python -m experiments.tables --page docs/results.md

± is the standard error over seeds. One seed is marked *, and its error is that of the evaluation
alone. A difference is taken seed by seed, since runs of one seed share images and noise. In a page,
each table below a comment <!-- experiments.tables ARGUMENTS --> is made anew with these arguments.
"""

import argparse
import dataclasses
import itertools
import math
import pathlib
import re
import shlex
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from configs.errors import UserError
from experiments.rows import Row, read_sweep
from metrics.distances import Estimate

SCORES = {
    "nll": "NLL",
    "nelbo": "NELBO",
    "fid": "FID",
    "inception_score": "Inception score",
    "fd_classifier": "distance",
    "precision_classifier": "precision",
    "recall_classifier": "recall",
}


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


def _by_seed(rows: list[Row], name: str) -> dict[int, float]:
    numbers = (row for row in rows if isinstance(row["scores"].get(name), int | float))
    return {row["seed"]: row["scores"][name] for row in numbers}


def get_score(rows: list[Row], name: str) -> Score | None:
    """A score of a point, from its rows; None if no row has it."""
    values = list(_by_seed(rows, name).values())
    if not values:
        return None
    if len(values) > 1:
        estimate = Estimate.of(np.array(values))
        return Score(estimate.value, estimate.stderr, len(values))
    row = next(row for row in rows if row["scores"].get(name) == values[0])
    return Score(values[0], row["scores"].get(f"{name}_stderr"), 1)


def get_difference(first: list[Row], second: list[Row], name: str) -> Score | None:
    """The second point's score minus the first's, seed by seed; None without a common seed.

    The error of one seed is that of the mean of the images' differences, where both rows have them.
    """
    values = [_by_seed(rows, name) for rows in (first, second)]
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


def label(point: str) -> str:
    """A point's name as text: fixed_1e-5 is "fixed ε = 1e-5", soft_k1 is "soft, k = 1"."""
    text = re.sub(r"(fixed|from)_(?=\d)", r"\1 ε = ", point)
    return re.sub(r"_k(?=\d)", ", k = ", text).replace("_", " ")


def _line(*cells: Any) -> str:
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def _cells(
    sweep: dict[str, list[Row]], point: str, other: str, columns: list[tuple[str, str]]
) -> list[Score | None]:
    """A point's scores, or its differences from another point; columns are (prefix, score)."""
    if not other:
        return [get_score(sweep.get(prefix + point, []), name) for prefix, name in columns]
    return [
        get_difference(sweep.get(prefix + other, []), sweep.get(prefix + point, []), name)
        for prefix, name in columns
    ]


def make_table(
    sweeps: Sequence[dict[str, list[Row]]],
    points: Sequence[str] = (),
    minus: Sequence[str] = (),
    by: Sequence[str] = ("",),
    scores: Sequence[str] = (),
) -> str:
    """A Markdown table with a line for each sweep, point and point that it is compared with.

    Args:
      sweeps: rows by point, from `read_sweep`.
      points: the points without their prefix; empty: all.
      minus: points whose scores are subtracted, without their prefix.
      by: prefixes of points' names; each has columns of its own.
      scores: names of scores; empty: those of SCORES that a row has.

    Raises:
      UserError: no row has one of the points, or any of the scores.
    """
    for name in (*points, *minus):
        if not any(prefix + name in sweep for prefix in by for sweep in sweeps):
            raise UserError(f"no row is of {' or '.join(prefix + name for prefix in by)}")
    rows = [row for sweep in sweeps for of_point in sweep.values() for row in of_point]
    scores = scores or [name for name in SCORES if any(name in row["scores"] for row in rows)]
    found = (
        p.removeprefix(prefix) for s in sweeps for p in s for prefix in by if p.startswith(prefix)
    )
    points, columns = points or list(dict.fromkeys(found)), list(itertools.product(by, scores))
    lines = []
    for sweep, point, other in itertools.product(sweeps, points, minus or [""]):
        cells = _cells(sweep, point, other, columns)
        known = [cell for cell in cells if cell]
        if known and point != other:
            title = f"{label(point)} minus {label(other)}" if other else label(point)
            if len(sweeps) > 1:
                title = f"{next(iter(sweep.values()))[0]['sweep']}: {title}"
            plus = ["+" if other and cell and cell.value > 0 else "" for cell in cells]
            shown = [f"{sign}{cell or ''}" for sign, cell in zip(plus, cells, strict=True)]
            seeds = " or ".join(map(str, sorted({cell.num_seeds for cell in known})))
            lines.append(_line(title, *shown, seeds))
    if not lines:
        raise UserError("no row has such scores, or seeds in common")
    heads = [", ".join(filter(None, (SCORES.get(s, s), label(p).strip()))) for p, s in columns]
    return "\n".join([_line("", *heads, "seeds"), "|" + "---|" * (len(heads) + 2), *lines])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="experiments.tables", description="Make a table.")
    parser.add_argument("rows", nargs="*", type=pathlib.Path, help="the --out of experiments.run")
    parser.add_argument("--points", nargs="+", default=(), help="in this order; all by default")
    parser.add_argument("--minus", nargs="+", default=(), help="compare with these points")
    parser.add_argument("--by", nargs="+", default=("",), help="prefixes of points: own columns")
    parser.add_argument("--scores", nargs="+", default=(), help="names in the rows")
    parser.add_argument("--page", type=pathlib.Path, help="a page whose tables are made anew")
    return parser


def _make(options: argparse.Namespace) -> str:
    if not options.rows:
        raise UserError("name a file of rows, such as results/digits.jsonl")
    sweeps = [read_sweep(path) for path in options.rows]
    return make_table(sweeps, options.points, options.minus, options.by, options.scores)


def update_page(text: str) -> str:
    """The text of a page with each table below a comment "experiments.tables …" made anew."""

    def make(match: re.Match[str]) -> str:
        return f"{match[1]}{_make(_parser().parse_args(shlex.split(match[2])))}\n"

    return re.sub(r"(<!-- experiments\.tables (.*?) -->\n\n)(?:\|.*\n)*", make, text)


def main(arguments: list[str] | None = None) -> int:
    """Make the tables that the command line asks for; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        if options.page:
            options.page.write_text(update_page(options.page.read_text()))
        else:
            print(_make(options))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
