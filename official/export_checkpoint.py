"""Conversion of our runs to checkpoints of the official release, without PyTorch."""

import pathlib
from collections import OrderedDict
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from official.pth_writer import write_pth
from train_step import TrainState

# The layers of a block in the order in which the release makes them; NIN is our Dense.
_ORDER = ("GroupNorm_0", "Conv_0", "Dense_0", "GroupNorm_1", "Conv_1", "Conv_2")


def _modules_in_order(model: nn.Module, shape: tuple[int, ...]) -> list[str]:
    """The names of the network's modules in the order of the forward pass, as the release's."""
    names: list[str] = []

    def record(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if len(context.module.path) == 1 and context.method_name == "__call__":
            names.append(context.module.name)
        return call(*args, **kwargs)

    x = jnp.zeros((1, *shape))
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


def _state_dict(modules: list[str], params: Any) -> "OrderedDict[str, np.ndarray]":
    """A tree of parameters as the release's state dict, in its order and without its buffers."""
    state: OrderedDict[str, np.ndarray] = OrderedDict()
    for i, name in enumerate(modules):
        for key, value in _module_tensors(name.rsplit("_", 1)[0], params[name]).items():
            state[f"module.all_modules.{i}.{key}"] = value
    return state


def write(
    path: pathlib.Path,
    state: TrainState,
    model: nn.Module,
    shape: tuple[int, ...],
    *,
    lr: float,
    beta1: float,
    eps: float,
    weight_decay: float,
    ema_rate: float,
    sigma_min: float,
    sigma_max: float,
    num_scales: int,
) -> None:
    """Write the state of a run as the release does: network, EMA, Adam's moments and the step.

    Args:
      path: of the file, which is replaced.
      state: as a checkpoint has it, with the state of the optimiser.
      model: a network that the release has (`import_checkpoint.check_network`).
      shape: of an image, (H, W, C).
      lr, beta1, eps, weight_decay: of Adam.
      ema_rate: of the EMA.
      sigma_min, sigma_max, num_scales: the noise levels of VE, which every checkpoint has.

    Raises:
      OSError: the file can't be written.
    """
    modules = _modules_in_order(model, shape)
    weights, step = _state_dict(modules, state.params), int(state.step)
    # The Fourier embedding's frequencies are not trained and have no EMA and no moments.
    trained = [not (key.endswith(".W") and value.ndim == 1) for key, value in weights.items()]
    averages = _state_dict(modules, state.ema_params)
    shadow = [value for value, one in zip(averages.values(), trained, strict=True) if one]
    group = {
        "lr": float(lr),
        "betas": (float(beta1), 0.999),
        "eps": float(eps),
        "weight_decay": float(weight_decay),
        "amsgrad": False,
        "params": list(range(len(weights))),
    }
    sigmas = np.exp(np.linspace(np.log(sigma_max), np.log(sigma_min), num_scales))
    tree = {
        "optimizer": {
            "state": _adam(modules, list(weights), trained, state.opt_state),
            "param_groups": [group],
        },
        "model": OrderedDict({"module.sigmas": sigmas, **weights}),
        "ema": {"decay": float(ema_rate), "num_updates": step, "shadow_params": shadow},
        "step": step,
    }
    write_pth(path, tree)


def _adam(
    modules: list[str], keys: list[str], trained: list[bool], opt_state: Any
) -> dict[int, dict[str, Any]]:
    """Adam's moments of each trained tensor, by its number; none before the first step."""

    def of_adam(name: str) -> Any:
        return optax.tree_utils.tree_get(
            opt_state, name, filtering=lambda path, _: "ScaleByAdamState" in str(path)
        )

    count = int(of_adam("count"))
    mean, variance = (_state_dict(modules, of_adam(name)) for name in ("mu", "nu"))
    return {
        i: {"step": count, "exp_avg": mean[key], "exp_avg_sq": variance[key]}
        for i, key in enumerate(keys)
        if trained[i] and count
    }
