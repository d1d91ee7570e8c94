"""--mode compare: what differs between runs, their scores, and their curves."""

import pathlib
from collections.abc import Sequence
from typing import Any

from configs import saved
from configs.errors import UserError
from metrics.report import compared, read_report
from runtime.files import write_text
from runtime.metrics_log import read_metrics
from runtime.pictures import plot_curves


def _fields_of(run: str) -> dict[str, str]:
    """The fields of a run as text, by names such as training.k."""
    if not (pathlib.Path(run) / "config.json").exists():
        raise UserError(f"{run} has no run (no config.json there)")
    flat: dict[str, str] = {}
    for section, value in saved.as_recorded(saved.get_config(run)).items():
        nested = value if isinstance(value, dict) else {"": value}
        flat |= {f"{section}.{name}".rstrip("."): f"{field}" for name, field in nested.items()}
    return flat


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return [lines[0], "|" + "---|" * len(head), *lines[1:]]


def compare(runs: Sequence[str], folder: pathlib.Path) -> str:
    """Write compare.md and curves.png to a folder: runs' fields that differ, scores, and losses.

    Args:
      runs: the workdirs of two runs or more. Of scores, those of the last evaluation are shown.
      folder: where the two files are written.

    Returns:
      The text of compare.md.

    Raises:
      UserError: a folder has no run, or fewer than two are given.
    """
    if len(runs) < 2:
        raise UserError("--mode compare needs two runs or more: --mode compare RUN RUN")
    fields = [_fields_of(run) for run in runs]
    differing = [
        [f"`{name}`", *(of_run.get(name, "") for of_run in fields)]
        for name in fields[0]
        if len({of_run.get(name) for of_run in fields}) > 1
    ]
    reports = [_newest_report(run) for run in runs]
    lines = ["# Comparison", "", "Fields that differ:", "", *_table(["field", *runs], differing)]
    lines += ["", "Scores, with standard errors:", "", *_table(["score", *runs], compared(reports))]
    curves = {run: read_metrics(pathlib.Path(run) / "metrics.jsonl") for run in runs}
    folder.mkdir(parents=True, exist_ok=True)
    plot_curves(curves, folder / "curves.png")
    text = "\n".join([*lines, "", "![curves](curves.png)"]) + "\n"
    write_text(folder / "compare.md", text)
    return text


def _newest_report(run: str) -> dict[str, Any]:
    """The last report of a run; of one on several checkpoints, that of the last of them."""
    report = read_report(pathlib.Path(run) / "eval")
    return report["checkpoints"][-1] if report.get("checkpoints") else report
