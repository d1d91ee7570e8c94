"""Places arrays on all devices of all processes, and fetches them back."""

from typing import Any

import jax
import numpy as np
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def batch_and_replicated_shardings() -> tuple[NamedSharding, NamedSharding]:
    """Two shardings over all devices: (rows split between the devices, replicated on each)."""
    mesh = Mesh(np.array(jax.devices()), ("batch",))
    return NamedSharding(mesh, PartitionSpec("batch")), NamedSharding(mesh, PartitionSpec())


def to_devices(tree: Any, sharding: NamedSharding) -> Any:
    """Place arrays on the devices of all processes; they must be equal on every process."""
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)

    def place(x: Any) -> Array:
        if isinstance(x, Array) and not x.is_fully_addressable:
            return x  # it is on the devices already
        if isinstance(x, Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(place(jax.random.key_data(x)))
        whole = np.asarray(x)
        return jax.make_array_from_callback(whole.shape, sharding, lambda part: whole[part])

    return jax.tree.map(place, tree)


def to_host(x: Array) -> np.ndarray:
    """Fetch a whole array that is sharded over the devices of all processes, to every process."""
    if jax.process_count() == 1:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))
