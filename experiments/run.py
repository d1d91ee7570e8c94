"""Train and evaluate the runs of a sweep, and write a row of results for each.

    python -m experiments.run experiments/digits.py --out results/digits --workdirs runs/digits

A run that has its row is skipped, and an interrupted run is resumed, so the same command finishes a
sweep. Several machines share a sweep by --shard. Each row is a file in OUT/rows, so the rows of
several machines only have to be copied into one folder.
"""

import argparse
import csv
import json
import logging
import pathlib
import platform
import shutil
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from typing import Any

import jax
from ml_collections import ConfigDict

import evaluation
import run_lib
from errors import UserError
from experiments.sweep import Run, load_sweep, parse_machine_paths, select
from runtime import environment
from runtime.files import write_text
from runtime.metrics_log import read_metrics
from runtime.progress import clock
from runtime.workdir import first_line, make_folder

log = logging.getLogger("soft_truncation")


class Stopped(Exception):
    """Training was stopped by a signal; the same command resumes it."""


def row_path(out: pathlib.Path, run: Run) -> pathlib.Path:
    """The path of a run's row."""
    return out / "rows" / f"{run.name}.json"


def is_done(out: pathlib.Path, run: Run) -> bool:
    """Whether a run has its row.

    Raises:
      UserError: the row can't be read, or is of another config.
    """
    path = row_path(out, run)
    if not path.exists():
        return False
    try:
        config_hash = json.loads(path.read_text())["config_hash"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no row of a sweep ({error}); delete it") from error
    if config_hash != run.config_hash:
        raise UserError(
            f"{path} is of another config than {run.name} of {run.sweep.name} has now; move it "
            "away, or choose another --out"
        )
    return True


def _git_commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    folder = pathlib.Path(__file__).parent
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _versions() -> dict[str, str | None]:
    packages = ("jax", "jaxlib", "flax", "optax")
    found: dict[str, str | None] = {name: version(name) for name in packages}
    return found | {"python": platform.python_version(), "commit": _git_commit()}


def _evaluate_prepared(
    config: ConfigDict, workdir: pathlib.Path
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Evaluate a run with the folders of `experiments.make_data`.

    Returns:
      The report of bits/dim of the test images, with the scores of samples, on features of a
      classifier of the folder `features`, and `validation_nll` and `validation_nelbo` with their
      standard errors; and the NLL and NELBO of each test image.
    """
    folder = pathlib.Path(config.data.path).parent
    of_samples, of_validation, of_test = (config.copy_and_resolve_references() for _ in range(3))
    of_samples.data.path = str(folder / "features")
    of_samples.eval.enable_bpd = False
    of_validation.eval.images = str(folder / "validation")
    of_test.eval.images = "test"
    samples = evaluation.evaluate(of_samples, workdir)
    validation = evaluation.evaluate(of_validation, workdir)
    report = samples | evaluation.evaluate(of_test, workdir)
    for score in ("nll", "nelbo"):
        for name in (score, f"{score}_stderr"):
            report[f"validation_{name}"] = validation[name]
    tables = (workdir / "eval").glob("images_*/bits_per_dim.csv")
    newest = max(tables, key=lambda path: path.stat().st_mtime)
    with open(newest, newline="") as file:
        images = list(csv.DictReader(file))
    return report, {name: [float(image[name]) for image in images] for name in ("nll", "nelbo")}


def _compute_row(
    run: Run, workdir: pathlib.Path, machine_paths: dict[str, str], versions: dict[str, str | None]
) -> dict[str, Any]:
    """Train and evaluate a run; returns its row."""
    config = run.training_config(machine_paths)
    whole = not (workdir / "checkpoints").exists()
    start = time.monotonic()
    step = int(run_lib.train(config, workdir).step)
    trained = time.monotonic()
    if step < config.training.n_iters:
        raise Stopped
    if step > config.training.n_iters:
        raise UserError(f"{workdir} is at step {step}, beyond the sweep's; choose other --workdirs")
    of_images: dict[str, list[float]] = {}
    if run.sweep.prepared:
        report, of_images = _evaluate_prepared(config, workdir)
    else:
        report = evaluation.evaluate(config, workdir)
    if report["step"] != step:
        raise UserError(f"{workdir} has no checkpoint of its last step, {step}")
    metrics = read_metrics(workdir / "metrics.jsonl")
    rates = [row["images_per_second"] for row in metrics if "images_per_second" in row]
    return {
        "sweep": run.sweep.name,
        "point": run.point,
        "seed": run.seed,
        "overrides": run.overrides,
        "config_hash": run.config_hash,
        "steps": step,
        "images_per_second": statistics.median(rates) if rates else None,
        # Including compilation; not known for an interrupted run.
        "train_seconds": trained - start if whole else None,
        "eval_seconds": time.monotonic() - trained,
        "device": f"{jax.device_count()} × {jax.devices()[0].device_kind}",
        "versions": versions,
        "scores": report,
        "of_images": of_images,
        "test_loss": [(row["step"], row["test_loss"]) for row in metrics if "test_loss" in row],
    }


def _write_row(row: dict[str, Any], path: pathlib.Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(row, indent=1, ensure_ascii=False) + "\n")


def run_sweep(
    runs: list[Run],
    out: pathlib.Path,
    workdirs: pathlib.Path,
    machine_paths: dict[str, str] | None = None,
    discard: bool = False,
) -> list[str]:
    """Train and evaluate those of `runs` that have no row yet, one after the other.

    Args:
      runs: from `select`.
      out: rows are written to out/rows.
      workdirs: the folder of the runs' workdirs.
      machine_paths: this machine's paths of data and caches, by field.
      discard: whether to delete a run's checkpoints when its row is written.

    Returns:
      The names of the runs that failed; all others have their rows.

    Raises:
      UserError: a row is of another config; nothing was run.
      Stopped: training was stopped by a signal.
    """
    waiting = [run for run in runs if not is_done(out, run)]
    log.info("%d of %d runs are done already", len(runs) - len(waiting), len(runs))
    make_folder(out, "--out")
    failed: list[str] = []
    # Read the versions at the start: the commit of the running code, whatever is committed later.
    start, versions = time.monotonic(), _versions()
    for i, run in enumerate(waiting):
        seconds = (time.monotonic() - start) / max(i, 1)
        left = f", {clock(seconds * (len(waiting) - i))} left" if i else ""
        log.info("run %d of %d: %s%s", i + 1, len(waiting), run.name, left)
        workdir = workdirs / run.name
        try:
            row = _compute_row(run, workdir, machine_paths or {}, versions)
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
        _write_row(row, row_path(out, run))
        if discard:
            shutil.rmtree(workdir / "checkpoints")
    return failed


def main(arguments: list[str] | None = None) -> int:
    """Run the sweep that the command line names.

    Returns:
      The exit status: 0 for success, 1 if runs failed or were stopped, 2 for a wrong command.
    """
    parser = argparse.ArgumentParser(prog="experiments.run", description="Run a sweep.")
    parser.add_argument(
        "sweep", help="a Python file with get_sweep(), such as experiments/digits.py"
    )
    parser.add_argument(
        "--out", required=True, type=pathlib.Path, help="rows are written to OUT/rows"
    )
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
    options = parser.parse_args(arguments)
    environment.prepare()
    environment.keep_freed_memory()
    log.setLevel(logging.INFO)
    try:
        runs = select(load_sweep(options.sweep), options.shard, options.only)
        machine_paths = parse_machine_paths(options.set)
        failed = run_sweep(runs, options.out, options.workdirs, machine_paths, options.discard)
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
    log.info("all %d runs have their rows in %s", len(runs), options.out / "rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
