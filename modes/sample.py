"""--mode sample: samples and completed test images, as files and as a grid."""

import contextlib
import logging
import os
import pathlib
from collections.abc import Collection, Iterator
from typing import Any, cast

import numpy as np
from ml_collections import ConfigDict

from configs.shapes import array_shape, image_shape
from controllable_generation import (
    PER_IMAGE,
    complete_test_images,
    completion_rows,
    get_completion_fn,
    read_mask,
)
from datasets import Dataset, load_data
from errors import UserError
from runtime import checkpointing, hosts
from runtime.files import replacing
from runtime.locking import locked
from runtime.pictures import (
    png_writer,
    read_pngs,
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
from session import (
    Setup,
    advise_on_sampling,
    check_labels,
    get_sampler,
    sample_batches,
    sample_labels,
    sampling_method,
    set_up,
    with_data_facts,
)
from train_step import (
    TrainState,
)

log = logging.getLogger("soft_truncation")


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
    levels, path = _complete(config, setup, state, data.test), folder / task
    if hosts.is_main():
        pictures = {name: setup.units.to_pictures(part) for name, part in levels.items()}
        save_grid(completion_rows(pictures), path.with_suffix(".png"), PER_IMAGE + 2)
        files = {name: setup.units.to_files(part) for name, part in levels.items()}
        with replacing(path.with_suffix(".npz")) as file:
            np.savez_compressed(file, **cast(Any, files))
    log.info("%d images in %s.png and .npz", len(levels["samples"]), path)
    return path.with_suffix(".png")


def _complete(
    config: ConfigDict, setup: Setup, state: TrainState, test: Dataset
) -> dict[str, np.ndarray]:
    """Completed test images, their originals, and the known parts."""
    check_labels(config, test)
    options, colors, mask = config.sampling, config.sampling.task == "colorize", None
    if not colors:
        mask = read_mask(options.mask, array_shape(config)[:2], image_shape(config)[:2])
    method, guidance = sampling_method(config), options.guidance
    return complete_test_images(
        get_completion_fn(method, setup.sde, setup.make_score_fn, colors, guidance),
        state.ema_params,
        test,
        setup.preprocessing,
        mask,
        count=options.n_images,
        batch_size=options.batch_size,
        seed=config.seed,
        num_classes=config.model.num_classes,
    )


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
