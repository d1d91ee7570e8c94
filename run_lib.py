"""The modes of main.py: training, sampling and importing; evaluation is in evaluation.py."""

import contextlib
import functools
import json
import logging
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any, NoReturn, cast

import jax
import jax.numpy as jnp
import numpy as np
from clu.parameter_overview import count_parameters
from jax import Array
from ml_collections import ConfigDict

import datasets
import losses
import seeds
from controllable_generation import PER_IMAGE, complete_test_images, completion_rows
from datasets import Data, load_data
from errors import UserError
from evaluation import evaluate, make_statistics
from fine_tuning import start_from
from metrics.card import model_card
from official import export_checkpoint, import_checkpoint
from runtime import checkpointing, environment, exported, hosts
from runtime.devices import batch_and_replicated_shardings, to_devices
from runtime.files import beside, can_do_without, replacing, write_text
from runtime.locking import locked
from runtime.metrics_log import Metrics
from runtime.pictures import (
    plot_training,
    png_writer,
    read_pngs,
    save_grid,
    start_png_folder,
    write_labels,
)
from runtime.progress import Progress, clock
from runtime.workdir import (
    check_processes,
    claim_workdir,
    make_folder,
    portable_config,
    record_data,
    short_hash,
)
from session import (
    Setup,
    advise_on_sampling,
    advise_on_training,
    get_sampler,
    get_train_call,
    init_state,
    objective_in_words,
    sample_batches,
    sample_labels,
    set_up,
    with_classes,
    with_data_facts,
    with_labels,
)
from train_step import (
    LossSums,
    TrainState,
    first_copy,
    pack_state,
    replicate,
    steps_a_call,
    unpack_state,
)

__all__ = ["evaluate", "export", "import_official", "make_statistics", "sample", "train"]

log = logging.getLogger("soft_truncation")

_STEPS_THAT_PAY = 100  # for loading a training step that has been compiled


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
      override: continue in a workdir of another config.
      config_file: the file of the config, recorded in the workdir.
      init_from: a run or an exported model whose weights a new run starts from (`fine_tuning`).

    Returns:
      The last state.

    Raises:
      UserError: the config, the data or the workdir can't be used; or the loss is not finite, or
        saving fails, too often in a row.
    """
    config = with_data_facts(config, workdir, override, init_from)
    workdir, training, num_steps = pathlib.Path(workdir), config.training, config.training.n_iters

    # Model, optimiser and objective; data.
    setup, data = set_up(config, jax.device_count()), load_data(config)
    config = with_classes(config, data.train, anew=bool(init_from) or override)
    facts = datasets.facts_of_data(data)
    check_processes(config, facts)

    with contextlib.ExitStack() as stack:
        preemption = stack.enter_context(hosts.Preemption())

        # Resume: the main process locks the workdir and reads the newest checkpoint.
        files = None
        if hosts.is_main():
            files = _Files(config, workdir, stack, override, config_file)
        restored = hosts.on_main(
            lambda: files and files.open(setup.state_shape), like=setup.state_shape
        )
        _log_start(config, setup, data, workdir)
        advise_on_training(config)
        state = restored or init_state(config, setup.model, setup.optimizer)
        if init_from and not restored:
            state = start_from(config, setup, state, init_from)
        elif init_from:
            log.warning("%s has a run already: it goes on, and --init_from is not read", workdir)
        if files:
            if not restored:
                files.record()
            record_data(workdir, facts)
        step = int(state.step)
        if step > num_steps:
            log.warning("step %d is reached, training.n_iters is %d: no training", step, num_steps)
        elif restored is not None:
            log.info("resumed at step %d of %d", step, num_steps)
        packed = replicate(pack_state(state), jax.local_device_count())
        del restored, state  # to free the device's memory

        # The training step, and the functions that are called between steps.
        train_call = get_train_call(config, setup, data.train, first_step=step)
        test_loss = _get_test_loss(config, setup, data.test)
        draw_grid = _get_grid_fn(config, setup, data.test, workdir)
        training_log = _TrainingLog(config, setup, data.train, files, workdir)
        most = steps_a_call(config)
        hosts.describe_run(lambda: (f" at step {step}", _goes_on_from(workdir)))

        # The loop.
        while step < num_steps:
            count = most if step % most == 0 and step + most <= num_steps else 1
            packed, values = train_call(packed, count)
            step += count
            training_log.after_call(step, count, values, packed)
            done, stop = step == num_steps, preemption.requested()
            evaluates = step % training.eval_freq == 0 or done
            samples = training.snapshot_sampling and (step % training.snapshot_freq == 0 or done)
            saves = _saves(config, step) or stop
            if not (evaluates or samples or saves):
                continue
            jax.block_until_ready(packed.step)  # waiting for queued steps is training
            with training_log.paused():
                unpacked = functools.cache(lambda p=packed: unpack_state(first_copy(p)))
                if evaluates:
                    loss = test_loss(unpacked().ema_params)
                    log.info("step %d | loss on test images, with EMA %.4g", step, loss)
                    if files:
                        files.metrics.write(step, {"test_loss": loss})
                if files and saves:
                    if training_log.skipped_in_a_row() and not (stop or done):
                        log.warning("step %d | the loss is not finite: not saved", step)
                    else:
                        files.saver.save(step, unpacked())
                        if stop:
                            log.info("step %d | saved", step)
                if stop and not done:
                    break
                if samples:
                    text = draw_grid(unpacked().ema_params, f"step_{step:08d}.png")
                    log.info("step %d | %s", step, text)
                del unpacked  # or the state would be in memory twice during the next call

        # The end.
        state = unpack_state(first_copy(packed))
        if files:
            if not files.saver.settle():
                raise UserError("the last checkpoint could not be saved; make room, run this again")
            with can_do_without(workdir / "training.png"):
                plot_training(workdir / "metrics.jsonl", workdir / "training.png")
        if step < num_steps:
            log.info("stopped at step %d of %d; the same command resumes training", step, num_steps)
        else:
            log.info("done: %d steps; checkpoints and curves are in %s", step, workdir)
        return state


def _log_start(config: ConfigDict, setup: Setup, data: Data, workdir: pathlib.Path) -> None:
    batch, devices = config.training.batch_size, jax.devices()
    log.info("workdir %s", workdir)
    log.info(
        "model %s: %s parameters, compute in %s",
        config.model.name,
        f"{count_parameters(setup.state_shape.params):,}",
        config.model.dtype,
    )
    log.info(
        "devices %d × %s, batch %d (%d per device), %.1f steps per epoch",
        len(devices),
        devices[0].device_kind,
        batch,
        batch // len(devices),
        len(data.train) / batch,
    )
    training = config.training
    log.info("objective: %s", objective_in_words(config))
    if training.mixed:
        log.info(
            "mixed: half of a batch has variance weighting and uniform time, with weight %g%s",
            training.ddpm_weight,
            " times the ratio of the halves' losses" if training.balanced else "",
        )
    if training.reconstruction_loss:
        log.info("with the reconstruction loss, %s data", config.data.dequantization)


class _Files:
    """The files that the main process has open during training."""

    def __init__(
        self,
        config: ConfigDict,
        workdir: pathlib.Path,
        stack: contextlib.ExitStack,
        override: bool,
        config_file: str,
    ) -> None:
        self._config, self._workdir, self._stack = config, workdir, stack
        self._override, self._config_file = override, config_file

    def record(self) -> None:
        """Write the config to the workdir; what is there was saved under the config before."""
        claim_workdir(self._config, self._workdir, True, self._override, self._config_file)

    def open(self, shape: TrainState) -> TrainState | None:
        """Lock the workdir, and return the newest state, or None if there is none."""
        config, workdir = self._config, self._workdir
        exported.refuse(workdir)
        claim_workdir(config, workdir, record=False, override=self._override)
        make_folder(workdir, "--workdir")
        self._stack.enter_context(locked(workdir))
        manager = self._stack.enter_context(checkpointing.checkpoints(config, workdir))
        state = checkpointing.restore_newest(manager, shape)
        on_first = None if state is None else self.record
        self.saver = checkpointing.Saver(manager, config.training.max_failed_saves, on_first)
        self.metrics = Metrics(workdir, 0 if state is None else int(state.step))
        self._stack.callback(self.metrics.close)
        return jax.tree.map(np.asarray, state)


def _goes_on_from(workdir: pathlib.Path) -> str:
    steps = [int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdigit()]
    return f"from step {max(steps)}" if steps else "from the start"


def _saves(config: ConfigDict, step: int) -> bool:
    training = config.training
    regular = (training.snapshot_freq, training.snapshot_freq_for_preemption)
    return step == training.n_iters or any(step % freq == 0 for freq in regular)


class _TrainingLog:
    """Writes losses, rates and skipped steps to the log and to metrics.jsonl."""

    def __init__(
        self,
        config: ConfigDict,
        setup: Setup,
        train: datasets.Dataset,
        files: _Files | None,
        workdir: pathlib.Path,
    ) -> None:
        self._config, self._setup, self._files, self._workdir = config, setup, files, workdir
        self._train = train
        self._sums = LossSums()
        self._window_start, self._window_steps, self._compiled = time.monotonic(), 0, False

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The time spent within this context does not count for the training speed."""
        before = time.monotonic()
        yield
        self._window_start += time.monotonic() - before

    def skipped_in_a_row(self) -> int:
        """The number of steps skipped in a row at the end."""
        return int(self._sums.read()["streak"])

    def after_call(
        self, step: int, count: int, values: dict[str, Array], packed: TrainState
    ) -> None:
        """Add the metrics of `count` steps, (count,) each, and log them if `step` is due.

        `packed` is the state after them.

        Raises:
          UserError: the loss or gradient was not finite for too many steps in a row.
        """
        training = self._config.training
        self._window_steps += count
        self._sums.add(values)
        logs = step % training.log_freq == 0 or step == training.n_iters
        if not (logs or not self._compiled or _saves(self._config, step)):
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

    def _fault(self, step: int, values: dict[str, Array], packed: TrainState) -> str:
        """What of a step is not finite, the first of what follows from each other."""
        seed, size = self._config.seed, self._config.training.batch_size
        images = next(datasets.train_batches(self._train, size, seed, step - 1))["image"]
        if not np.isfinite(images).all():
            return "data"
        params = unpack_state(first_copy(packed)).params
        if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params)):
            return "parameters"
        return "gradient" if np.isfinite(values["loss"]) else "loss"

    def _give_up(
        self, step: int, streak: float, values: dict[str, Array], packed: TrainState
    ) -> NoReturn:
        """Write what is known of the step to not_finite.json, and raise a UserError."""
        config = self._config
        tau, t = self._setup.objective.times_of_step(
            config.seed, step - 1, config.training.batch_size
        )
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


def _get_test_loss(
    config: ConfigDict, setup: Setup, test: datasets.Dataset
) -> Callable[[Any], float]:
    """A function params → the loss on up to four batches of test images, with fixed noise.

    All devices share each batch, so every process must call it.
    """
    config = config.copy_and_resolve_references()
    if config.training.truncation == "soft":
        # The same expectation without the variance of drawing a single truncation for the batch.
        config.training.truncation = "equivalent_weight"
    # Terms that depend on τ other than by the weight are left out.
    config.training.update(reconstruction_loss=False, balanced=False)
    chosen = datasets.in_order(test, min(1000, config.training.batch_size * 4))
    images, labels = chosen["image"], chosen["label"]
    size = min(len(images), config.training.batch_size)
    size = config.training.batch_size = max(size - size % 2, 1)  # `mixed` needs pairs
    objective = losses.get_objective(config, setup.sde)

    @jax.jit
    def mean_loss(params: Any, key: Array, images: Array, index: Array) -> Array:
        score_fn = setup.make_score_fn(params)
        return jnp.mean(objective(score_fn, key, images, index, train=False)[0])

    def test_loss(params: Any) -> float:
        values = []
        rows, everywhere = batch_and_replicated_shardings()
        whole = size % jax.device_count() > 0  # a handful of images
        rows = everywhere if whole else rows
        params = to_devices(params, everywhere)
        for start in range(0, len(images) - size + 1, size):
            key = to_devices(losses.step_key(config.seed + seeds.TEST_LOSS, start), everywhere)
            batch = to_devices((images[start : start + size], np.arange(size)), rows)
            given = with_labels(config, params, labels[start : start + size], whole=whole)
            values.append(float(mean_loss(given, key, *batch)))
        return float(np.mean(values))

    return test_loss


def _get_grid_fn(
    config: ConfigDict, setup: Setup, test: datasets.Dataset, workdir: pathlib.Path
) -> Callable[[Any, str], str]:
    """A function (params, file name) → a sentence for the log; it makes a grid of samples.

    The noise is the same each time.
    """
    sample, num_levels = get_sampler(config, setup, config.sampling.batch_size), setup.num_levels
    few = datasets.in_order(test, 500)["image"]

    def draw(params: Any, name: str) -> str:
        levels = sample(params, jax.random.key(config.seed + seeds.GRIDS)).levels
        path = workdir / "samples" / name
        if hosts.is_main():
            with can_do_without(path):
                save_grid(setup.units.to_pictures(levels), path)
        where = f"samples in {path}" if path.exists() else "samples"
        if not num_levels:
            return where
        share, usual = (datasets.share_at_ends(part, num_levels) for part in (levels, few))
        return f"{where}; {share:.1%} at the ends of the range ({usual:.1%} of test data)"

    return draw


def sample(config: ConfigDict, workdir: str | os.PathLike[str]) -> pathlib.Path:
    """Generate, inpaint or colour `sampling.n_images` images with a checkpoint's EMA weights.

    The checkpoint is the newest, or the one that eval.begin_ckpt and end_ckpt choose.

    Returns:
      The path of a grid of the images, samples/<task>.png (samples/samples.png for "generate").

    An .npz file beside it has all images: `samples`, (N, H, W, C) uint8, pixel values 0 … 255 (of
    an array data set in the type and the units of the data), and for the other tasks `originals`
    and `known` in the same format. A model that is told labels has `labels`, (N,), there, and a row
    of the grid for each label if they have equally many. With
    `sampling.format` npy they are samples.npy and labels.npy; with png, a file for each in
    samples/png, where dataset.json has the labels, and an interrupted run goes on.

    Raises:
      UserError: the config, the data or the checkpoint can't be used.
    """
    config, workdir = with_data_facts(config, workdir), pathlib.Path(workdir)
    setup, task = set_up(config), config.sampling.task
    check_processes(config, {})
    data = None if task == "generate" else load_data(config)
    steps = hosts.on_main(lambda: checkpointing.steps_to_evaluate(config, workdir))
    if len(steps) > 1:
        raise UserError(
            f"eval.begin_ckpt and end_ckpt choose {len(steps)} checkpoints; --mode sample takes one"
        )
    state = checkpointing.restore_step(config, workdir, setup.state_shape, steps[0])
    log.info("task %s with step %d of %s", task, int(state.step), workdir)
    folder = workdir / "samples"
    hosts.on_main(lambda: make_folder(folder, "--workdir"))
    if data is None:
        return _generate(config, setup, state, folder)
    levels, path = complete_test_images(config, setup, data.test, state.ema_params), folder / task
    if hosts.is_main():
        pictures = {name: setup.units.to_pictures(part) for name, part in levels.items()}
        save_grid(completion_rows(pictures), path.with_suffix(".png"), PER_IMAGE + 2)
        files = {name: setup.units.to_files(part) for name, part in levels.items()}
        with replacing(path.with_suffix(".npz")) as file:
            np.savez_compressed(file, **cast(Any, files))
    log.info("%d images in %s.png and .npz", len(levels["samples"]), path)
    return path.with_suffix(".png")


def _generate(
    config: ConfigDict, setup: Setup, state: TrainState, folder: pathlib.Path
) -> pathlib.Path:
    """Draw samples, write them in `sampling.format`, and return the path of their grid."""
    count, kind = config.sampling.n_images, config.sampling.format
    labels = sample_labels(config, 0, count) if config.model.num_classes else None
    if kind == "png":
        to, pictures = folder / "png", _generate_pngs(config, setup, state, folder / "png", labels)
    else:
        to = folder / f"samples.{kind}"
        levels = np.concatenate([part for _, part in _draw(config, setup, state)])
        pictures = setup.units.to_pictures(levels[:_MOST_SHOWN])
        hosts.on_main(lambda: _write_arrays(to, setup.units.to_files(levels), labels))
    path = folder / "samples.png"
    if hosts.is_main():
        _save_samples_grid(pictures, None if labels is None else labels[: len(pictures)], path)
    log.info("%d images in %s, a grid in %s", count, to, path)
    return path


def _draw(
    config: ConfigDict, setup: Setup, state: TrainState, present: Collection[int] = ()
) -> Iterator[tuple[int, np.ndarray]]:
    """(index of the first, levels) of each batch of samples that is not `present` as a whole."""
    count = config.sampling.n_images
    size = min(config.sampling.batch_size, count)
    advise_on_sampling(config, "sampling.batch_size", size)
    progress = Progress("sampling", count)
    progress.advance(len({i for i in present if i < count}), fresh=False)
    sampler, params = get_sampler(config, setup, size), state.ema_params
    for start, part in sample_batches(sampler, params, config.seed, count, size, present=present):
        yield start, part.levels
        new = set(range(start, start + len(part.levels))).difference(present)
        progress.advance(len(new), f"{part.nfe} evaluations")


def _write_arrays(to: pathlib.Path, samples: np.ndarray, labels: np.ndarray | None) -> None:
    """Write samples to an .npz file with their labels, or to an .npy with labels.npy beside it."""
    arrays = {"samples": samples} if labels is None else {"samples": samples, "labels": labels}
    if to.suffix == ".npz":
        with replacing(to) as file:
            np.savez_compressed(file, **cast(Any, arrays))
        return
    for name, array in arrays.items():
        with replacing(to.with_name(f"{name}.npy")) as file:
            np.save(file, array)


def _generate_pngs(
    config: ConfigDict,
    setup: Setup,
    state: TrainState,
    to: pathlib.Path,
    labels: np.ndarray | None,
) -> np.ndarray:
    """Draw the samples that the folder `to` lacks into a file each; returns the first of all."""
    # These fields do not change a sample, but for the batch's size with some samplers.
    free = ("n_images", "format", "batch_size", "show_channels")
    settings = {name: value for name, value in config.sampling.items() if name not in free}
    source = {"seed": config.seed, "step": int(state.step), "weights": short_hash(state.ema_params)}
    source |= {"dtype": config.model.dtype, "sampling": settings}
    source["dequantization"] = config.data.dequantization
    if config.sampling.method == "pc":
        source["num_scales"] = config.model.num_scales

    def finish() -> np.ndarray:
        if labels is not None:
            write_labels(to, labels)
        return read_pngs(to, min(config.sampling.n_images, _MOST_SHOWN))

    with contextlib.ExitStack() as stack:
        # Two samplings would delete each other's partial files.
        hosts.on_main(lambda: stack.enter_context(locked(to.parent)))
        present = set(hosts.on_main(lambda: sorted(start_png_folder(to, source))))
        with png_writer(to) if hosts.is_main() else contextlib.nullcontext() as write_pngs:
            for start, levels in _draw(config, setup, state, present):
                if write_pngs:
                    write_pngs(start, setup.units.to_files(levels))
        return hosts.on_main(finish)


_MOST_SHOWN = 1024  # samples in a grid


def _save_samples_grid(images: np.ndarray, labels: np.ndarray | None, path: pathlib.Path) -> None:
    """Write a grid, of a row for each label if these have equally many samples."""
    columns = 0
    if labels is not None:
        kinds, counts = np.unique(labels, return_counts=True)
        images = images[np.argsort(labels, kind="stable")]
        columns = int(counts[0]) if len(kinds) > 1 and len(set(counts)) == 1 else 0
    save_grid(images, path, columns)


def import_official(
    config: ConfigDict,
    workdir: str | os.PathLike[str],
    path: str | pathlib.Path,
    config_file: str = "",
) -> TrainState:
    """Convert an official PyTorch checkpoint to a workdir, to evaluate, sample or train further.

    Returns:
      The state that was saved.

    Raises:
      UserError: the file can't be read or is of another network, or the workdir has checkpoints.
    """
    config, workdir = with_data_facts(config, workdir), pathlib.Path(workdir)
    setup = set_up(config)
    state = import_checkpoint.load_state(path, config)
    exported.refuse(workdir)
    if any(path.name.isdigit() for path in (workdir / "checkpoints").glob("*")):
        raise UserError(f"{workdir} has checkpoints already; choose another --workdir")
    claim_workdir(config, workdir, record=True, config_file=config_file)
    with locked(workdir), checkpointing.checkpoints(config, workdir) as manager:
        saver = checkpointing.Saver(manager, max_failures=1)
        saver.save(int(state.step), state)
        saver.settle()
    log.info(
        "imported %s: %s, %s parameters, step %d, into %s",
        path,
        config.model.name,
        f"{count_parameters(setup.state_shape.params):,}",
        int(state.step),
        workdir,
    )
    return state


def _step_to_export(config: ConfigDict, workdir: pathlib.Path) -> int:
    """The step of the newest checkpoint, or of the one that eval.begin_ckpt and end_ckpt choose.

    Raises:
      UserError: there is none, or they choose several.
    """
    steps = hosts.on_main(lambda: checkpointing.steps_to_evaluate(config, workdir))
    if len(steps) > 1:
        raise UserError(f"eval.begin_ckpt and end_ckpt choose {len(steps)} checkpoints, not one")
    return steps[0]


@contextlib.contextmanager
def _exporting(to: pathlib.Path) -> Iterator[pathlib.Path]:
    """A path to write to, which becomes `to` when all is written, and is removed otherwise."""
    partial = beside(to)
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        partial.rename(to)
    except OSError as error:
        raise UserError(f"--to: {to} can't be written to: {error}") from error
    finally:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)


def export(
    config: ConfigDict, workdir: str | os.PathLike[str], to: str | os.PathLike[str]
) -> pathlib.Path:
    """Write the EMA weights of a checkpoint to a folder for others.

    The folder gets model.safetensors, config.json without this machine's paths, and README.md, a
    model card with the scores of the run's report if that is of these weights. It evaluates and
    samples as a run does, by --workdir.

    Args:
      config: the run's config.
      workdir: the run; the checkpoint is the newest, or the one that eval.begin_ckpt and end_ckpt
        choose.
      to: the folder, which must be new or empty.

    Returns:
      The folder.

    Raises:
      UserError: the checkpoint can't be read, or `to` has files or can't be written to.
    """
    config, workdir = with_data_facts(config, workdir), pathlib.Path(workdir)
    folder, step = pathlib.Path(to).absolute(), _step_to_export(config, workdir)
    params = checkpointing.restore_step(
        config, workdir, set_up(config).state_shape, step
    ).ema_params

    def write() -> None:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"--to: {folder} is not empty; name a new folder")
        own = portable_config(config, workdir)
        with _exporting(folder) as partial:
            partial.mkdir()
            (partial / "config.json").write_text(own.to_json_best_effort(indent=1) + "\n")
            (partial / "README.md").write_text(model_card(folder.name, own, workdir, step, params))
            exported.write(partial, params, step)
        size = (folder / exported.WEIGHTS).stat().st_size / 2**20
        log.info("step %d of %s in %s (%.1f MiB), with a card", step, workdir, folder, size)

    hosts.on_main(write)
    return folder


def export_official(
    config: ConfigDict, workdir: str | os.PathLike[str], to: str | os.PathLike[str]
) -> pathlib.Path:
    """Write a checkpoint, with the whole state of training, to a .pth file of the official release.

    Args:
      config, workdir: as in `export`.
      to: the new file.

    Returns:
      The file.

    Raises:
      UserError: the checkpoint can't be read, the release has no such network, or `to` exists or
        can't be written to.
    """
    config, workdir = with_data_facts(config, workdir), pathlib.Path(workdir)
    file, step = pathlib.Path(to).absolute(), _step_to_export(config, workdir)
    exported.refuse(workdir)
    import_checkpoint.check_network(config)
    shape = set_up(config).state_shape
    state = checkpointing.restore_step(config, workdir, shape, step, weights_only=False)

    def write() -> None:
        if file.exists():
            raise UserError(f"--to: {file} is there already; name a new file")
        with _exporting(file) as partial:
            export_checkpoint.write(config, state, partial)
        log.info("step %d of %s in %s, as the official release's", step, workdir, file)

    hosts.on_main(write)
    return file
