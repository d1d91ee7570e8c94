"""What a run keeps in its workdir: config, lock, metrics, parts of long work; not checkpoints."""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import pathlib
import shutil
import sys
from collections.abc import Callable, Iterator
from typing import Any, cast

import jax
import numpy as np
from ml_collections import ConfigDict

import hosts
import reporting
from configs import saved
from configs.default import UserError, get_default_config

log = logging.getLogger("soft_truncation")

# May differ between the trainings of one workdir: nothing that decides what is learnt.
_FREE_TO_TRAIN = {
    "training": (
        # Not snapshot_freq: what was kept for good by another one would be deleted.
        *("n_iters", "log_freq", "eval_freq", "snapshot_sampling", "n_jitted_steps"),
        *("snapshot_freq_for_preemption", "max_skipped_steps", "max_failed_saves"),
    ),
    "data": ("path", "tfds_dir", "tfrecords_path", "cache"),
    "model": ("num_scales", "remat"),
    "optim": ("num_micro_batch",),
}
# What decides how a network is to be evaluated, all else being free.
_FIXED_TO_EVALUATE = {
    "data": ("dataset", "image_size", "num_channels", "centered", "category"),
    "training": ("sde", "truncation_time", "unbounded_parametrization", "stabilizing_constant"),
}
_FREE_OF_MODEL = ("num_scales", "remat", "dtype", "dropout", "ema_rate", "init_scale")


def _is_free(section: str, field: str, train: bool) -> bool:
    if section in ("sampling", "eval"):
        return True
    if train:
        return field in _FREE_TO_TRAIN.get(section, ())
    if section == "model":
        return field in _FREE_OF_MODEL
    return field not in _FIXED_TO_EVALUATE.get(section, ())


def _first_difference(old: dict[str, Any], new: dict[str, Any], train: bool) -> str | None:
    """The first field of a config that differs, and is not free to."""
    defaults = json.loads(get_default_config().to_json_best_effort())
    if train and old.get("seed") != new["seed"]:
        return f"seed is {old.get('seed')} there and {new['seed']} here"
    for section, fields in new.items():
        for field, value in fields.items() if isinstance(fields, dict) else ():
            # A workdir from before a field was made has its default, if the field is one of ours.
            before = old.get(section, {}).get(field, defaults.get(section, {}).get(field))
            if before != value and not _is_free(section, field, train):
                return f"{section}.{field} is {before!r} there and {value!r} here"
    return None


def make_folder(folder: pathlib.Path, option: str) -> None:
    """Make a folder, or raise UserError with the `option` that named it if that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{option}: {folder} can't be written to: {error.strerror}") from error


def check_network(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Make sure that the workdir's network and data are this config's.

    Raises:
      UserError: they are not.
    """
    if not (workdir / "config.json").exists():
        return
    fields = json.loads(config.to_json_best_effort())
    difference = _first_difference(saved.read(workdir), fields, train=False)
    if difference:
        raise UserError(
            f"{workdir} belongs to another config: {difference}; --workdir without --config takes "
            "the run's own"
        )


def claim_workdir(
    config: ConfigDict, workdir: pathlib.Path, record: bool, override: bool = False
) -> None:
    """Make sure that the workdir is this config's; `record` the config in its config.json.

    Raises:
      UserError: it is another one's, and not to `override`; or it can't be written to.
    """
    path = workdir / "config.json"
    fields = json.loads(config.to_json_best_effort())
    if path.exists() and not override:
        difference = _first_difference(saved.read(workdir), fields, train=True)
        if difference:
            raise UserError(
                f"{workdir} belongs to another config: {difference}; choose another --workdir, "
                "delete this one, or go on with it by --override"
            )
    if record:
        make_folder(workdir, "--workdir")
        partial = path.with_suffix(".partial")
        try:
            partial.write_text(json.dumps(fields, indent=1) + "\n")
            partial.replace(path)
        except OSError as error:
            raise UserError(f"{path} can't be written: {error.strerror}") from error


@contextlib.contextmanager
def locked(folder: pathlib.Path) -> Iterator[None]:
    """Hold a folder; the system lets it go when the process ends, however it does.

    Raises:
      UserError: another process holds it.
    """
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"another process is at work in {folder}; wait for it") from error
        yield


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
        self.used: set[str] = set()  # folders in it
        self.recalled = False  # whether the last `get` found what an earlier run left

    def get(self, name: str, compute: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """What compute() gives, from disk if it was computed before; the same on all processes."""
        path = self._folder / f"{name}.npz"
        self.used.add(name.split("/")[0])
        kept = hosts.share(self._read(path) if hosts.is_main() else None)
        self.recalled = kept is not None
        if self.recalled:
            return kept
        values = compute()
        hosts.on_main(lambda: self._write(path, values))
        return values

    def _read(self, path: pathlib.Path) -> dict[str, np.ndarray] | None:
        if not path.exists():
            return None
        try:
            with np.load(path, allow_pickle=False) as file:
                return {key: file[key] for key in file.files}
        except Exception:  # a damaged archive raises anything at all
            log.warning("%s is damaged and is made anew", path)
            return None

    def _write(self, path: pathlib.Path, values: dict[str, np.ndarray]) -> None:
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

    def discard(self, names: set[str]) -> None:
        """Delete folders that were `used`; those of other work that was cut off stay."""
        for name in names:
            shutil.rmtree(self._folder / name, ignore_errors=True)
        with contextlib.suppress(OSError):
            self._folder.rmdir()  # if it is empty


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


def reason(error: Exception) -> str:
    """The first line of what an exception says."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


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
        self._file, self._full = path.open("ab", buffering=0), False
        self._waiting = b""
        try:
            with _quiet_stderr():  # TensorFlow's C++ greets whatever its log level
                from clu import metric_writers

            self._writer = metric_writers.SummaryWriter(str(workdir / "tensorboard"))
        except ImportError:
            log.info("TensorFlow is not installed: metrics go to %s alone", path)
            self._writer = None

    def write(self, step: int, values: dict[str, float]) -> None:
        """Append one row; while the disk is full, rows wait in memory."""
        self._waiting += json.dumps({"step": step, **values}).encode() + b"\n"
        self._flush()
        if self._writer is not None:
            try:
                self._writer.write_scalars(step, values)
            except Exception as error:  # TensorFlow's own errors
                log.warning("TensorBoard's file can't be written (%s)", reason(error))
                self._writer = None

    def _flush(self) -> None:
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
            self._full = False
        except OSError as error:
            if not self._full:
                log.warning("metrics.jsonl can't be written now: %s", error.strerror)
            self._full = True

    def close(self) -> None:
        """Write what waits, and close all files."""
        self._flush()
        self._file.close()
        if self._writer is not None:
            self._writer.close()
