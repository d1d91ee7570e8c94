"""Conversion of official PyTorch checkpoints to our parameters, without PyTorch."""

import dataclasses
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from configs import fields
from configs.errors import UserError
from configs.saved import as_recorded
from configs.shapes import image_shape
from models import utils as mutils
from models.networks import NETWORKS
from official.pth_reader import read_pth
from train_step import TrainState


def _group(state: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """The tensors of each module of the official network, in the order of the modules."""
    modules: dict[str, dict[str, np.ndarray]] = {}
    for key, value in state.items():
        index, name = key.split("all_modules.")[1].split(".", 1)
        modules.setdefault(index, {})[name] = value
    return list(modules.values())


def _convert(name: str, value: np.ndarray) -> tuple[str, np.ndarray]:
    """Convert a tensor's name and layout from PyTorch's to ours."""
    if value.ndim == 4:
        return "kernel", value.transpose(2, 3, 1, 0)
    if name == "W":
        return "kernel", value
    if value.ndim == 2:
        return "kernel", value.T
    return ("scale" if name == "weight" else "bias"), value


def _layer_kind(tensors: dict[str, np.ndarray]) -> str:
    return {4: "Conv", 2: "Dense", 1: "GroupNorm"}[tensors["weight"].ndim]


def _module_params(tensors: dict[str, np.ndarray]) -> tuple[str, dict[str, Any]]:
    """The name of our class for a module, and the module's parameters under our names."""
    if "W" in tensors:
        return "GaussianFourierProjection", tensors
    if "weight" in tensors:  # one layer
        return _layer_kind(tensors), dict(_convert(n, v) for n, v in tensors.items())
    layers: dict[str, dict[str, np.ndarray]] = {}
    for path, value in tensors.items():
        layer, name = path.split(".")
        ours, array = _convert(name, value)
        layers.setdefault(layer, {})[ours] = array
    if "Conv2d_0" in layers:
        return "FIRConv", layers["Conv2d_0"]
    if list(layers) == ["Conv_0"]:
        resamples = layers["Conv_0"]["kernel"].shape[0] == 3
        return ("ResampleConv" if resamples else "Combine"), layers
    # A NIN layer is our Dense. In a "ddpm" block Dense_0 is for the time, Dense_1 the shortcut.
    first = 1 if "Dense_0" in layers else 0
    renamed = {
        f"Dense_{first + int(k[4:])}" if k.startswith("NIN_") else k: v for k, v in layers.items()
    }
    return ("ResBlock" if "Conv_0" in layers else "AttnBlock"), renamed


def convert_state(state: dict[str, np.ndarray]) -> dict[str, Any]:
    """Convert the official network's state dict to our network's parameters.

    In both networks the modules of a kind are numbered in the order of the forward pass.
    """
    params: dict[str, Any] = {}
    counts: dict[str, int] = {}
    for tensors in _group(state):
        kind, values = _module_params(tensors)
        number = counts.get(kind, 0)
        counts[kind] = number + 1
        params[f"{kind}_{number}"] = values
    return params


@dataclasses.dataclass(frozen=True)
class _Official:
    """The contents of a checkpoint; all but `step` are trees with our network's structure."""

    params: Any
    ema_params: Any
    mean: Any  # Adam's moments; None if Adam has made no step
    variance: Any
    step: int

    @property
    def trees(self) -> list[Any]:
        return [self.params, self.ema_params, self.mean, self.variance]


def _read_official(path: str | pathlib.Path) -> _Official:
    checkpoint = read_pth(path)
    try:
        state = {k: v for k, v in checkpoint["model"].items() if ".all_modules." in f".{k}"}
        # The Fourier embedding's frequencies are not trained and have no EMA and no moments.
        trained = [k for k, v in state.items() if not (k.endswith(".W") and v.ndim == 1)]
        shadow = checkpoint["ema"]["shadow_params"]
        if len(shadow) != len(trained):
            raise ValueError(f"{len(shadow)} EMA tensors for {len(trained)} parameters")
        step = checkpoint["step"]
        if type(step) is not int or not 0 <= step < 2**31:
            raise ValueError(f"its step is {step!r}")
        ema_state = state | dict(zip(trained, shadow, strict=True))
        moments = checkpoint["optimizer"]["state"]

        def moment(name: str) -> Any:
            # Moments are numbered in the order of the network's parameters.
            known = {k: moments[i][name] for i, k in enumerate(state) if i in moments}
            zeros = {k: np.zeros_like(v) for k, v in state.items()}
            return convert_state(zeros | known) if moments else None

        return _Official(
            convert_state(state),
            convert_state(ema_state),
            moment("exp_avg"),
            moment("exp_avg_sq"),
            step,
        )
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise UserError(
            f"{path} is not laid out as an official checkpoint: {type(error).__name__}: {error}"
        ) from error


def check_shapes(path: str | pathlib.Path, trees: list[Any], expected: Any) -> None:
    """Raise a UserError that names the first tensor of a tree that `expected` has otherwise.

    A tree may be None.
    """

    def named(tree: Any) -> Any:
        return {jax.tree_util.keystr(k): v for k, v in jax.tree_util.tree_leaves_with_path(tree)}

    ours = named(expected)
    for tree in trees:
        theirs = named(tree)
        for name in sorted(theirs.keys() | ours.keys()) if tree is not None else ():
            shapes = [str(d[name].shape) if name in d else "nothing" for d in (theirs, ours)]
            if shapes[0] != shapes[1]:
                raise UserError(
                    f"{path} does not fit the config: {name} is {shapes[0]} there and "
                    f"{shapes[1]} in the config's network"
                )


def check_fields(
    path: str | pathlib.Path, own: ConfigDict, given: Mapping[str, Any], names: Iterable[str]
) -> None:
    """Raise a UserError that names the first field in which a file's config differs from another.

    Args:
      path: the file or folder, for the message.
      own: its config.
      given: the other config, as a dictionary.
      names: the fields, such as model.nf.
    """
    recorded = as_recorded(own)
    for field in names:
        section, name = field.split(".")
        theirs, ours = recorded[section][name], given[section][name]
        if theirs != ours:
            raise UserError(
                f"{path} does not fit the config: {field} is {theirs!r} there and {ours!r} in the "
                "config"
            )


def check_network(
    name: str, parametrization: str, num_classes: int, patch_size: int, optimizer: str = "Adam"
) -> None:
    """Raise a UserError if the release has no checkpoints of such a network and optimiser."""
    if not NETWORKS[name].in_release:
        known = [known for known, network in NETWORKS.items() if network.in_release]
        raise UserError(f"model.name is {name}; official checkpoints are of {' and '.join(known)}")
    if parametrization != "noise":
        raise UserError("official networks predict the noise: model.parametrization must be noise")
    if num_classes:
        raise UserError("official networks are not told labels: model.num_classes must be 0")
    if optimizer != "Adam":
        raise UserError("official checkpoints are of Adam: optim.optimizer must be Adam")
    if patch_size > 1:
        raise UserError("official networks do not fold pixels: model.patch_size must be 1")


def load(path: str | pathlib.Path, config: ConfigDict) -> tuple[Any, Any, int]:
    """Read an official checkpoint as (params, ema_params, step) of the config's network.

    Raises:
      UserError: the file can't be read, or its weights do not fit the config's network; the
        message names the first tensor that differs.
    """
    fields.call(check_network, config, "model")
    shape = mutils.params_shape(mutils.create_model(config), image_shape(config))
    official = _read_official(path)
    check_shapes(path, official.trees, shape)
    return official.params, official.ema_params, official.step


def load_state(
    path: str | pathlib.Path, shape: Any, optimizer: optax.GradientTransformation
) -> TrainState:
    """Read an official checkpoint as the state of a run, with Adam's moments if it has them.

    Without moments Adam starts anew, but the learning-rate warm-up continues at the step.

    Args:
      path: of the file.
      shape: the shapes of the network's parameters (`models.utils.params_shape`).
      optimizer: Adam with a schedule.

    Raises:
      UserError: as `load`.
    """
    official = _read_official(path)
    check_shapes(path, official.trees, shape)
    params, ema_params, mean, variance = jax.tree.map(
        jnp.asarray, (official.params, official.ema_params, official.mean, official.variance)
    )
    opt_state, step = optimizer.init(params), jnp.asarray(official.step, jnp.int32)
    if mean is None:

        def in_schedule(path: Any, _: Any) -> bool:
            return "ScaleByScheduleState" in str(path)

        opt_state = optax.tree_utils.tree_set(opt_state, in_schedule, count=step)
    else:
        opt_state = optax.tree_utils.tree_set(opt_state, mu=mean, nu=variance, count=step)
    return TrainState(step, params, ema_params, opt_state)
