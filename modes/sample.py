"""--mode sample: draws samples or completes test images; writes files and a grid of them."""

import contextlib
import dataclasses
import logging
import os
import pathlib
from collections.abc import Collection, Iterator
from typing import Any, cast

import numpy as np

from build import Setup
from configs.errors import UserError
from controllable_generation import (
    PER_IMAGE,
    complete_test_images,
    completion_rows,
    get_completion_fn,
    read_mask,
)
from data.batches import Dataset
from data.told_labels import check_labels, sample_labels
from metrics.batched_sampling import get_sampler, sample_batches, sample_chain
from metrics.given_images import given_images
from metrics.memory_advice import advise_on_sampling
from runtime import checkpointing, hosts
from runtime.files import replacing
from runtime.locking import locked
from runtime.pictures import (
    png_writer,
    read_pngs,
    save_animation,
    save_grid,
    start_png_folder,
    write_labels,
)
from runtime.progress import Progress
from runtime.workdir import (
    check_processes,
    make_folder,
    short_hash,
)
from train_step import (
    TrainState,
)

log = logging.getLogger("soft_truncation")


def sample(setup: Setup, workdir: str | os.PathLike[str]) -> pathlib.Path:
    """Generate, inpaint or colour `sampling.n_images` images with a checkpoint's EMA weights.

    The checkpoint is the newest, or the one that eval.begin_ckpt and end_ckpt choose.

    An .npz file in the folder of the grid has all images: `samples`, (N, H, W, C) uint8, pixel
    values 0 … 255 (for an array data set, in the type and the units of the data). The tasks that
    complete images add `originals` and `known` in the same format. For a network that is told
    labels, it also has `labels`, (N,), and the grid has a row for each label if all have the same
    number of images.

    With `sampling.format=npy` the images are in samples.npy and the labels in labels.npy. With png
    they are single files in samples/png, the labels are in dataset.json there, and an interrupted
    run can be resumed. With `sampling.keep`, chain.png and chain.gif show the states on the way to
    the first samples.

    Returns:
      The path of a grid of the images, samples/<task>.png (samples/samples.png for "generate").

    Raises:
      UserError: the data or the checkpoint can't be used.
    """
    workdir, task = pathlib.Path(workdir), setup.sampling.task
    check_processes(setup.fields, {})
    images = None if task == "generate" else _images_to_complete(setup)
    step = hosts.on_main(lambda: chosen_step(setup, workdir))
    state = checkpointing.restore_step(setup.fields, workdir, setup.state_shape, step)
    state = dataclasses.replace(state, ema_params=setup.score_params(state.ema_params))
    log.info("task %s with step %d of %s", task, int(state.step), workdir)
    folder = workdir / "samples"
    hosts.on_main(lambda: make_folder(folder, "--workdir"))
    if images is None:
        return _generate(setup, state, folder)
    levels, path = _complete(setup, state, images), folder / task
    if hosts.is_main():
        pictures = {name: setup.units.to_pictures(part) for name, part in levels.items()}
        save_grid(completion_rows(pictures), path.with_suffix(".png"), PER_IMAGE + 2)
        files = {name: setup.units.to_files(part) for name, part in levels.items()}
        with replacing(path.with_suffix(".npz")) as file:
            np.savez_compressed(file, **cast(Any, files))
    log.info("%d images in %s.png and .npz", len(levels["samples"]), path)
    return path.with_suffix(".png")


def _images_to_complete(setup: Setup) -> Dataset:
    """The images of `eval.images`, or the test images."""
    if setup.evaluation.images not in ("", "test"):
        return given_images(setup, fit=True)[0]
    test = setup.load_data().test
    check_labels(setup.num_classes, setup.classes, test)
    return test


def _complete(setup: Setup, state: TrainState, test: Dataset) -> dict[str, np.ndarray]:
    """Completed images, their originals, and the known parts."""
    options, colors, mask = setup.sampling, setup.sampling.task == "colorize", None
    if not colors:
        mask = read_mask(options.mask, setup.shape[:2], setup.padded_shape[:2])
    return complete_test_images(
        get_completion_fn(setup.sampler, setup.sde, setup.make_score_fn, colors, options.guidance),
        state.ema_params,
        test,
        setup.preprocessing,
        mask,
        count=options.n_images,
        batch_size=options.batch_size,
        seed=setup.seed,
        num_classes=setup.num_classes,
    )


def _generate(setup: Setup, state: TrainState, folder: pathlib.Path) -> pathlib.Path:
    """Draw samples, write them in `sampling.format`, and return the path of their grid."""
    options, count = setup.sampling, setup.sampling.n_images
    labels = None
    if setup.num_classes:
        labels = sample_labels(options.labels, setup.num_classes, 0, count)
    if options.format == "png":
        to, pictures = folder / "png", _generate_pngs(setup, state, folder / "png", labels)
    else:
        to = folder / f"samples.{options.format}"
        levels = np.concatenate([part for _, part in _draw(setup, state)])
        pictures = setup.units.to_pictures(levels[:_MOST_SHOWN])
        hosts.on_main(lambda: _write_arrays(to, setup.units.to_files(levels), labels))
    path = folder / "samples.png"
    if hosts.is_main():
        _save_samples_grid(pictures, None if labels is None else labels[: len(pictures)], path)
    log.info("%d images in %s, a grid in %s", count, to, path)
    if options.keep:
        _show_chain(setup, state, folder / "chain.png")
    return path


def _show_chain(setup: Setup, state: TrainState, path: pathlib.Path) -> None:
    """Draw the states on the way to the first samples, as a grid and as an animation."""
    count, keep = min(16, setup.sampling.n_images), setup.sampling.keep
    log.info("%d states on the way to %d samples, which also compiles", keep, count)
    levels = sample_chain(setup, state.ema_params, setup.seed, count, keep)
    if hosts.is_main():
        pictures = np.stack([setup.units.to_pictures(part) for part in levels])
        rows = pictures[:, :8].swapaxes(0, 1)  # a sample each
        save_grid(rows.reshape(-1, *rows.shape[2:]), path, keep)
        save_animation(pictures, path.with_suffix(".gif"))
    log.info("states in %s and .gif", path)


def _draw(
    setup: Setup, state: TrainState, present: Collection[int] = ()
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (index of the first, levels) of each batch that has samples not yet `present`."""
    count = setup.sampling.n_images
    size = min(setup.sampling.batch_size, count)
    advise_on_sampling(setup, "sampling.batch_size", size)
    progress = Progress("sampling", count, compiles=True)
    progress.advance(len({i for i in present if i < count}), fresh=False)
    sampler, params = get_sampler(setup, size), state.ema_params
    for start, part in sample_batches(sampler, params, setup.seed, count, size, present=present):
        yield start, part.levels
        new = set(range(start, start + len(part.levels))).difference(present)
        progress.advance(len(new), f"{part.nfe} evaluations")


def _write_arrays(to: pathlib.Path, samples: np.ndarray, labels: np.ndarray | None) -> None:
    """Write samples to an .npz file with their labels, or to an .npy and labels.npy."""
    arrays = {"samples": samples} if labels is None else {"samples": samples, "labels": labels}
    if to.suffix == ".npz":
        with replacing(to) as file:
            np.savez_compressed(file, **cast(Any, arrays))
        return
    for name, array in arrays.items():
        with replacing(to.with_name(f"{name}.npy")) as file:
            np.save(file, array)


def _generate_pngs(
    setup: Setup,
    state: TrainState,
    to: pathlib.Path,
    labels: np.ndarray | None,
) -> np.ndarray:
    """Write the samples that the folder `to` lacks, a file each; returns the first ones of all."""
    now = setup.fields
    # These fields do not change a sample, but for the batch's size with some samplers.
    free = ("n_images", "format", "batch_size", "keep", "show_channels")
    settings = {name: value for name, value in now["sampling"].items() if name not in free}
    source = {"seed": setup.seed, "step": int(state.step), "weights": short_hash(state.ema_params)}
    source |= {"dtype": setup.dtype, "sampling": settings}
    source["dequantization"] = setup.dequantization
    if setup.sampling.method == "pc":
        source["num_scales"] = now["model"]["num_scales"]

    def finish() -> np.ndarray:
        if labels is not None:
            write_labels(to, labels)
        return read_pngs(to, min(setup.sampling.n_images, _MOST_SHOWN))

    with contextlib.ExitStack() as stack:
        # Two samplings would delete each other's partial files.
        hosts.on_main(lambda: stack.enter_context(locked(to.parent)))
        present = set(hosts.on_main(lambda: sorted(start_png_folder(to, source))))
        with png_writer(to) if hosts.is_main() else contextlib.nullcontext() as write_pngs:
            for start, levels in _draw(setup, state, present):
                if write_pngs:
                    write_pngs(start, setup.units.to_files(levels))
        return hosts.on_main(finish)


def chosen_step(setup: Setup, workdir: pathlib.Path) -> int:
    """The step of the newest checkpoint, or of the one that eval.begin_ckpt and end_ckpt choose.

    Raises:
      UserError: there is no such checkpoint, or they choose several.
    """
    options, period = setup.evaluation, setup.loop.snapshot_freq
    first, last = options.begin_ckpt, options.end_ckpt
    steps = checkpointing.steps_to_evaluate(workdir, first, last, period)
    if len(steps) > 1:
        raise UserError(f"eval.begin_ckpt and end_ckpt choose {len(steps)} checkpoints, not one")
    return steps[0]


_MOST_SHOWN = 1024  # samples in a grid


def _save_samples_grid(images: np.ndarray, labels: np.ndarray | None, path: pathlib.Path) -> None:
    """Write a grid, with a row for each label if all have the same number of samples."""
    columns = 0
    if labels is not None:
        kinds, counts = np.unique(labels, return_counts=True)
        images = images[np.argsort(labels, kind="stable")]
        columns = int(counts[0]) if len(kinds) > 1 and len(set(counts)) == 1 else 0
    save_grid(images, path, columns)
