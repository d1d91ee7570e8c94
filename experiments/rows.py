"""The rows of sweeps: a JSON object for each run, a line each, in one file for each sweep."""

import json
import pathlib
from typing import Any

from configs.errors import UserError
from runtime.files import write_text
from runtime.locking import waiting_lock

Row = dict[str, Any]


def read_rows(path: pathlib.Path) -> list[Row]:
    """The rows of a file, none if it does not exist.

    Raises:
      UserError: a line is no row, or a run has two.
    """
    rows: dict[tuple[str, int], Row] = {}
    for number, line in enumerate(path.read_bytes().splitlines() if path.is_file() else (), 1):
        try:
            row = json.loads(line)
            key = row["point"], row["seed"]
            _ = row["sweep"], row["config_hash"], row["scores"].items(), {key}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(
                f"{path}, line {number}: no row of a sweep ({error!r}); delete the line"
            ) from error
        if key in rows:
            raise UserError(
                f"{path}, line {number}: {key[0]} has a row of seed {key[1]} already; keep one"
            )
        rows[key] = row
    return list(rows.values())


def add_row(row: Row, path: pathlib.Path) -> None:
    """Add a row to a file, which is replaced as a whole, so that a kill leaves no half of a line.

    Other processes may add rows to the same file at the same time.
    """
    with waiting_lock(path.with_name(f".{path.name}.lock"), f"{path} is being written"):
        text = path.read_text() if path.is_file() else ""
        text += "" if not text or text.endswith("\n") else "\n"
        write_text(path, f"{text}{json.dumps(row, ensure_ascii=False)}\n")


def read_sweep(path: pathlib.Path) -> dict[str, list[Row]]:
    """The rows of one sweep by point, each point's ordered by seed.

    Raises:
      UserError: there are none, or their scores don't compare.
    """
    rows = read_rows(path)
    if not rows:
        raise UserError(f"{path} has no rows; python -m experiments.run makes them")
    for name, kinds in (
        ("sweep", {row["sweep"] for row in rows}),
        ("NLL solver", {_solver(row["scores"]) for row in rows} - {None}),
        ("classifier", {row["scores"].get("classifier_weights") for row in rows} - {None}),
    ):
        if len(kinds) > 1:
            names = ", ".join(sorted(str(kind) for kind in kinds))
            raise UserError(
                f"the rows in {path} are of more than one {name} ({names}), whose scores don't "
                "compare; keep those of one"
            )
    points: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["seed"]):
        points.setdefault(row["point"], []).append(row)
    return points


def _solver(scores: dict[str, Any]) -> str | None:
    if scores.get("nll_steps"):
        return f"{scores['nll_nfe']:.0f} evaluations"
    return "adaptive" if "rtol" in scores else None
