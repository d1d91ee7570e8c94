"""Train and evaluate the runs of a sweep, and write a row of results for each.

    python -m experiments.run experiments/sweeps/digits.py --workdirs runs/digits

The rows are lines of results/NAME.jsonl, NAME being the sweep's. A run that has its row is skipped,
and an interrupted run is resumed, so the same command finishes a sweep. Several processes or
machines share a sweep by --shard; files of rows from several machines are put together by `cat`.
"""

import argparse
import csv
import logging
import pathlib
import shutil
import statistics
import sys
import time
from typing import Any

import jax

import evaluation
import run_lib
from configs.errors import UserError
from experiments.rows import add_row, read_rows
from experiments.sweep import Run, load_sweep, parse_machine_paths, select
from runtime import environment, provenance
from runtime.metrics_log import read_metrics
from runtime.progress import clock
from runtime.workdir import first_line, make_folder

log = logging.getLogger("soft_truncation")


class Stopped(Exception):
    """Training was stopped by a signal; the same command resumes it."""


def _waiting(runs: list[Run], path: pathlib.Path) -> list[Run]:
    """Those of `runs` that have no row yet.

    Raises:
      UserError: a row is of another config than its run has now.
    """
    hashes = {(row["point"], row["seed"]): row["config_hash"] for row in read_rows(path)}
    for run in runs:
        if hashes.get((run.point, run.seed), run.config_hash) != run.config_hash:
            raise UserError(
                f"{path}: the row of {run.name} is of another config than the sweep has now; move "
                "the file away, or choose another --out"
            )
    return [run for run in runs if (run.point, run.seed) not in hashes]


def _bits_of_images(workdir: pathlib.Path) -> dict[str, list[float]]:
    """The NLL and NELBO of each image that were written last."""
    tables = (workdir / "eval").glob("images_*/bits_per_dim.csv")
    newest = max(tables, key=lambda path: path.stat().st_mtime)
    with open(newest, newline="") as file:
        images = list(csv.DictReader(file))
    names = [name for name in ("nll", "nelbo") if name in images[0]]
    return {name: [round(float(image[name]), 5) for image in images] for name in names}


def _evaluate(
    run: Run, workdir: pathlib.Path, places: dict[str, str]
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """The scores of a trained run, and NLL and NELBO of each image if `eval.images` asks for them.

    The bits of images are those of evaluations without a prefix.
    """
    scores: dict[str, Any] = {}
    of_images: dict[str, list[float]] = {}
    for asked in run.sweep.evaluations:
        config = run.config(places, asked.overrides)
        report = evaluation.evaluate(config, workdir)
        if report.get("step") != config.training.n_iters:
            raise UserError(f"{workdir} has no checkpoint of step {config.training.n_iters}")
        names = asked.scores or report
        scores |= {f"{asked.prefix}{name}": report[name] for name in names if name in report}
        if config.eval.images and not asked.prefix:
            of_images = _bits_of_images(workdir)
    return scores, of_images


def _compute_row(
    run: Run, workdir: pathlib.Path, places: dict[str, str], versions: dict[str, str | None]
) -> dict[str, Any]:
    """Train and evaluate a run; returns its row."""
    config = run.config(places)
    whole = not (workdir / "checkpoints").exists()
    start = time.monotonic()
    step = int(run_lib.train(config, workdir).step)
    trained = time.monotonic()
    if step < config.training.n_iters:
        raise Stopped
    if step > config.training.n_iters:
        raise UserError(f"{workdir} is at step {step}, beyond the sweep's; choose other --workdirs")
    scores, of_images = _evaluate(run, workdir, places)
    metrics = read_metrics(workdir / "metrics.jsonl")
    rates = [row["images_per_second"] for row in metrics if "images_per_second" in row]
    return {
        "sweep": run.sweep.name,
        "point": run.point,
        "seed": run.seed,
        "overrides": run.sweep.points[run.point],
        "config_hash": run.config_hash,
        "steps": step,
        "images_per_second": statistics.median(rates) if rates else None,
        # Including compilation; not known for an interrupted run.
        "train_seconds": trained - start if whole else None,
        "eval_seconds": time.monotonic() - trained,
        "device": f"{jax.device_count()} × {jax.devices()[0].device_kind}",
        "versions": versions,
        "scores": scores,
        "of_images": of_images,
        "test_loss": [(row["step"], row["test_loss"]) for row in metrics if "test_loss" in row],
    }


def run_sweep(
    runs: list[Run],
    out: pathlib.Path,
    workdirs: pathlib.Path,
    places: dict[str, str] | None = None,
    discard: bool = False,
) -> list[str]:
    """Train and evaluate those of `runs` that have no row yet, one after the other.

    Args:
      runs: from `select`.
      out: the file of the rows.
      workdirs: the folder of the runs' workdirs.
      places: this machine's paths of data and caches, by field.
      discard: whether to delete a run's checkpoints when its row is written.

    Returns:
      The names of the runs that failed; all others have their rows.

    Raises:
      UserError: a row is of another config, or the sweep's data are not named; nothing was run.
      Stopped: training was stopped by a signal.
    """
    waiting, places = _waiting(runs, out), places or {}
    log.info("%d of %d runs are done already", len(runs) - len(waiting), len(runs))
    make_folder(out.parent, "--out")
    for run in waiting[:1]:
        run.config(places)
    failed: list[str] = []
    # Read the versions at the start: the commit of the running code, whatever is committed later.
    start, versions = time.monotonic(), provenance.versions()
    for i, run in enumerate(waiting):
        seconds = (time.monotonic() - start) / max(i, 1)
        left = f", {clock(seconds * (len(waiting) - i))} left" if i else ""
        log.info("run %d of %d: %s%s", i + 1, len(waiting), run.name, left)
        workdir = workdirs / run.name
        try:
            row = _compute_row(run, workdir, places, versions)
        except (UserError, OSError) as error:
            log.error("run %s failed: %s", run.name, error)
            failed.append(run.name)
            continue
        except (ValueError, RuntimeError, ArithmeticError) as error:
            log.exception("run %s failed: %s", run.name, first_line(error))
            failed.append(run.name)
            continue
        finally:
            jax.clear_caches()  # each run compiles its own programs
        add_row(row, out)
        if discard:
            shutil.rmtree(workdir / "checkpoints")
    return failed


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="experiments.run", description="Run a sweep.")
    parser.add_argument(
        "sweep", help="a Python file with get_sweep(), such as experiments/sweeps/digits.py"
    )
    parser.add_argument("--out", type=pathlib.Path, help="the file of rows: results/NAME.jsonl")
    parser.add_argument(
        "--workdirs", required=True, type=pathlib.Path, help="the folder of the runs' workdirs"
    )
    parser.add_argument("--shard", default="0/1", help="i/n: every n-th run, starting at the i-th")
    parser.add_argument(
        "--only", default="", help="only runs whose names match this regular expression"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        help="a path of this machine: data.path=…, data.tfds_dir=… or eval.cache_dir=…",
    )
    parser.add_argument(
        "--discard", action="store_true", help="delete a run's checkpoints when its row is written"
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the sweep that the command line names.

    Returns:
      The exit status: 0 for success, 1 if runs failed or were stopped, 2 for a wrong command.
    """
    options = _parser().parse_args(arguments)
    environment.prepare()
    environment.keep_freed_memory()
    log.setLevel(logging.INFO)
    try:
        sweep = load_sweep(options.sweep)
        runs = select(sweep, options.shard, options.only)
        out = options.out or pathlib.Path("results") / f"{sweep.name}.jsonl"
        places = parse_machine_paths(options.set)
        failed = run_sweep(runs, out, options.workdirs, places, options.discard)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(
            f"error: {error.filename}: {error.strerror}; the same command goes on", file=sys.stderr
        )
        return 2
    except (Stopped, KeyboardInterrupt):
        print("stopped; the same command goes on", file=sys.stderr)
        return 1
    if failed:
        print(f"error: {len(failed)} runs failed: {', '.join(failed)}", file=sys.stderr)
        return 1
    log.info("all %d runs have their rows in %s", len(runs), out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
