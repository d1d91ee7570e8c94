"""Makes the network of a config, and turns it into a score function."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from ml_collections import ConfigDict

from models.ncsnpp import NCSNpp
from sde_lib import VPSDE

Model = NCSNpp


def create_model(config: ConfigDict) -> Model:
    """The Flax module of a config: `.apply({"params": p}, x, labels, train=False)`, x is NHWC."""
    model = config.model
    return NCSNpp(
        nf=model.nf,
        ch_mult=tuple(model.ch_mult),
        num_res_blocks=model.num_res_blocks,
        attn_resolutions=tuple(model.attn_resolutions),
        dropout=model.dropout,
        skip_rescale=model.skip_rescale,
        init_scale=model.init_scale,
        centered=config.data.centered,
        dtype=jnp.dtype(model.dtype),
    )


def init_params(config: ConfigDict, model: Model, key: Array) -> Any:
    """Initial parameters, float32."""
    size, channels = config.data.image_size, config.data.num_channels
    init = jax.jit(lambda key: model.init(key, jnp.zeros((1, size, size, channels)), jnp.zeros(1)))
    return init(key)["params"]


def count_params(params: Any) -> int:
    """The number of parameters; works on shapes (`jax.eval_shape`) too."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def get_score_fn(
    config: ConfigDict, sde: VPSDE, model: Model, params: Any, train: bool = False
) -> Callable[..., Array]:
    """The score s_θ(x, t) = -network(x, 999 t) / σ(t), the one place where SDE and network meet.

    Returns:
      score_fn(x, t) with x (N, H, W, C) and t (N,), float32, the shape of x. With train=True it
      is score_fn(x, t, dropout_key), with one key, or one key an image, (N,).
    """
    del config

    def score_fn(x: Array, t: Array, dropout_key: Array | None = None) -> Array:
        if dropout_key is not None and dropout_key.ndim == 0:
            dropout_key = jax.random.split(dropout_key, x.shape[0])
        out = model.apply({"params": params}, x, 999 * t, train=train, dropout_keys=dropout_key)
        return -jnp.asarray(out, jnp.float32) / sde.std(t)[:, None, None, None]

    return score_fn
