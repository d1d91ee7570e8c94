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
from runtime.metrics_log import read_metrics
from runtime.pictures import plot_training
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
_DAY = 24 * 3600.0


_EVALUATIONS = 5  # since the least loss on test images, until a rise is told of


def plot_metrics(workdir: pathlib.Path) -> None:
    """Draw training.png from a run's metrics."""
    with can_do_without(workdir / "training.png"):
        plot_training(workdir / "metrics.jsonl", workdir / "training.png")


class _Window:
    """The steps since a moment, and the seconds that they took."""

    def __init__(self) -> None:
        self.start, self.steps = time.monotonic(), 0

    def seconds(self) -> float:
        return time.monotonic() - self.start


class TrainingLog:
    """Writes losses, rates and skipped steps: rows to metrics.jsonl by steps, lines by time.

    A line follows the one before after 10 s at first, and after a twentieth of the time that the
    training has taken, or 5 minutes, later on.
    """

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
        self._start, self._compiled, self._advised = time.monotonic(), False, False
        self._rise_told = False
        self._loads = False  # whether the next call is slower, since it loads what was compiled
        self._row, self._line = _Window(), _Window()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """A context whose duration does not count for the training speed."""
        before = time.monotonic()
        yield
        passed = time.monotonic() - before
        for window in (self._row, self._line):
            window.start += passed

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
        self._row.steps += count
        self._line.steps += count
        self._sums.add(values)
        slow, self._loads = self._loads, False
        done = step == training.n_iters
        logs = step % training.log_freq == 0 or done
        late = self._line.seconds() > self._patience() and not slow
        tells = done or late or not self._compiled
        if logs or tells or training.saves_at(step):  # the host waits for the device
            last = {name: value[-1] for name, value in values.items()}
            self._report(step, logs, tells, last, packed)
        if slow:
            self._row, self._line = _Window(), _Window()

    def after_test(self, step: int, loss: float) -> None:
        """Log the loss on test images, and warn once if it has risen for long."""
        log.info("step %d | loss on test images, with EMA %.4g", step, loss)
        if not self._files:
            return
        self._files.metrics.write(step, {"test_loss": loss})
        plot_metrics(self._workdir)
        rows = read_metrics(self._workdir / "metrics.jsonl")
        losses = {row["step"]: row["test_loss"] for row in rows if "test_loss" in row}
        best = min(losses, key=losses.__getitem__, default=step)
        later = [value for at, value in losses.items() if at > best]
        if self._rise_told or len(later) < _EVALUATIONS or loss < 1.02 * losses[best]:
            return
        self._rise_told = True
        kept = max(round(best / self._setup.loop.snapshot_freq), 1)
        log.warning(
            "the loss on test images has risen from %.4g at step %d: the network learns its "
            "training images by heart; more images, dropout or a smaller network help. Evaluate "
            "or sample the checkpoint near its least with --config.eval.begin_ckpt=%d "
            "--config.eval.end_ckpt=%d",
            losses[best],
            best,
            kept,
            kept,
        )

    def _report(
        self, step: int, logs: bool, tells: bool, last: dict[str, Array], packed: TrainState
    ) -> None:
        """Write a row if it `logs`, and a line if it `tells`; give up if nothing is finite."""
        training, sums = self._setup.loop, self._sums.read()
        if sums["streak"] >= training.max_skipped_steps:
            self._give_up(step, sums["streak"], last, packed)
        if logs and self._files and sums["steps"]:
            self._write_row(step, sums, last)
        if tells or (logs and sums["skipped"]):
            self._tell(step, sums)
        if logs:
            self._sums.reset(int(sums["streak"]))
            self._row = _Window()
        if not self._compiled:
            self._compiled, self._row, self._line = True, _Window(), _Window()
            if training.n_iters - step >= _STEPS_THAT_PAY:
                environment.load_compiled()
                self._loads = True

    def _patience(self) -> float:
        """The seconds from one line to the next."""
        return min(max(10.0, (time.monotonic() - self._start) / 20), 300.0)

    def _write_row(self, step: int, sums: dict[str, float], last: dict[str, Array]) -> None:
        """Write the metrics since the last row to metrics.jsonl."""
        assert self._files is not None
        row = {"loss": sums["loss"] / sums["steps"], "tau": float(last["tau"])}
        if not last["skipped"]:
            row["grad_norm"] = float(last["grad_norm"])
        if self._compiled:
            images = self._setup.loop.batch_size * self._row.steps
            row["images_per_second"] = images / self._row.seconds()
        row |= {"skipped": sums["skipped"]} if sums["skipped"] else {}
        self._files.metrics.write(step, row)

    def _tell(self, step: int, sums: dict[str, float]) -> None:
        """Log a line: the loss since the last row, and the rate since the last line."""
        training, seconds = self._setup.loop, self._line.seconds()
        parts = [f"step {step}/{training.n_iters}"]
        if self._compiled:
            parts.append(f"{training.batch_size * self._line.steps / seconds:.0f} images/s")
        else:
            parts.append(f"compiled in {seconds:.0f} s")
        parts.append(f"loss {sums['loss'] / max(sums['steps'], 1):.4g}")
        parts += [f"{sums['skipped']} steps skipped"] if sums["skipped"] else []
        if self._compiled:
            left = (training.n_iters - step) * seconds / self._line.steps
            parts.append(f"{clock(left)} left")
        log.info("%s", " | ".join(parts))
        if self._compiled:
            self._advise(left)
        self._line = _Window()

    def _advise(self, left: float) -> None:
        """Warn once if a training on a CPU would take more than a day."""
        if left > _DAY and not self._advised and jax.default_backend() == "cpu":
            log.warning(
                "about %.0f days on this machine's CPU: the network is for a GPU; a smaller one, "
                "and fewer steps, are in configs/vp/folder_small.py",
                left / _DAY,
            )
        self._advised = True

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
