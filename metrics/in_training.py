"""What training shows of a network: its loss on test images, and grids of its samples."""

import logging
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import losses
from build import Setup, labels_on_devices
from configs import seeds
from data import pixels
from data.batches import Dataset, in_order
from metrics.batched_sampling import get_sampler
from runtime import hosts
from runtime.devices import batch_and_replicated_shardings, to_devices
from runtime.files import can_do_without
from runtime.pictures import (
    save_grid,
)

log = logging.getLogger("soft_truncation")


def get_test_loss(setup: Setup, test: Dataset) -> Callable[[Any], float]:
    """A function params → the loss on up to four batches of test images, with fixed noise.

    All devices share each batch, so every process must call it.
    """
    chosen = in_order(test, min(1000, setup.loop.batch_size * 4))
    images, labels = chosen["image"], chosen["label"]
    size = min(len(images), setup.loop.batch_size)
    size = max(size - size % 2, 1)  # `mixed` needs pairs
    objective = setup.objective.for_test(size)

    @jax.jit
    def mean_loss(
        params: Any, key: Array, images: Array, index: Array, labels: Array | None
    ) -> Array:
        score_fn = setup.make_score_fn(params, labels)
        return jnp.mean(objective(score_fn, key, images, index, train=False)[0])

    def test_loss(params: Any) -> float:
        values = []
        rows, everywhere = batch_and_replicated_shardings()
        whole = size % jax.device_count() > 0  # a handful of images
        rows = everywhere if whole else rows
        params = to_devices(params, everywhere)
        for start in range(0, len(images) - size + 1, size):
            key = to_devices(losses.step_key(setup.seed + seeds.TEST_LOSS, start), everywhere)
            batch = to_devices((images[start : start + size], np.arange(size)), rows)
            told = labels_on_devices(labels[start : start + size], setup.num_classes, whole)
            values.append(float(mean_loss(params, key, *batch, told)))
        return float(np.mean(values))

    return test_loss


def get_grid_fn(setup: Setup, test: Dataset, workdir: pathlib.Path) -> Callable[[Any, str], str]:
    """A function (params, file name) → a sentence for the log; it makes a grid of samples.

    The noise is the same each time.
    """
    sample, num_levels = get_sampler(setup, setup.sampling.batch_size), setup.num_levels
    few = in_order(test, 500)["image"]

    def draw(params: Any, name: str) -> str:
        levels = sample(params, jax.random.key(setup.seed + seeds.GRIDS)).levels
        path = workdir / "samples" / name
        if hosts.is_main():
            with can_do_without(path):
                save_grid(setup.units.to_pictures(levels), path)
        where = f"samples in {path}" if path.exists() else "samples"
        if not num_levels:
            return where
        share, usual = (pixels.share_at_ends(part, num_levels) for part in (levels, few))
        return f"{where}; {share:.1%} at the ends of the range ({usual:.1%} of test data)"

    return draw
