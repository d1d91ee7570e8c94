"""Checkpoints of a run: saved while it goes on, read back whole, never the last good one lost."""

import logging
import pathlib
import shutil
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

import hosts
import losses
import storage
from configs.default import UserError

log = logging.getLogger("soft_truncation")


def checkpoints(
    config: ConfigDict, workdir: pathlib.Path, read_only: bool = False
) -> ocp.CheckpointManager:
    """Keeps every `snapshot_freq`-th step for good, and the last two besides.

    It is the main process's alone. `read_only` leaves alone what a training run may be writing
    there at the same time.
    """
    if read_only:
        options = ocp.CheckpointManagerOptions(read_only=True, multiprocessing_options=_alone())
    else:
        (workdir / "checkpoints").mkdir(exist_ok=True)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=2,
            keep_period=config.training.snapshot_freq,
            cleanup_tmp_directories=True,
            create=False,
            multiprocessing_options=_alone(),
        )
    return ocp.CheckpointManager((workdir / "checkpoints").resolve(), options=options)


def _alone() -> ocp.options.MultiprocessingOptions:
    """For files that are the main process's alone."""
    if jax.process_count() == 1:
        return ocp.options.MultiprocessingOptions()
    return ocp.options.MultiprocessingOptions(
        primary_host=0, active_processes={0}, barrier_sync_key_prefix="main"
    )


def restore(folder: pathlib.Path, shape: losses.TrainState, step: int) -> losses.TrainState:
    """The state of one checkpoint, of the given shapes; UserError if it can't be read."""
    path = folder.resolve() / str(step)
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shape
    )
    try:
        with ocp.StandardCheckpointer(multiprocessing_options=_alone()) as checkpointer:
            return checkpointer.restore(path / "default", target)
    except Exception as error:  # whatever the files' damage makes Orbax raise
        raise UserError(f"the checkpoint {path} can't be read ({storage.reason(error)})") from error


def restore_newest(
    manager: ocp.CheckpointManager, shape: losses.TrainState
) -> losses.TrainState | None:
    """The newest state that can be read; None if there is no checkpoint at all.

    Damaged ones that are newer are moved to damaged_checkpoints/, out of the way of new ones.

    Raises:
      UserError: there are checkpoints, and none can be read; they are left as they are.
    """
    damaged: list[int] = []
    for step in sorted(manager.all_steps(), reverse=True):
        try:
            state = restore(pathlib.Path(manager.directory), shape, step)
        except UserError as error:
            log.warning("%s; trying the one before", error)
            damaged.append(step)
            continue
        folder = pathlib.Path(manager.directory).parent / "damaged_checkpoints"
        for broken in damaged:
            folder.mkdir(exist_ok=True)
            target = folder / f"{broken}_{time.time_ns()}"
            (pathlib.Path(manager.directory) / str(broken)).rename(target)
            log.warning("moved the damaged checkpoint to %s", target)
        if damaged:
            manager.reload()
        return state
    if damaged:
        raise UserError(
            f"none of the {len(damaged)} checkpoints in {manager.directory} can be read, or the "
            "network is another; nothing was changed"
        )
    return None


class Saver:
    """Saves checkpoints while training goes on, and outlives a disk that is full for a time."""

    def __init__(self, manager: ocp.CheckpointManager, max_failures: int) -> None:
        """Gives up after so many failures in a row."""
        self._manager, self._max_failures = manager, max_failures
        self._failures = 0
        self._pending: int | None = None

    def save(self, step: int, state: losses.TrainState) -> None:
        """Start saving; the files are complete, or not there at all, once `settle` returns.

        Raises:
          UserError: this was one failure too many.
        """
        self.settle()
        saved = jax.tree.map(np.asarray, state)
        try:
            self._manager.save(step, args=ocp.args.StandardSave(saved), force=True)
            self._pending = step
        except Exception as error:  # whatever a file system makes Orbax raise
            self._failed(step, error)

    def settle(self) -> bool:
        """Wait for what is being saved; whether all is well."""
        if self._pending is not None:
            step, self._pending = self._pending, None
            try:
                self._manager.wait_until_finished()
                self._failures = 0
            except Exception as error:  # whatever a file system makes Orbax raise
                self._failed(step, error)
        return not self._failures

    def _failed(self, step: int, error: Exception) -> None:
        self._failures += 1
        folder = pathlib.Path(self._manager.directory)
        for unfinished in folder.glob(f"{step}.*tmp*"):  # it fills the disk, and is no use
            shutil.rmtree(unfinished, ignore_errors=True)
        self._manager.reload()
        reason = f"the checkpoint of step {step} can't be saved ({storage.reason(error)})"
        if self._failures >= self._max_failures:
            steps = ", ".join(map(str, sorted(self._manager.all_steps()))) or "none"
            raise UserError(
                f"{reason}, failure {self._failures} in a row; training stops. Checkpoints "
                f"that are there: {steps}"
            ) from error
        log.warning("%s; training goes on, and the next save tries again", reason)


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
    """The state of a checkpoint, for evaluation and sampling, as NumPy arrays on all processes."""

    def read() -> losses.TrainState:
        storage.check_network(config, workdir)
        return jax.tree.map(np.asarray, restore(workdir / "checkpoints", shape, step))

    return hosts.on_main(read)


def restore_latest(
    config: ConfigDict, workdir: pathlib.Path, shape: losses.TrainState
) -> losses.TrainState:
    """The state of the newest checkpoint."""
    config = config.copy_and_resolve_references()
    config.eval.update(begin_ckpt=0, end_ckpt=0)
    (step,) = hosts.on_main(lambda: steps_to_evaluate(config, workdir))
    return restore_step(config, workdir, shape, step)
