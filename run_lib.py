"""--mode train: the training loop."""

import contextlib
import functools
import logging
import os
import pathlib
import time
from collections.abc import Callable

import jax
from clu.parameter_overview import count_parameters
from ml_collections import ConfigDict

from build import Setup, get_train_call, set_up, with_classes, with_data_facts
from configs.errors import UserError
from data.batches import Data, facts_of_data
from datasets import load_data
from metrics.in_training import get_grid_fn, get_test_loss
from metrics.memory_advice import advise_on_training
from metrics.training_log import TrainingLog, plot_metrics
from modes.fine_tuning import start_from
from runtime import hosts, interrupts
from runtime.run_files import RunFiles
from runtime.workdir import (
    check_processes,
    record_data,
)
from train_step import (
    TrainState,
    first_copy,
    pack_state,
    replicate,
    steps_a_call,
    unpack_state,
)

log = logging.getLogger("soft_truncation")

# The training step takes so many times as long to compile and run first as the initialisation, on a
# CPU: 2.3 to 4.4 for the digits, folder_small and folder_st, whether or not they are in the cache.
_PER_INIT = 3.0


def train(
    config: ConfigDict,
    workdir: str | os.PathLike[str],
    override: bool = False,
    config_file: str = "",
    init_from: str = "",
) -> TrainState:
    """Train `config` in `workdir`, or resume an interrupted training there.

    On SIGTERM or SIGINT the current step is finished, the state is saved, and the function returns.

    Args:
      config: the config, which must be equal on every process.
      workdir: the run's folder; only the main process reads and writes it.
      override: whether the workdir may belong to another config.
      config_file: the file of the config, recorded in the workdir.
      init_from: a run or an exported model whose weights a new run starts from (`fine_tuning`).

    Returns:
      The last state.

    Raises:
      UserError: the config, the data or the workdir can't be used; or the loss was not finite, or
        saving failed, too many times in a row.
    """
    config = with_data_facts(config, workdir, override, init_from)
    workdir = pathlib.Path(workdir)
    setup, data = set_up(config, jax.device_count()), load_data(config)
    setup = with_classes(setup, data.train, anew=bool(init_from) or override)
    facts = facts_of_data(data)
    check_processes(setup.fields, facts)
    with contextlib.ExitStack() as stack:
        preemption = stack.enter_context(interrupts.Preemption())
        files = None
        if hosts.is_main():
            files = RunFiles(setup.fields, workdir, stack, override, config_file)
        restored = hosts.on_main(
            lambda: files and files.open(setup.state_shape, setup.loop), like=setup.state_shape
        )
        _log_start(setup, data, workdir)
        advise_on_training(setup)
        compiles = "seconds if it is in the cache, else up to minutes"
        if restored is None:
            before = time.monotonic()
            state = _first_state(setup, init_from)
            if jax.default_backend() == "cpu":
                compiles = f"about {_PER_INIT * (time.monotonic() - before):.0f} s on this machine"
        else:
            state = restored
            _log_resumed(int(state.step), setup.loop.n_iters, init_from, workdir)
        if files:
            if restored is None:
                files.record()
            record_data(workdir, facts)
        packed = replicate(pack_state(state), jax.local_device_count())
        del restored, state  # to free the device's memory
        if int(first_copy(packed.step)) < setup.loop.n_iters:
            log.info("compiling the training step: %s", compiles)
        packed = _loop(setup, data, packed, files, preemption, workdir)
        return _finish(setup, packed, files, workdir)


def _loop(
    setup: Setup,
    data: Data,
    packed: TrainState,
    files: RunFiles | None,
    preemption: interrupts.Preemption,
    workdir: pathlib.Path,
) -> TrainState:
    """Train to the last step, or until a signal asks to stop; returns the state then."""
    loop, step = setup.loop, int(first_copy(packed.step))
    train_call = get_train_call(setup, data.train, first_step=step)
    test_loss = get_test_loss(setup, data.test)
    draw_grid = get_grid_fn(setup, data.test, workdir)
    training_log = TrainingLog(setup, data.train, files, workdir)
    most = steps_a_call(loop)
    while step < loop.n_iters:
        count = most if step % most == 0 and step + most <= loop.n_iters else 1
        packed, values = train_call(packed, count)
        step += count
        training_log.after_call(step, count, values, packed)
        done, stop = step == loop.n_iters, preemption.requested()
        evaluates = step % loop.eval_freq == 0 or done
        samples = loop.snapshot_sampling and (step % loop.snapshot_freq == 0 or done)
        saves = loop.saves_at(step) or stop
        if not (evaluates or samples or saves):
            continue
        jax.block_until_ready(packed.step)  # waiting for queued steps is training
        with training_log.paused():
            unpacked = functools.cache(lambda p=packed: unpack_state(first_copy(p)))
            if evaluates:
                training_log.after_test(step, test_loss(unpacked().ema_params))
            if files and saves:
                broken = training_log.skipped_in_a_row() > 0 and not (stop or done)
                _save(files, step, unpacked, broken, stop)
            if stop and not done:
                break
            if samples:
                text = draw_grid(unpacked().ema_params, f"step_{step:08d}.png")
                log.info("step %d | %s", step, text)
            del unpacked  # or the state would be in memory twice during the next call
    return packed


def _first_state(setup: Setup, init_from: str) -> TrainState:
    log.info("initialising the parameters, which also compiles")
    state = setup.init_state()
    return start_from(setup, state, init_from) if init_from else state


def _log_resumed(step: int, num_steps: int, init_from: str, workdir: pathlib.Path) -> None:
    if init_from:
        log.warning("%s has a run already: it goes on, and --init_from is not read", workdir)
    if step > num_steps:
        log.warning("step %d is reached, training.n_iters is %d: no training", step, num_steps)
    else:
        log.info("resumed at step %d of %d", step, num_steps)


def _save(
    files: RunFiles, step: int, unpacked: Callable[[], TrainState], broken: bool, stop: bool
) -> None:
    if broken:
        log.warning("step %d | the loss is not finite: not saved", step)
        return
    files.saver.save(step, unpacked())
    if stop:
        log.info("step %d | saved", step)


def _finish(
    setup: Setup, packed: TrainState, files: RunFiles | None, workdir: pathlib.Path
) -> TrainState:
    state, num_steps = unpack_state(first_copy(packed)), setup.loop.n_iters
    step = int(state.step)
    if files:
        if not files.saver.settle():
            raise UserError("the last checkpoint could not be saved; make room, run this again")
        plot_metrics(workdir)
    if step < num_steps:
        log.info("stopped at step %d of %d; the same command resumes training", step, num_steps)
    else:
        log.info("done: %d steps; checkpoints and curves are in %s", step, workdir)
    return state


def _log_start(setup: Setup, data: Data, workdir: pathlib.Path) -> None:
    batch, devices = setup.loop.batch_size, jax.devices()
    log.info("workdir %s", workdir)
    log.info(
        "model %s: %s parameters, compute in %s",
        setup.network,
        f"{count_parameters(setup.state_shape.params):,}",
        setup.dtype,
    )
    log.info(
        "devices %d × %s, batch %d (%d per device), %.1f steps per epoch, %.3g epochs in all",
        len(devices),
        devices[0].device_kind,
        batch,
        batch // len(devices),
        len(data.train) / batch,
        batch * setup.loop.n_iters / len(data.train),
    )
    log.info(
        "every %d steps the loss on test images, every %d a checkpoint to keep%s",
        setup.loop.eval_freq,
        setup.loop.snapshot_freq,
        " and a grid of samples" if setup.loop.snapshot_sampling else "",
    )
    if setup.preprocessing.random_flip:
        log.info(
            "half of the images are mirrored in training: data.random_flip=False if that is wrong"
        )
    log.info("objective: %s", setup.objective_text)
    log.info("optimiser: %s", setup.optimizer_text)
