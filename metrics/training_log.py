"""What training writes to the log and to metrics.jsonl, and its message when it stops a run."""

import contextlib
import json
import logging
import pathlib
import time
from collections.abc import Iterator
from typing import NoReturn

import jax
import numpy as np
from jax import Array

from build import (
    Setup,
)
from configs.errors import UserError
from data.batches import Dataset, train_batches
from runtime import environment
from runtime.files import can_do_without, write_text
from runtime.progress import clock
from runtime.run_files import RunFiles
from train_step import (
    LossSums,
    TrainState,
    first_copy,
    times_of_step,
    unpack_state,
)

log = logging.getLogger("soft_truncation")


_STEPS_THAT_PAY = 100  # for loading a training step that has been compiled


class TrainingLog:
    """Writes losses, rates and skipped steps to the log and to metrics.jsonl."""

    def __init__(
        self,
        setup: Setup,
        train: Dataset,
        files: RunFiles | None,
        workdir: pathlib.Path,
    ) -> None:
        """On processes that write no files, `files` is None."""
        self._setup, self._files, self._workdir = setup, files, workdir
        self._train = train
        self._sums = LossSums()
        self._window_start, self._window_steps, self._compiled = time.monotonic(), 0, False

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """A context whose duration does not count for the training speed."""
        before = time.monotonic()
        yield
        self._window_start += time.monotonic() - before

    def skipped_in_a_row(self) -> int:
        """The number of steps in a row, up to the last one, that were skipped."""
        return int(self._sums.read()["streak"])

    def after_call(
        self, step: int, count: int, values: dict[str, Array], packed: TrainState
    ) -> None:
        """Add the metrics of `count` steps, (count,) each, and log them if `step` is due.

        `packed` is the state after them.

        Raises:
          UserError: the loss or gradient was not finite for too many steps in a row.
        """
        training = self._setup.loop
        self._window_steps += count
        self._sums.add(values)
        logs = step % training.log_freq == 0 or step == training.n_iters
        if not (logs or not self._compiled or training.saves_at(step)):
            return  # reading a value would make the host wait for the device
        sums = self._sums.read()
        last = {name: value[-1] for name, value in values.items()}
        if sums["streak"] >= training.max_skipped_steps:
            self._give_up(step, sums["streak"], last, packed)
        if not logs and self._compiled:
            return
        seconds = time.monotonic() - self._window_start
        rate = training.batch_size * self._window_steps / seconds
        mean = sums["loss"] / max(sums["steps"], 1)
        if logs and self._files and sums["steps"]:
            row = {"loss": mean, "tau": float(last["tau"])}
            if not last["skipped"]:
                row["grad_norm"] = float(last["grad_norm"])
            row |= {"images_per_second": rate} if self._compiled else {}
            row |= {"skipped": sums["skipped"]} if sums["skipped"] else {}
            self._files.metrics.write(step, row)
        skipped = f" | {sums['skipped']} steps skipped" if sums["skipped"] else ""
        if self._compiled:
            left = clock((training.n_iters - step) * seconds / self._window_steps)
            log.info(
                "step %d/%d | %.0f images/s | loss %.4g%s | %s left",
                step,
                training.n_iters,
                rate,
                mean,
                skipped,
                left,
            )
        else:
            log.info(
                "step %d/%d | compiled in %.0f s | loss %.4g%s",
                step,
                training.n_iters,
                seconds,
                mean,
                skipped,
            )
        if logs:
            self._sums.reset(int(sums["streak"]))
        if not self._compiled and training.n_iters - step >= _STEPS_THAT_PAY:
            environment.load_compiled()
        self._compiled = True
        self._window_start, self._window_steps = time.monotonic(), 0

    def _images(self, step: int) -> np.ndarray:
        seed, size = self._setup.seed, self._setup.loop.batch_size
        return next(train_batches(self._train, size, seed, step - 1))["image"]

    def _fault(self, step: int, values: dict[str, Array], packed: TrainState) -> str:
        """Which of data, parameters, loss and gradient was the first that was not finite."""
        if not np.isfinite(self._images(step)).all():
            return "data"
        params = unpack_state(first_copy(packed)).params
        if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params)):
            return "parameters"
        return "gradient" if np.isfinite(values["loss"]) else "loss"

    def _give_up(
        self, step: int, streak: float, values: dict[str, Array], packed: TrainState
    ) -> NoReturn:
        """Write what is known about the step to not_finite.json, and raise a UserError."""
        setup = self._setup
        tau, t = times_of_step(setup.objective, setup.seed, step - 1, self._images(step))
        path = self._workdir / "not_finite.json"
        numbers = {name: repr(float(values[name])) for name in ("loss", "grad_norm")}
        fault, times = self._fault(step, values, packed), np.asarray(t, float).tolist()
        facts = {"step": step, "first": fault, **numbers, "tau": float(tau), "t": times}
        if self._files:
            with can_do_without(path):
                write_text(path, json.dumps(facts, indent=1) + "\n")
        raise UserError(
            f"the loss is {numbers['loss']} and its gradient's norm {numbers['grad_norm']} at step "
            f"{step} (τ = {float(tau):.3g}, t from {float(t.min()):.3g} to {float(t.max()):.3g}), "
            f"not finite for {streak} steps in a row, and first of all the {fault}; training "
            f"stops, the last good checkpoint is kept, and {path} has all times"
        )
