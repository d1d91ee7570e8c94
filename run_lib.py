"""The loops: training, import and sampling in a workdir; eval_lib.py has the evaluation."""

import contextlib
import functools
import itertools
import json
import logging
import math
import os
import pathlib
import time
from collections.abc import Iterator
from typing import Any, NoReturn, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from ml_collections import ConfigDict
from PIL import Image

import checkpointing
import controllable_generation
import datasets
import hosts
import import_checkpoint
import losses
import reporting
import storage
from configs.default import UserError
from datasets import Data, load_data
from eval_lib import evaluate, make_statistics
from models import utils as mutils
from session import (
    Setup,
    gather,
    get_sampler,
    init_state,
    mesh_shardings,
    sample_batches,
    set_up,
    spread,
)

__all__ = ["evaluate", "import_official", "make_statistics", "sample", "train"]

log = logging.getLogger("soft_truncation")


def _report_start(config: ConfigDict, setup: Setup, data: Data, workdir: pathlib.Path) -> None:
    batch, devices = config.training.batch_size, jax.devices()
    log.info("workdir %s", workdir)
    log.info(
        "model %s: %s parameters, compute in %s",
        *(config.model.name, f"{mutils.count_params(setup.state_shape.params):,}"),
        config.model.dtype,
    )
    log.info(
        "devices %d × %s, batch %d (%d a device), %.1f steps an epoch",
        *(len(devices), devices[0].device_kind, batch, batch // len(devices)),
        len(data.train) / batch,
    )
    training = config.training
    flag = "likelihood (g²)" if training.likelihood_weighting else "variance (σ²)"
    weight = training.weighting or flag
    drawn = "importance-sampled" if training.importance_sampling else "uniform"
    prior = f"k = {training.k:g}" if training.prior == "power" else f"{training.prior} prior"
    log.info(
        "objective: %s, %s weighting, %s time, %s truncation%s, ε = %g",
        *(training.sde, weight, drawn, training.truncation.replace("_", " ")),
        *("" if training.truncation == "fixed" else f", {prior}", training.truncation_time),
    )
    if training.mixed:
        log.info(
            "mixed: half of a batch has the variance weighting and uniform time, times %g%s",
            *(training.ddpm_weight, " times the halves' ratio" if training.balanced else ""),
        )
    if training.reconstruction_loss:
        log.info("with the reconstruction loss, %s data", config.data.dequantization)


def train(
    config: ConfigDict, workdir: str | os.PathLike[str], override: bool = False
) -> losses.TrainState:
    """Train `config` in `workdir`, or go on where an interrupted run of it left off.

    On SIGTERM or SIGINT it finishes the step, saves and returns.

    Args:
      config: of the run; the same on all processes.
      workdir: of the run; the main process alone reads and writes it.
      override: go on in the workdir of another config.

    Returns:
      The last state.

    Raises:
      UserError: the config, the data or the workdir can't be used, or the loss or the disk stays
        broken.
    """
    workdir = pathlib.Path(workdir)
    setup, data = set_up(config), load_data(config)
    files = _Files(config, workdir) if hosts.is_main() else None
    try:
        with hosts.Preemption() as preemption:
            restored = hosts.on_main(lambda: files and files.open(setup.state_shape, override))
            _report_start(config, setup, data, workdir)
            return _train(config, setup, data, workdir, files, restored, preemption)
    finally:
        if files:
            files.close()


class _Files:
    """What the main process has open while it trains."""

    def __init__(self, config: ConfigDict, workdir: pathlib.Path) -> None:
        self._config, self._workdir = config, workdir
        self._stack = contextlib.ExitStack()

    def open(self, shape: losses.TrainState, override: bool) -> losses.TrainState | None:
        """Take hold of the workdir; the newest state that is there, or None."""
        config, workdir = self._config, self._workdir
        storage.claim_workdir(config, workdir, record=False, override=override)
        storage.make_folder(workdir, "--workdir")
        self._stack.enter_context(storage.locked(workdir))
        manager = self._stack.enter_context(checkpointing.checkpoints(config, workdir))
        state = checkpointing.restore_newest(manager, shape)
        storage.claim_workdir(config, workdir, record=True, override=override)
        self.saver = checkpointing.Saver(manager, config.training.max_failed_saves)
        self.metrics = storage.Metrics(workdir, 0 if state is None else int(state.step))
        self._stack.callback(self.metrics.close)
        return jax.tree.map(np.asarray, state)

    def close(self) -> None:
        self._stack.close()


def _train(
    config: ConfigDict,
    setup: Setup,
    data: Data,
    workdir: pathlib.Path,
    files: _Files | None,
    restored: losses.TrainState | None,
    preemption: hosts.Preemption,
) -> losses.TrainState:
    training, num_steps = config.training, config.training.n_iters
    first_step = 0 if restored is None else int(restored.step)
    if restored is not None:
        log.info("resumed at step %d of %d", first_step, num_steps)
    first = restored or init_state(config, setup.model, setup.optimizer)
    packed = replicate(losses.pack_state(first), jax.local_device_count())
    del restored, first  # or they would stay in the device's memory
    call = get_call(config, setup, data.train, first_step)
    test_loss = _get_test_loss(config, setup, data.test)
    draw_grid = _get_grid_fn(config, setup, workdir)
    tally = _Tally()
    steps = _steps(config, setup, packed, call, tally, files, workdir)
    for packed, step in steps:
        done, stop = step == num_steps, preemption.requested(step)
        unpacked = functools.cache(lambda packed=packed: losses.unpack_state(first_copy(packed)))
        if files and (step % training.eval_freq == 0 or done):
            loss = test_loss(unpacked().ema_params)
            files.metrics.write(step, {"test_loss": loss})
            log.info("step %d | loss on test images, with EMA %.4g", step, loss)
        if files and (_saves(config, step) or stop):
            if tally.read()["streak"] and not (stop or done):
                log.warning("step %d | the loss is not finite: not saved", step)
            else:
                files.saver.save(step, unpacked())
                if stop:
                    log.info("step %d | saved", step)
        if stop and not done:
            break
        if training.snapshot_sampling and (step % training.snapshot_freq == 0 or done):
            path = draw_grid(unpacked().ema_params, f"step_{step:08d}.png")
            log.info("step %d | samples in %s", step, path)
    state = losses.unpack_state(first_copy(packed))
    if files:
        if not files.saver.settle():
            raise UserError("the last checkpoint could not be saved; make room and run this again")
        reporting.plot_training(workdir / "metrics.jsonl", workdir / "training.png")
    if int(state.step) < num_steps:
        log.info("stopped at step %d of %d; the same command goes on", state.step, num_steps)
    else:
        log.info("done: %d steps; checkpoints and curves are in %s", num_steps, workdir)
    return state


def _saves(config: ConfigDict, step: int) -> bool:
    training = config.training
    regular = (training.snapshot_freq, training.snapshot_freq_for_preemption)
    return step == training.n_iters or any(step % freq == 0 for freq in regular)


def _on_accelerator() -> bool:
    return jax.default_backend() != "cpu"


def steps_a_call(config: ConfigDict) -> int:
    """The most steps, up to `n_jitted_steps`, between which there is never anything to do."""
    training = config.training
    if not _on_accelerator():  # gradients of convolutions crawl in a CPU's loops
        return 1
    regular = (training.snapshot_freq, training.snapshot_freq_for_preemption)
    return math.gcd(training.n_jitted_steps, training.log_freq, training.eval_freq, *regular)


# Data sets of up to so many bytes stay in an accelerator's memory.
_RESIDENT = 2**30


def get_call(config: ConfigDict, setup: Setup, train: datasets.Dataset, first_step: int) -> Any:
    """(packed state, n) → (the state after n steps more, their metrics (n,)), on all devices."""
    step_fn = losses.get_step_fn(config, setup.sde, setup.model, setup.optimizer, setup.num_levels)
    num_local, images = jax.local_device_count(), None
    resident: tuple[Any, ...] = ()
    if _on_accelerator():
        images = datasets.in_memory(train, _RESIDENT)
    batches = datasets.train_batches(
        train,
        config.training.batch_size,
        config.seed,
        first_step,
        *(jax.process_index(), jax.process_count()),
        places=images is not None,
    )
    if images is None:
        parallel = jax.pmap(step_fn, axis_name="batch", donate_argnums=0)
    else:
        parallel = jax.pmap(
            lambda state, images, chosen, index: step_fn(state, images[chosen], index),
            axis_name="batch",
            donate_argnums=0,
        )
        resident = (replicate(images, num_local),)
        log.info("the training images are in the device's memory")

    def shard(rows: list[np.ndarray]) -> np.ndarray:
        """A batch for each step → (devices, steps, images of a device, …)."""
        return np.stack([row.reshape(num_local, -1, *row.shape[1:]) for row in rows], axis=1)

    def call(packed: losses.TrainState, count: int) -> tuple[losses.TrainState, dict[str, Array]]:
        given = list(itertools.islice(batches, count))
        index = shard([given[0]["index"]])[:, 0]
        packed, values = parallel(packed, *resident, shard([b["image"] for b in given]), index)
        return packed, first_copy(values)

    return call


@jax.jit
def _add(tally: dict[str, Array], values: dict[str, Array]) -> dict[str, Array]:
    skipped = values["skipped"]
    # How many at the end were skipped in a row; all of them go on with the row before.
    row = jnp.sum(jnp.cumprod(skipped[::-1]))
    return {
        "loss": tally["loss"] + jnp.sum(jnp.where(skipped, 0, values["loss"])),
        "steps": tally["steps"] + jnp.sum(1 - skipped),
        "skipped": tally["skipped"] + jnp.sum(skipped),
        "streak": row + jnp.where(row == len(skipped), tally["streak"], 0),
    }


class _Tally:
    """Sums over steps, kept on the device so that no step waits for the host."""

    def __init__(self) -> None:
        self.reset(0)

    def reset(self, streak: int) -> None:
        """Begin a new window; `streak` steps before it were skipped."""
        zero = np.zeros((), np.int32)
        self._sums: dict[str, Any] = {
            **{"loss": np.zeros((), np.float32), "steps": zero, "skipped": zero},
            "streak": np.array(streak, np.int32),
        }

    def add(self, values: dict[str, Array]) -> None:
        """Take in the metrics of steps, (n,) each."""
        self._sums = _add(self._sums, {name: values[name] for name in ("loss", "skipped")})

    def read(self) -> dict[str, float]:
        """`loss`: summed over `steps` that were not `skipped`; `streak`: skipped in a row."""
        return {name: np.asarray(value).item() for name, value in self._sums.items()}


def import_official(
    config: ConfigDict, workdir: str | os.PathLike[str], path: str | pathlib.Path
) -> losses.TrainState:
    """Make a workdir of an official PyTorch checkpoint, to evaluate, sample or train further.

    Returns:
      The state that was saved.

    Raises:
      UserError: the file can't be read or is of another network, or the workdir is in use.
    """
    workdir = pathlib.Path(workdir)
    setup = set_up(config)
    state = import_checkpoint.load_state(path, config)
    if (workdir / "checkpoints").is_dir() and any((workdir / "checkpoints").iterdir()):
        raise UserError(f"{workdir} has checkpoints already; choose another --workdir")
    storage.claim_workdir(config, workdir, record=True)
    with storage.locked(workdir), checkpointing.checkpoints(config, workdir) as manager:
        saver = checkpointing.Saver(manager, max_failures=1)
        saver.save(int(state.step), state)
        saver.settle()
    log.info(
        "imported %s: %s, %s parameters, step %d, into %s",
        *(path, config.model.name, f"{mutils.count_params(setup.state_shape.params):,}"),
        *(int(state.step), workdir),
    )
    return state


def replicate(tree: Any, num_local: int) -> Any:
    # Through a pmap with the step's axis name: another sharding would compile the step twice.
    copy = jax.pmap(lambda _, tree: tree, axis_name="batch", in_axes=(0, None))
    return copy(np.arange(num_local), tree)


def first_copy(tree: Any) -> Any:
    """The first device's copy of a replicated tree."""
    return jax.tree.map(lambda x: x.addressable_data(0).reshape(x.shape[1:]), tree)


def _steps(
    config: ConfigDict,
    setup: Setup,
    packed: losses.TrainState,
    call: Any,
    tally: _Tally,
    files: _Files | None,
    workdir: pathlib.Path,
) -> Iterator[tuple[losses.TrainState, int]]:
    """Train, log, and give (packed state, steps done) after every call.

    Raises:
      UserError: loss or gradient was not finite for too many steps in a row.
    """
    training, num_steps = config.training, config.training.n_iters
    step, most = int(first_copy(packed.step)), steps_a_call(config)
    window_start, window_steps, compiled = time.time(), 0, False
    while step < num_steps:
        whole = step % most == 0 and step + most <= num_steps
        count = most if whole else 1
        packed, values = call(packed, count)
        step, window_steps = step + count, window_steps + count
        tally.add(values)
        values = {name: value[-1] for name, value in values.items()}
        logs = step % training.log_freq == 0 or step == num_steps
        if logs or not compiled or _saves(config, step):
            sums = tally.read()
            if sums["streak"] >= training.max_skipped_steps:
                _give_up(config, setup, step, sums["streak"], values, files, workdir)
        if logs or not compiled:
            seconds = time.time() - window_start
            rate = training.batch_size * window_steps / seconds
            mean = sums["loss"] / max(sums["steps"], 1)
            if logs and files and sums["steps"]:
                row = {"loss": mean, "tau": float(values["tau"])}
                if not values["skipped"]:
                    row["grad_norm"] = float(values["grad_norm"])
                row |= {"images_per_second": rate} if compiled else {}
                row |= {"skipped": sums["skipped"]} if sums["skipped"] else {}
                files.metrics.write(step, row)
            skipped = f" | {sums['skipped']} steps skipped" if sums["skipped"] else ""
            if compiled:
                left = reporting.clock((num_steps - step) * seconds / window_steps)
                log.info(
                    "step %d/%d | %.0f images/s | loss %.4g%s | %s left",
                    *(step, num_steps, rate, mean, skipped, left),
                )
            else:
                log.info(
                    "step %d/%d | compiled in %.0f s | loss %.4g%s",
                    *(step, num_steps, seconds, mean, skipped),
                )
            if logs:
                tally.reset(int(sums["streak"]))
            compiled = True
            window_start, window_steps = time.time(), 0
        before = time.time()
        yield packed, step
        window_start += time.time() - before  # what is done between steps is not training


def _give_up(
    config: ConfigDict,
    setup: Setup,
    step: int,
    streak: float,
    values: dict[str, Array],
    files: _Files | None,
    workdir: pathlib.Path,
) -> NoReturn:
    """Stop a run whose loss stays not finite, and leave what it was at."""
    tau, t = losses.times_of_step(config, setup.sde, step - 1)
    path = workdir / "not_finite.json"
    numbers = {name: repr(float(values[name])) for name in ("loss", "grad_norm")}
    facts = {"step": step, **numbers, "tau": float(tau), "t": np.asarray(t, float).tolist()}
    if files:
        path.write_text(json.dumps(facts, indent=1) + "\n")
    raise UserError(
        f"the loss is {numbers['loss']} and its gradient's norm {numbers['grad_norm']} at step "
        f"{step} (τ = {float(tau):.3g}, t from {float(t.min()):.3g} to {float(t.max()):.3g}), not "
        f"finite for {streak} steps in a row; training stops, the last good checkpoint is kept, "
        f"and {path} has all times"
    )


def _get_test_loss(config: ConfigDict, setup: Setup, test: datasets.Dataset) -> Any:
    """params → the objective on up to four batches of test images, with the same draws always."""
    config = config.copy_and_resolve_references()
    if config.training.truncation == "soft":
        # The same expectation, without the luck of a single truncation for the whole batch.
        config.training.truncation = "equivalent_weight"
    # What depends on τ in other ways than by the weight is left to the training loss.
    config.training.update(reconstruction_loss=False, balanced=False)
    loss_fn = losses.get_batch_loss_fn(
        config, setup.sde, setup.model, setup.num_levels, train=False
    )
    images = datasets.in_order(test, min(1000, config.training.batch_size * 4))["image"]
    compiled = jax.jit(
        lambda params, key, images, index: jnp.mean(loss_fn(params, key, images, index)[0])
    )

    def test_loss(params: Any) -> float:
        size, values = min(len(images), config.training.batch_size), []
        size = max(size - size % 2, 1)  # `mixed` takes halves
        for start in range(0, len(images) - size + 1, size):
            key = losses.step_key(config.seed + 1, start)
            batch = images[start : start + size]
            values.append(float(compiled(params, key, batch, np.arange(size))))
        return float(np.mean(values))

    return test_loss


def _get_grid_fn(config: ConfigDict, setup: Setup, workdir: pathlib.Path) -> Any:
    """(params, file name) → path of a grid of samples, the same noise every time."""
    sample = get_sampler(config, setup, config.sampling.batch_size)

    def draw(params: Any, name: str) -> pathlib.Path:
        levels = sample(params, jax.random.key(config.seed + 3)).levels
        path = workdir / "samples" / name
        if hosts.is_main():
            reporting.save_grid(datasets.levels_to_uint8(levels, setup.num_levels), path)
        return path

    return draw


def sample(config: ConfigDict, workdir: str | os.PathLike[str]) -> pathlib.Path:
    """Do `sampling.task` with a checkpoint's EMA weights, `sampling.n_images` times.

    The checkpoint is the newest, or the one that eval.begin_ckpt and end_ckpt choose.

    Returns:
      The path of a grid, samples/<task>.png (samples/samples.png for "generate"); all images are
      beside it in an .npz (`samples`, (N, H, W, C) uint8, grey values 0 … 255; for the other tasks
      `originals` and `known` likewise).
    """
    workdir = pathlib.Path(workdir)
    setup, task = set_up(config), config.sampling.task
    data = None if task == "generate" else load_data(config)
    steps = hosts.on_main(lambda: checkpointing.steps_to_evaluate(config, workdir))
    if len(steps) > 1:
        raise UserError(
            f"eval.begin_ckpt and end_ckpt choose {len(steps)} checkpoints; --mode sample takes one"
        )
    state = checkpointing.restore_step(config, workdir, setup.state_shape, steps[0])
    log.info("task %s with step %d of %s", task, int(state.step), workdir)
    hosts.on_main(lambda: storage.make_folder(workdir / "samples", "--workdir"))
    path = workdir / "samples" / ("samples.png" if task == "generate" else f"{task}.png")
    if data is None:
        count, parts = config.sampling.n_images, []
        progress = reporting.Progress("sampling", count)
        size = min(config.sampling.batch_size, count)
        sampler = get_sampler(config, setup, size)
        for part in sample_batches(sampler, state.ema_params, config.seed, count, size):
            parts.append(datasets.levels_to_uint8(part.levels, setup.num_levels))
            progress.advance(len(part.levels), f"{part.nfe} evaluations")
        images = np.concatenate(parts)
        arrays, columns, grid = {"samples": images}, 0, images
    else:
        arrays = _complete(config, setup, data.test, state.ema_params)
        images = arrays["samples"]
        columns, grid = _PER_IMAGE + 2, _completion_rows(arrays)
    if hosts.is_main():
        reporting.save_grid(grid, path, columns)
        np.savez_compressed(path.with_suffix(".npz"), **cast(Any, arrays))
    log.info("%d images in %s and %s", len(images), path, path.with_suffix(".npz"))
    return path


_PER_IMAGE = 6  # completions of one image


def _read_mask(config: ConfigDict) -> np.ndarray:
    """What `sampling.mask` names: (H, W, 1), 1 where pixels are to be filled in."""
    size, name = config.data.image_size, config.sampling.mask
    mask, half, quarter = np.zeros((size, size, 1), np.float32), size // 2, size // 4
    regions: dict[str, Any] = {
        "left": np.s_[:, :half],
        "right": np.s_[:, half:],
        "top": np.s_[:half],
        "bottom": np.s_[half:],
        "center": np.s_[quarter : size - quarter, quarter : size - quarter],
    }
    if name in regions:
        mask[regions[name]] = 1
        return mask
    try:
        with Image.open(name) as image:
            resized = image.convert("L").resize((size, size), Image.Resampling.NEAREST)
    except (OSError, ValueError) as error:
        raise UserError(
            f"sampling.mask is {name!r}: neither {', '.join(regions)} nor a readable image"
        ) from error
    return (np.asarray(resized)[..., None] > 127).astype(np.float32)


def _complete(
    config: ConfigDict, setup: Setup, test: datasets.Dataset, params: Any
) -> dict[str, np.ndarray]:
    """Inpaint or colour test images, each `_PER_IMAGE` times; (N, H, W, C) uint8 grey values."""
    count, most = config.sampling.n_images, _PER_IMAGE * len(test)
    if count > most:
        raise UserError(
            f"sampling.n_images is {count}; the test images completed {_PER_IMAGE} times each are "
            f"{most}"
        )
    chosen = np.random.default_rng(config.seed).permutation(len(test))[: -(-count // _PER_IMAGE)]
    originals = test.source.fetch(np.sort(chosen))["image"].repeat(_PER_IMAGE, axis=0)[:count]
    mask = np.zeros(1, np.float32) if config.sampling.task == "colorize" else _read_mask(config)
    rows, everywhere = mesh_shardings()
    make_score_fn = functools.partial(mutils.get_score_fn, config, setup.sde, setup.model)
    complete = controllable_generation.get_completion_fn(config, setup.sde, make_score_fn)
    size = min(config.sampling.batch_size, count)
    size = -(-size // jax.device_count()) * jax.device_count()
    params, parts = spread(params, everywhere), []
    progress = reporting.Progress(config.sampling.task, len(originals))
    for i in range(0, len(originals), size):
        batch = originals[i : i + size]
        kept = len(batch)
        batch = np.pad(batch, ((0, size - kept), (0, 0), (0, 0), (0, 0)), mode="wrap")
        x = datasets.to_model(batch, setup.num_levels, config)
        key = jax.random.fold_in(jax.random.key(config.seed + 5), i)
        shared = spread((key, jnp.asarray(mask)), everywhere)
        completed = jnp.asarray(gather(complete(params, shared[0], spread(x, rows), shared[1])))
        parts.append(np.asarray(datasets.to_levels(completed, setup.num_levels, config))[:kept])
        progress.advance(kept)
    if config.sampling.task == "colorize":
        known = originals.mean(axis=-1, keepdims=True).repeat(3, axis=-1).astype(np.uint8)
    else:
        known = np.where(mask > 0, (setup.num_levels - 1) // 2, originals).astype(np.uint8)
    arrays = {"samples": np.concatenate(parts), "originals": originals, "known": known}
    return {k: datasets.levels_to_uint8(v, setup.num_levels) for k, v in arrays.items()}


def _completion_rows(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """For each image a row: the original, what is known of it, and its completions."""
    cells: list[np.ndarray] = []
    for i in range(0, len(arrays["samples"]), _PER_IMAGE):
        cells += [arrays["originals"][i], arrays["known"][i]]
        cells += list(arrays["samples"][i : i + _PER_IMAGE])
    return np.stack(cells)
