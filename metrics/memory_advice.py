"""Logs how much memory a run needs, and what to set if the device has less."""

import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from build import Setup
from models.networks import NETWORKS
from runtime import memory
from train_step import StepFn, pack_state

# XLA for GPUs gives the evaluations in a sampler more memory than one of them needs: up to 2.2
# times for the PC sampler's two, 1.3 for an ODE's (`python -m benchmarks.memory --target h100`).
_OF_PC, _OF_ODE = 2.2, 1.3


def train_program(setup: Setup) -> tuple[StepFn, tuple[Any, ...]]:
    """The function of one training step on one device, and the shapes of its arguments."""
    n = setup.loop.batch_size // jax.device_count()
    images = jax.ShapeDtypeStruct((1, n, *setup.padded_shape), setup.preprocessing.dtype)
    index = jax.ShapeDtypeStruct((n,), jnp.int32)
    state = jax.eval_shape(pack_state, setup.state_shape)
    labels = [jax.ShapeDtypeStruct((1, n), jnp.int32)] if setup.num_classes else []
    return setup.make_step_fn(), (state, images, index, *labels)


def sample_program(setup: Setup, batch_size: int) -> tuple[Any, tuple[Any, ...]]:
    """The function that draws a device's share of a batch, and the shapes of its arguments."""
    n = -(-batch_size // jax.device_count())
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), n))
    labels = [jax.ShapeDtypeStruct((n,), jnp.int32)] if setup.num_classes else []
    return setup.make_sample_fn(n), (setup.state_shape.ema_params, keys, *labels)


def advise_on_training(setup: Setup) -> None:
    """Log how much memory training needs, and what to set if the device has less."""

    def needed(changes: Mapping[str, Any]) -> int:
        step_fn, shapes = train_program(setup.rebuild(changes))
        return memory.needed_bytes(step_fn, *shapes, donate=1, devices=jax.device_count())

    now = setup.fields
    remedies: list[dict[str, Any]] = []
    if setup.dtype != "bfloat16":
        remedies.append({"model.dtype": "bfloat16"})
    can_remat = NETWORKS[setup.network].takes("remat")
    if can_remat and not now["model"]["remat"]:
        remedies.append({"model.dtype": "bfloat16", "model.remat": True})
    images = setup.loop.batch_size // jax.device_count()
    pair = 2 if now["training"]["mixed"] else 1
    for parts in () if now["training"]["balanced"] else (4, 16):  # which needs the whole batch
        if images % (parts * pair) == 0 and parts > now["optim"]["num_micro_batch"]:
            kept = {"model.remat": True} if can_remat else {}
            remedies.append({"model.dtype": "bfloat16", **kept, "optim.num_micro_batch": parts})
    memory.advise("training", needed, remedies)


def advise_on_sampling(setup: Setup, field: str, batch_size: int) -> None:
    """Log how much memory sampling needs; `field` is the config's field of the batch size."""

    def needed(changes: Mapping[str, Any]) -> int:
        program, shapes = sample_program(setup, changes.get(field, batch_size))
        factor = _OF_PC if setup.sampling.method == "pc" else _OF_ODE
        return round(factor * memory.needed_bytes(program, *shapes))

    memory.advise("sampling", needed, smaller_batches(field, batch_size))


def smaller_batches(field: str, batch_size: int) -> list[dict[str, Any]]:
    """Changes of a config that halve a batch size repeatedly, down to one image a device."""
    sizes = itertools.takewhile(
        lambda size: size >= jax.device_count(), (batch_size >> n for n in itertools.count(1))
    )
    return [{field: size} for size in sizes]
