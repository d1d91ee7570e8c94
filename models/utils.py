"""Building the network of a config, and its score function."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from ml_collections import ConfigDict

from configs import fields
from models.networks import NETWORKS
from models.score import ScoreModel
from sde_lib import SDE

Model = nn.Module


def create_model(config: ConfigDict) -> Model:
    """The Flax module of a config: `.apply({"params": p}, x, time_cond, train=False)`, x is NHWC.

    `time_cond` (N,) is what `ScoreModel.time_cond` makes of t.
    """
    network, model = NETWORKS[config.model.name], config.model
    # The input c_in x of the velocity parametrisation is not in the range of the data.
    centered = config.data.centered or model.parametrization == "velocity"
    given = {"centered": centered, "dtype": jnp.dtype(model.dtype), "name": None, **network.fixed}
    return fields.call(network.create, config, "model", "data", "training", **given)


def _init(model: Model, shape: tuple[int, ...]) -> Callable[[Array], Any]:
    """The function from a key to initial parameters; it can be traced."""
    x = jnp.zeros((1, *shape))
    return lambda key: model.init(key, x, jnp.ones(1))["params"]


def init_params(model: Model, shape: tuple[int, ...], key: Array) -> Any:
    """Initial parameters of a network for images (H, W, C), float32."""
    # It runs once: on a CPU, XLA's optimisation of it would take four times as long as the rest.
    once = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return jax.jit(_init(model, shape), compiler_options=once)(key)


def params_shape(model: Model, shape: tuple[int, ...]) -> Any:
    """The shapes of `init_params`; nothing is computed."""
    return jax.eval_shape(lambda: _init(model, shape)(jax.random.key(0)))


def get_score_fn(
    config: ConfigDict,
    sde: SDE,
    model: Model,
    params: Any,
    train: bool = False,
    labels: Array | None = None,
    guidance: float = 0.0,
) -> Callable[..., Array]:
    """The score function (x, t) of a network; with train=True (x, t, dropout key or keys (N,)).

    See `ScoreModel` for the arguments and results.
    """
    sections = ("model", "training")
    score_model = fields.call(ScoreModel, config, *sections, sde=sde, network=model)
    if train:
        return score_model.for_training(params, labels)
    return score_model(params, labels, guidance)
