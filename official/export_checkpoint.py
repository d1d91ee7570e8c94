"""Conversion of our runs to checkpoints of the official release, without PyTorch."""

import pathlib
from collections import OrderedDict
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from configs.shapes import image_shape
from models import utils as mutils
from official.import_checkpoint import check_network
from official.pth_writer import write_pth
from train_step import TrainState

# The layers of a block in the order in which the release makes them; NIN is our Dense.
_ORDER = ("GroupNorm_0", "Conv_0", "Dense_0", "GroupNorm_1", "Conv_1", "Conv_2")


def _modules_in_order(config: ConfigDict) -> list[str]:
    """The names of the network's modules in the order of the forward pass, as the release's."""
    model, names = mutils.create_model(config), []

    def record(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if len(context.module.path) == 1 and context.method_name == "__call__":
            names.append(context.module.name)
        return call(*args, **kwargs)

    x = jnp.zeros((1, *image_shape(config)))
    with nn.intercept_methods(record):
        jax.eval_shape(model.init, jax.random.key(0), x, jnp.ones(1))
    return names


def _tensors(layer: str, values: dict[str, Any], nin: bool) -> dict[str, np.ndarray]:
    """A layer's tensors under the release's names, as in its state dict."""
    if "W" in values:
        return {"W": np.asarray(values["W"])}
    scale = "kernel" not in values
    weight = np.asarray(values["scale" if scale else "kernel"])
    if weight.ndim == 4:
        weight = weight.transpose(3, 2, 0, 1)
    elif weight.ndim == 2 and not nin:
        weight = weight.T
    names = ("W", "b") if nin else ("weight", "bias")
    tensors = dict(zip(names, (weight, np.asarray(values["bias"])), strict=True))
    return {f"{layer}.{name}" if layer else name: value for name, value in tensors.items()}


def _module_tensors(kind: str, values: dict[str, Any]) -> dict[str, np.ndarray]:
    """The tensors of one of the release's modules."""
    if kind in ("Conv", "Dense", "GroupNorm", "GaussianFourierProjection"):
        return _tensors("", values, nin=False)
    if kind == "FIRConv":
        return _tensors("Conv2d_0", values, nin=False)
    tensors: dict[str, np.ndarray] = {}
    if kind == "AttnBlock":
        tensors |= _tensors("GroupNorm_0", values["GroupNorm_0"], nin=False)
        for name in sorted(name for name in values if name.startswith("Dense_")):
            tensors |= _tensors(name.replace("Dense", "NIN"), values[name], nin=True)
        return tensors
    for name in (name for name in _ORDER if name in values):
        tensors |= _tensors(name, values[name], nin=False)
    if "Dense_1" in values:  # the shortcut of a "ddpm" block
        tensors |= _tensors("NIN_0", values["Dense_1"], nin=True)
    return tensors


def state_dict(config: ConfigDict, params: Any) -> "OrderedDict[str, np.ndarray]":
    """A tree of parameters as the release's state dict, in its order and without its buffers."""
    state: OrderedDict[str, np.ndarray] = OrderedDict()
    for i, name in enumerate(_modules_in_order(config)):
        for key, value in _module_tensors(name.rsplit("_", 1)[0], params[name]).items():
            state[f"module.all_modules.{i}.{key}"] = value
    return state


def write(config: ConfigDict, state: TrainState, path: pathlib.Path) -> None:
    """Write the state of a run as the release does: network, EMA, Adam's moments and the step.

    Args:
      config: the run's config.
      state: as a checkpoint has it, with the state of the optimiser.
      path: of the file, which is replaced.

    Raises:
      UserError: the release has no such network.
      OSError: the file can't be written.
    """
    check_network(config)
    model, optim, step = state_dict(config, state.params), config.optim, int(state.step)
    # The Fourier embedding's frequencies are not trained and have no EMA and no moments.
    trained = [not (key.endswith(".W") and value.ndim == 1) for key, value in model.items()]
    averages = state_dict(config, state.ema_params)

    def of_adam(name: str) -> Any:
        return optax.tree_utils.tree_get(
            state.opt_state, name, filtering=lambda path, _: "ScaleByAdamState" in str(path)
        )

    mean, variance = (state_dict(config, of_adam(name)) for name in ("mu", "nu"))
    count = int(of_adam("count"))
    adam = {
        i: {"step": count, "exp_avg": mean[key], "exp_avg_sq": variance[key]}
        for i, key in enumerate(model)
        if trained[i] and count
    }
    group = {
        "lr": float(optim.lr),
        "betas": (float(optim.beta1), 0.999),
        "eps": float(optim.eps),
        "weight_decay": float(optim.weight_decay),
        "amsgrad": False,
        "params": list(range(len(model))),
    }
    shadow = [value for value, one in zip(averages.values(), trained, strict=True) if one]
    ema = {"decay": float(config.model.ema_rate), "num_updates": step, "shadow_params": shadow}
    optimizer = {"state": adam, "param_groups": [group]}
    sigmas = np.exp(
        np.linspace(
            np.log(config.model.sigma_max), np.log(config.model.sigma_min), config.model.num_scales
        )
    )
    network = OrderedDict({"module.sigmas": sigmas, **model})
    write_pth(path, {"optimizer": optimizer, "model": network, "ema": ema, "step": step})
