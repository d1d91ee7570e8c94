"""Saves checkpoints in the background during training, and restores the newest readable one."""

import dataclasses
import logging
import pathlib
import shutil
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from configs.errors import UserError
from configs.saved import as_recorded, read_object
from runtime import exported, hosts
from runtime.checksums import checksums, compare
from runtime.workdir import check_network, first_line

log = logging.getLogger("soft_truncation")

State = Any  # a tree of arrays with an attribute `step`: train_step.TrainState


def checkpoints(workdir: pathlib.Path, keep_period: int | None = None) -> ocp.CheckpointManager:
    """A manager that keeps every `keep_period`-th step permanently, and the last two steps.

    Only the main process uses it. Without a period it changes nothing in the folder, so that a
    training run may write there at the same time.
    """
    if not keep_period:
        options = ocp.CheckpointManagerOptions(read_only=True, multiprocessing_options=_alone())
    else:
        (workdir / "checkpoints").mkdir(exist_ok=True)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=2,
            keep_period=keep_period,
            cleanup_tmp_directories=True,
            create=False,
            multiprocessing_options=_alone(),
            # Else a save whose folder can't be made leaves threads that wait for it for minutes.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        )
    return ocp.CheckpointManager((workdir / "checkpoints").resolve(), options=options)


def _alone() -> ocp.options.MultiprocessingOptions:
    """Orbax's options for files that only the main process reads and writes."""
    if jax.process_count() == 1:
        return ocp.options.MultiprocessingOptions()
    return ocp.options.MultiprocessingOptions(
        primary_host=0, active_processes={0}, barrier_sync_key_prefix="main"
    )


def restore(folder: pathlib.Path, shape: State, step: int) -> State:
    """Read one checkpoint as NumPy arrays.

    Args:
      folder: the run's checkpoints.
      shape: the state's shapes; fields that are None are not read.
      step: the checkpoint's step.

    Raises:
      UserError: it can't be read, or its arrays differ from `shape`; the line names them.
    """
    path = folder.resolve() / str(step)
    if not path.is_dir():
        steps = sorted(int(p.name) for p in folder.glob("*") if p.name.isdigit())
        known = ", ".join(map(str, steps)) or "none"
        raise UserError(f"{folder} has no checkpoint of step {step}; there are: {known}")
    wanted = {_name(key): leaf.shape for key, leaf in _leaves(shape)}
    fields = {name.split(".")[0] for name in wanted}
    reader = ocp.Checkpointer(
        ocp.PyTreeCheckpointHandler(multiprocessing_options=_alone()),
        multiprocessing_options=_alone(),
    )
    try:
        with reader:
            there = reader.metadata(path / "default").item_metadata.tree
            there = {name: tree for name, tree in there.items() if name in fields}
            _check_shapes(path, {_name(key): leaf.shape for key, leaf in _leaves(there)}, wanted)
            how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), there)
            args = ocp.args.PyTreeRestore(there, restore_args=how, partial_restore=True)
            saved = reader.restore(path / "default", args)
        arrays = {_name(key): np.asarray(leaf) for key, leaf in _leaves(saved)}
        structure = jax.tree.structure(shape)
        state = jax.tree.unflatten(structure, [arrays.get(n, arrays.get(_UPDATES)) for n in wanted])
        compare(_saved_checksums(path), state)
        return state
    except UserError:
        raise
    except Exception as error:  # Orbax raises many kinds of error for damaged files
        raise UserError(f"the checkpoint {path} can't be read ({first_line(error)})") from error


# The number of updates in Adam's state, which is that of the schedule's, too. Runs with
# optim.warmup=0 used to have no schedule.
_UPDATES, _UPDATES_OF_SCHEDULE = "opt_state.2.count", "opt_state.3.count"


def _leaves(tree: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_leaves_with_path(tree)


def _name(path: Any) -> str:
    """The name of an array in a state, as `params.Conv_0.kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _check_shapes(path: pathlib.Path, there: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise a UserError that names the arrays of a checkpoint that differ from the wanted ones."""
    if _UPDATES in there and _UPDATES_OF_SCHEDULE in wanted:
        there = {_UPDATES_OF_SCHEDULE: there[_UPDATES], **there}
    differ = [
        f"{name} is {there.get(name, 'absent')} there and {wanted.get(name, 'absent')} here"
        for name in sorted(wanted.keys() | there.keys())
        if there.get(name) != wanted.get(name)
    ]
    if differ:
        more = f", and {len(differ) - 3} more" if len(differ) > 3 else ""
        raise UserError(
            f"the checkpoint {path} is of another network or optimiser: "
            f"{'; '.join(differ[:3])}{more}"
        )


def _saved_checksums(path: pathlib.Path) -> dict[str, Any]:
    """The checksums that were saved with a checkpoint; older ones have none."""
    try:
        facts = read_object(path / "_CHECKPOINT_METADATA")
    except FileNotFoundError:
        return {}
    return (facts.get("custom_metadata") or {}).get("checksums", {})


def restore_newest(manager: ocp.CheckpointManager, shape: State) -> State | None:
    """The newest state that can be read; None if there is no checkpoint.

    Newer checkpoints that are damaged are moved to damaged_checkpoints/, so that training can save
    these steps again.

    Raises:
      UserError: there are checkpoints, but none can be read. They are not moved.
    """
    damaged: list[int] = []
    reason = ""
    for step in sorted(manager.all_steps(), reverse=True):
        try:
            state = restore(pathlib.Path(manager.directory), shape, step)
        except UserError as error:
            reason = str(error)
            log.warning("%s; trying the one before", reason)
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
            f"none of the {len(damaged)} checkpoints in {manager.directory} can be read, and "
            f"nothing was changed: {reason}"
        )
    return None


class Saver:
    """Saves checkpoints in the background; training goes on if the disk is full for a while."""

    def __init__(
        self,
        manager: ocp.CheckpointManager,
        max_failures: int,
        on_first: Callable[[], None] | None = None,
    ) -> None:
        """Stop the training after `max_failures` failed saves in a row.

        With `on_first`, training waits for the first save, and `on_first` is called if it succeeds.
        """
        self._manager, self._max_failures = manager, max_failures
        self._on_first = on_first
        self._failures = 0
        self._pending: int | None = None

    def save(self, step: int, state: State) -> None:
        """Start saving; after `settle`, the checkpoint is either complete or absent.

        Raises:
          UserError: `max_failures` saves in a row have failed.
        """
        self.settle()
        if not pathlib.Path(self._manager.directory).is_dir():  # Orbax would make it anew
            gone = OSError(f"{self._manager.directory} is gone; was the workdir moved?")
            return self._failed(step, gone)
        saved = jax.tree.map(np.asarray, state)
        try:
            facts = {"checksums": checksums(saved)}
            args = ocp.args.StandardSave(saved)
            self._manager.save(step, args=args, force=True, custom_metadata=facts)
            self._pending = step
        except Exception as error:  # Orbax raises many kinds of error for a failing disk
            self._failed(step, error)
        if self._on_first:
            self.settle()

    def settle(self) -> bool:
        """Wait for the save in progress; returns whether the last save succeeded."""
        if self._pending is not None:
            step, self._pending = self._pending, None
            try:
                self._manager.wait_until_finished()
                self._failures = 0
            except Exception as error:  # as in `save`
                self._failed(step, error)
            else:
                self._after_first()
        return not self._failures

    def _after_first(self) -> None:
        if self._on_first:
            try:
                self._on_first()
                self._on_first = None
            except UserError as error:
                log.warning("%s; the next save tries again", error)

    def _failed(self, step: int, error: Exception) -> None:
        self._failures += 1
        folder = pathlib.Path(self._manager.directory)
        for unfinished in folder.glob(f"{step}.*tmp*"):  # an unfinished save only fills the disk
            shutil.rmtree(unfinished, ignore_errors=True)
        self._manager.reload()
        reason = f"the checkpoint of step {step} can't be saved ({first_line(error)})"
        if self._failures >= self._max_failures:
            steps = ", ".join(map(str, sorted(self._manager.all_steps()))) or "none"
            raise UserError(
                f"{reason}, failure {self._failures} in a row; training stops. Checkpoints "
                f"that are there: {steps}"
            ) from error
        log.warning("%s; training goes on, and the next save tries again", reason)


def steps_to_evaluate(
    workdir: pathlib.Path, begin: int = 0, end: int = 0, period: int = 1
) -> list[int]:
    """Steps of the checkpoints from begin · period to end · period; the newest without an end.

    Args:
      workdir: the run.
      begin, end: `eval.begin_ckpt` and `eval.end_ckpt`.
      period: `training.snapshot_freq`.

    Raises:
      UserError: there are no such checkpoints.
    """
    if exported.is_exported(workdir):
        if end:
            raise UserError(f"{workdir} is an exported model of one step; eval.end_ckpt must be 0")
        return [exported.read_step(workdir)]
    if not (workdir / "checkpoints").is_dir():
        raise UserError(f"{workdir} has no checkpoint; run --mode train first")
    with checkpoints(workdir) as manager:
        steps = sorted(manager.all_steps())
    if not steps:
        raise UserError(f"{workdir}/checkpoints has no checkpoint; run --mode train first")
    if not end:
        return steps[-1:]
    first, last = begin * period, end * period
    chosen = [step for step in steps if first <= step <= last]
    if not chosen:
        raise UserError(
            f"{workdir} has no checkpoint from step {first} to {last} (eval.begin_ckpt and "
            f"end_ckpt times training.snapshot_freq); it has {', '.join(map(str, steps))}"
        )
    return chosen


def restore_step(
    fields: Mapping[str, Any],
    workdir: pathlib.Path,
    shape: State,
    step: int,
    weights_only: bool = True,
) -> State:
    """The state of a checkpoint as NumPy arrays on every process.

    With `weights_only`, and for an exported model, only the EMA weights are read; `params` are
    these too, and there is no `opt_state`. `fields` are those of a config, which must describe the
    same network (`check_network`).
    """

    def read() -> State:
        check_network(fields, workdir)
        if exported.is_exported(workdir):
            weights = exported.read(workdir, shape.ema_params)
            return dataclasses.replace(
                like, step=np.int32(step), params=weights, ema_params=weights
            )
        if not weights_only:
            return restore(workdir / "checkpoints", shape, step)
        state = restore(workdir / "checkpoints", dataclasses.replace(like, params=None), step)
        return dataclasses.replace(state, params=state.ema_params)

    weights_only = hosts.on_main(lambda: weights_only or exported.is_exported(workdir))
    like = dataclasses.replace(shape, opt_state=None) if weights_only else shape
    return hosts.on_main(read, like)


def restore_latest(
    config: ConfigDict, workdir: pathlib.Path, shape: State, weights_only: bool = False
) -> State:
    """The state of the newest checkpoint; `weights_only` as in `restore_step`."""
    (step,) = hosts.on_main(lambda: steps_to_evaluate(workdir))
    return restore_step(as_recorded(config), workdir, shape, step, weights_only)
