"""Draws samples with a network in batches, on all devices."""

import logging
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from build import Setup, labels_on_devices
from configs import seeds
from data.told_labels import sample_labels
from runtime.devices import batch_and_replicated_shardings, to_devices, to_host
from sampling import Chain, get_sampling_fn, sample_keys

log = logging.getLogger("soft_truncation")


class Samples(NamedTuple):
    """A batch of samples."""

    levels: np.ndarray  # (n, H, W, C), of `Preprocessing.dtype`
    nfe: int  # score evaluations per sample
    num_broken: int  # number of samples that are not finite


def get_sampler(setup: Setup, batch_size: int) -> Any:
    """A function (params, key, start=0) → `batch_size` Samples, computed on all devices.

    `start` is the index of the first sample. A sample depends only on `params`, the key
    and its index.
    """
    full = -(-batch_size // jax.device_count()) * jax.device_count()
    rows, everywhere = batch_and_replicated_shardings()
    sample_fn = setup.make_sample_fn(full)

    def sample_levels(params: Any, keys: Array, labels: Array | None) -> tuple[Array, Array, Array]:
        x, nfe = sample_fn(params, keys, labels)
        broken = ~jnp.isfinite(x).all(axis=(1, 2, 3))
        return setup.preprocessing.to_levels(x), nfe, broken

    compiled = jax.jit(sample_levels, out_shardings=(rows, everywhere, rows))

    def sample(params: Any, key: Array, start: int = 0) -> Samples:
        params = to_devices(params, everywhere)
        keys = to_devices(sample_keys(key, start, full), rows)
        labels = None
        if setup.num_classes:
            chosen = sample_labels(setup.sampling.labels, setup.num_classes, start, full)
            labels = labels_on_devices(chosen, setup.num_classes)
        levels, nfe, broken = compiled(params, keys, labels)
        broken = to_host(broken)[:batch_size].sum()
        if broken:
            log.warning(
                "%d of %d samples are not finite and are shown black: the weights are broken, or "
                "the sampler failed",
                broken,
                batch_size,
            )
        return Samples(to_host(levels)[:batch_size], int(nfe), int(broken))

    return sample


# (name, compute) → the result of compute(), or the stored result of that name
CacheFn = Callable[[str, Callable[[], dict[str, np.ndarray]]], dict[str, np.ndarray]]


def sample_batches(
    sample: Any,
    params: Any,
    seed: int,
    count: int,
    batch_size: int,
    cache: CacheFn | None = None,
    present: Collection[int] = (),
) -> Iterator[tuple[int, Samples]]:
    """Yield (index of the first, samples) of each batch.

    Each sample is a function of the seed and of its index.

    Args:
      sample: from `get_sampler`, for this batch size.
      params: the network's parameters.
      seed: the config's seed.
      count, batch_size: the number of samples, and the number of samples in a batch.
      cache: stores and returns earlier batches; None: batches are not stored.
      present: indices of samples that are not needed; a batch is left out if it has no others.
    """
    key = jax.random.key(seed + seeds.SAMPLES)
    params = to_devices(params, batch_and_replicated_shardings()[1])
    for start in range(0, count, batch_size):
        if all(i in present for i in range(start, min(start + batch_size, count))):
            continue

        def draw(start: int = start) -> dict[str, np.ndarray]:
            drawn = sample(params, key, start)
            return {name: np.asarray(value) for name, value in drawn._asdict().items()}

        part = cache(f"samples_{start:08}", draw) if cache else draw()
        levels = part["levels"][: count - start]
        yield start, Samples(levels, int(part["nfe"]), int(part["num_broken"]))


def sample_chain(setup: Setup, params: Any, seed: int, count: int, keep: int) -> np.ndarray:
    """The states on the way to the first samples (`sampling.Chain`), levels (keep, n, H, W, C).

    Args:
      setup, params, seed: as for `sample_batches`.
      count: n, the number of samples, which are drawn at once.
      keep: the number of states; the last one is the sample itself.
    """
    shape, options = (count, *setup.padded_shape), setup.sampling
    chain = Chain(setup.sde, setup.fields["sampling"]["truncation_time"], keep)
    draw = get_sampling_fn(
        chain.watch(setup.sampler), setup.sde, setup.make_score_fn, shape, options.guidance
    )
    labels = None
    if setup.num_classes:
        labels = jnp.asarray(sample_labels(options.labels, setup.num_classes, 0, count))
    x, _ = draw(params, sample_keys(jax.random.key(seed + seeds.SAMPLES), 0, count), labels)
    x.block_until_ready()
    jax.effects_barrier()
    to_levels = setup.preprocessing.to_levels
    return np.stack([np.asarray(to_levels(jnp.asarray(y))) for y in (*chain.states[:-1], x)])
