"""What a run keeps in its workdir: its config, its checkpoints and its metrics."""

import contextlib
import json
import logging
import os
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

import losses
import reporting
from configs.default import UserError, get_default_config

log = logging.getLogger("soft_truncation")

# May differ between the runs of one workdir: nothing that decides what is learnt.
_FREE_FIELDS = {
    "training": (
        *("n_iters", "log_freq", "eval_freq", "snapshot_freq", "snapshot_sampling"),
        "snapshot_freq_for_preemption",
    ),
    "data": ("path", "tfds_dir", "tfrecords_path"),
    "model": ("num_scales",),
}
_FREE_SECTIONS = ("sampling", "eval")


def _first_difference(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    """The first field of a config that decides what is learnt and differs."""
    defaults = json.loads(get_default_config().to_json_best_effort())
    if old.get("seed") != new["seed"]:
        return f"seed is {old.get('seed')} there and {new['seed']} here"
    for section, fields in new.items():
        if section in _FREE_SECTIONS or not isinstance(fields, dict):
            continue
        for field, value in fields.items():
            # A workdir from before a field was made has its default.
            before = old.get(section, {}).get(field, defaults[section][field])
            if field not in _FREE_FIELDS.get(section, ()) and before != value:
                return f"{section}.{field} is {before!r} there and {value!r} here"
    return None


def make_folder(folder: pathlib.Path, option: str) -> None:
    """Make a folder, or raise UserError with the `option` that named it if that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
    except OSError as error:
        raise UserError(f"{option}: {folder} can't be written to: {error.strerror}") from error


def claim_workdir(config: ConfigDict, workdir: pathlib.Path, record: bool) -> None:
    """Make sure that the workdir is this config's; `record` the config in its config.json."""
    path = workdir / "config.json"
    fields = json.loads(config.to_json_best_effort())
    if path.exists():
        try:
            old = json.loads(path.read_text())
        except ValueError as error:
            raise UserError(f"{path} is damaged ({error}); choose another --workdir") from error
        difference = _first_difference(old, fields)
        if difference:
            raise UserError(
                f"{workdir} belongs to another config: {difference}; "
                "choose another --workdir, or delete this one"
            )
    if record:
        make_folder(workdir, "--workdir")
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(fields, indent=1) + "\n")
        partial.replace(path)


def checkpoints(
    config: ConfigDict, workdir: pathlib.Path, read_only: bool = False
) -> ocp.CheckpointManager:
    """Keeps every `snapshot_freq`-th step for good, and the last two besides.

    `read_only` leaves alone what a training run may be writing there at the same time.
    """
    if read_only:
        options = ocp.CheckpointManagerOptions(read_only=True)
    else:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=2, keep_period=config.training.snapshot_freq, cleanup_tmp_directories=True
        )
    return ocp.CheckpointManager((workdir / "checkpoints").resolve(), options=options)


def restore(
    manager: ocp.CheckpointManager, shape: losses.TrainState, step: int
) -> losses.TrainState:
    """The state of one checkpoint, of the given shapes; UserError if it can't be read."""
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shape
    )
    try:
        return manager.restore(step, args=ocp.args.StandardRestore(target))
    except Exception as error:  # whatever the files' damage makes Orbax raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"the checkpoint {manager.directory / str(step)} can't be read ({reason[:200]}); "
            "move it away to go on from the one before"
        ) from error


def restore_latest(
    config: ConfigDict, workdir: pathlib.Path, shape: losses.TrainState
) -> losses.TrainState:
    """The state of the newest checkpoint, for evaluation and sampling."""
    if not (workdir / "checkpoints").is_dir():
        raise UserError(f"{workdir} has no checkpoint; run --mode train first")
    claim_workdir(config, workdir, record=False)
    with checkpoints(config, workdir, read_only=True) as manager:
        step = manager.latest_step()
        if step is None:
            raise UserError(f"{workdir}/checkpoints has no checkpoint; run --mode train first")
        return restore(manager, shape, step)


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Silence what C++ writes to the process's stderr; exceptions pass."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


class Metrics:
    """One JSON object a line in metrics.jsonl, and TensorBoard where TensorFlow is installed."""

    def __init__(self, workdir: pathlib.Path, first_step: int) -> None:
        """Go on after `first_step`: later rows are dropped."""
        path = workdir / "metrics.jsonl"
        if path.exists():  # what came after the checkpoint is done anew
            kept = [r for r in reporting.read_metrics(path) if r["step"] <= first_step]
            partial = path.with_suffix(".partial")
            partial.write_text("".join(json.dumps(row) + "\n" for row in kept))
            partial.replace(path)
        self._file = path.open("a")
        try:
            with _quiet_stderr():  # TensorFlow's C++ greets whatever its log level
                from clu import metric_writers

            self._writer = metric_writers.SummaryWriter(str(workdir / "tensorboard"))
        except ImportError:
            log.info("TensorFlow is not installed: metrics go to %s alone", path)
            self._writer = None

    def write(self, step: int, values: dict[str, float]) -> None:
        """Append one row."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        if self._writer is not None:
            self._writer.write_scalars(step, values)

    def close(self) -> None:
        """Flush and close all files."""
        self._file.close()
        if self._writer is not None:
            self._writer.close()
