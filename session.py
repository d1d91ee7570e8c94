"""What a config names, made ready: SDE, network, optimiser, data, devices, sampler."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

import datasets
import losses
import sampling
import sde_lib
from configs.default import UserError, validate
from models import utils as mutils

log = logging.getLogger("soft_truncation")


# What fields name; a config's own file can add to each (docs/extending.md).
REGISTRIES: dict[str, dict[str, Any]] = {
    "training.sde": sde_lib.SDES,
    "training.prior": losses.PRIORS,
    "training.weighting": losses.WEIGHTINGS,
    "sampling.method": sampling.SAMPLERS,
    "sampling.predictor": sampling.PREDICTORS,
    "sampling.corrector": sampling.CORRECTORS,
}


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a config names, but for its data; checked, and nothing is compiled yet."""

    sde: sde_lib.SDE
    model: mutils.Model
    optimizer: optax.GradientTransformation
    num_levels: int  # of the data
    state_shape: losses.TrainState  # of jax.ShapeDtypeStruct


def init_state(
    config: ConfigDict, model: mutils.Model, optimizer: optax.GradientTransformation
) -> losses.TrainState:
    """The state before the first step, a function of the config's seed."""
    params = mutils.init_params(config, model, jax.random.key(config.seed))
    return losses.TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema_params=jax.tree.map(jnp.copy, params),
        opt_state=optimizer.init(params),
    )


def set_up(config: ConfigDict) -> Setup:
    """Check a config.

    Raises:
      UserError: one line that says what is wrong with it.
    """
    validate(config, jax.device_count(), REGISTRIES)
    sde, model = sde_lib.get_sde(config), mutils.create_model(config)
    optimizer = losses.get_optimizer(config)
    try:
        shape = jax.eval_shape(lambda: init_state(config, model, optimizer))
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"config.model: no network can be built: {error}") from error
    return Setup(sde, model, optimizer, datasets.get_num_levels(config), shape)


def mesh_shardings() -> tuple[NamedSharding, NamedSharding]:
    """(rows over all devices, the same on all devices)."""
    mesh = Mesh(np.array(jax.devices()), ("batch",))
    return NamedSharding(mesh, PartitionSpec("batch")), NamedSharding(mesh, PartitionSpec())


def spread(tree: Any, sharding: NamedSharding) -> Any:
    """Arrays that all processes have alike, laid out over the devices of all."""
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)

    def place(x: Any) -> Array:
        if isinstance(x, Array) and not x.is_fully_addressable:
            return x  # it is laid out already
        if isinstance(x, Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(place(jax.random.key_data(x)))
        whole = np.asarray(x)
        return jax.make_array_from_callback(whole.shape, sharding, lambda part: whole[part])

    return jax.tree.map(place, tree)


def gather(x: Array) -> np.ndarray:
    """An array that is laid out over the devices of all processes, whole, on each of them."""
    if jax.process_count() == 1:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


class Samples(NamedTuple):
    """A batch of samples."""

    levels: np.ndarray  # (n, H, W, C) uint8
    nfe: int  # score evaluations for each
    num_broken: int  # of those that are not finite


def get_sampler(config: ConfigDict, setup: Setup, batch_size: int) -> Any:
    """(params, key) → `batch_size` Samples, over all devices."""
    full = -(-batch_size // jax.device_count()) * jax.device_count()
    rows, everywhere = mesh_shardings()
    make_score_fn = functools.partial(mutils.get_score_fn, config, setup.sde, setup.model)
    sample_fn = sampling.get_sampling_fn(config, setup.sde, make_score_fn, full)

    def sample_levels(params: Any, key: Array) -> tuple[Array, Array, Array]:
        x, nfe = sample_fn(params, key)
        broken = ~jnp.isfinite(x).all(axis=(1, 2, 3))
        return datasets.to_levels(x, setup.num_levels, config), nfe, broken

    compiled = jax.jit(sample_levels, out_shardings=(rows, everywhere, rows))

    def sample(params: Any, key: Array) -> Samples:
        levels, nfe, broken = compiled(*spread((params, key), everywhere))
        broken = gather(broken)[:batch_size].sum()
        if broken:
            log.warning(
                "%d of %d samples are not finite and come out black: the weights are broken, or "
                "the sampler failed",
                *(broken, batch_size),
            )
        return Samples(gather(levels)[:batch_size], int(nfe), int(broken))

    return sample


# (name, compute) → what compute() gives, or gave when that name was last asked for
Keep = Callable[[str, Callable[[], dict[str, np.ndarray]]], dict[str, np.ndarray]]


def sample_batches(
    sample: Any, params: Any, seed: int, count: int, batch_size: int, keep: Keep | None = None
) -> Iterator[Samples]:
    """Samples in batches, each a function of (seed, its number).

    Args:
      sample: of `get_sampler`, for this batch size.
      params: of the network.
      seed: of the config.
      count, batch_size: how many samples, and how many at a time.
      keep: recalls what was sampled before; None: nothing is kept.

    """
    key, params = jax.random.key(seed + 2), spread(params, mesh_shardings()[1])
    for i, start in enumerate(range(0, count, batch_size)):

        def draw(i: int = i) -> dict[str, np.ndarray]:
            drawn = sample(params, jax.random.fold_in(key, i))
            return {name: np.asarray(value) for name, value in drawn._asdict().items()}

        part = keep(f"samples_{start:08}", draw) if keep else draw()
        levels = part["levels"][: count - start]
        yield Samples(levels, int(part["nfe"]), int(part["num_broken"]))
