"""What a run keeps in its workdir: its config, its checkpoints and its metrics."""

import contextlib
import hashlib
import json
import logging
import os
import pathlib
import shutil
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any, cast

import jax
import numpy as np
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


def steps_to_evaluate(config: ConfigDict, workdir: pathlib.Path) -> list[int]:
    """The steps of checkpoints from eval.begin_ckpt to eval.end_ckpt; of the newest, if both are 0.

    Raises:
      UserError: there are none.
    """
    if not (workdir / "checkpoints").is_dir():
        raise UserError(f"{workdir} has no checkpoint; run --mode train first")
    with checkpoints(config, workdir, read_only=True) as manager:
        steps = sorted(manager.all_steps())
    if not steps:
        raise UserError(f"{workdir}/checkpoints has no checkpoint; run --mode train first")
    if not config.eval.end_ckpt:
        return steps[-1:]
    bounds = (config.eval.begin_ckpt, config.eval.end_ckpt)
    first, last = (number * config.training.snapshot_freq for number in bounds)
    chosen = [step for step in steps if first <= step <= last]
    if not chosen:
        raise UserError(
            f"{workdir} has no checkpoint from step {first} to {last} (eval.begin_ckpt and "
            f"end_ckpt times training.snapshot_freq); it has {', '.join(map(str, steps))}"
        )
    return chosen


def restore_step(
    config: ConfigDict, workdir: pathlib.Path, shape: losses.TrainState, step: int
) -> losses.TrainState:
    """The state of a checkpoint, for evaluation and sampling."""
    claim_workdir(config, workdir, record=False)
    with checkpoints(config, workdir, read_only=True) as manager:
        return restore(manager, shape, step)


def restore_latest(
    config: ConfigDict, workdir: pathlib.Path, shape: losses.TrainState
) -> losses.TrainState:
    """The state of the newest checkpoint."""
    config = config.copy_and_resolve_references()
    config.eval.update(begin_ckpt=0, end_ckpt=0)
    return restore_step(config, workdir, shape, *steps_to_evaluate(config, workdir))


def digest(*what: Any) -> str:
    """A hash that names what is given: trees of arrays, and what JSON can write."""
    whole = hashlib.sha256()
    for item in what:
        if isinstance(item, ConfigDict):
            whole.update(item.to_json_best_effort().encode())
            continue
        for path, leaf in jax.tree_util.tree_leaves_with_path(item):
            whole.update(jax.tree_util.keystr(path).encode())
            array = isinstance(leaf, jax.Array | np.ndarray)
            whole.update(np.asarray(leaf).tobytes() if array else repr(leaf).encode())
    return whole.hexdigest()[:16]


class Parts:
    """Results of a long loop, a file each, so that it can go on where it was cut off."""

    def __init__(self, folder: pathlib.Path) -> None:
        """Keep them below `folder`, which needs not be there."""
        self._folder = folder
        self.recalled = False  # whether the last `get` found what an earlier run left

    def get(self, name: str, compute: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """What compute() gives, from disk if it was computed before."""
        path = self._folder / f"{name}.npz"
        self.recalled = False
        if path.exists():
            try:
                with np.load(path, allow_pickle=False) as file:
                    values = {key: file[key] for key in file.files}
                self.recalled = True
                return values
            except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error):
                log.warning("%s is damaged and is made anew", path)
        values = compute()
        partial = path.with_suffix(f".{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                np.savez(file, **cast(Any, values))
            partial.replace(path)
        except OSError as error:
            raise UserError(
                f"{path} can't be written ({error.strerror}); mend that and run it again: it goes "
                "on from here"
            ) from error
        return values

    def discard(self) -> None:
        """Delete them all: the whole is done."""
        shutil.rmtree(self._folder, ignore_errors=True)


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
