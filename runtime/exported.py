"""Exported models: the EMA weights of one step, in a folder that evaluates and samples as a run.

`model.safetensors` has the weights by their path in the network, as `Conv_0/kernel`, float32, and
the step among its metadata; config.json is the run's.
"""

import pathlib
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from configs.default import UserError
from runtime.workdir import first_line

WEIGHTS = "model.safetensors"


def is_exported(workdir: pathlib.Path) -> bool:
    """Whether a folder has an exported model instead of checkpoints."""
    return (workdir / WEIGHTS).is_file()


def write(folder: pathlib.Path, params: Any, step: int) -> pathlib.Path:
    """Write parameters, a tree of arrays, to `folder`; returns the file's path."""
    from safetensors.numpy import save_file

    named = traverse_util.flatten_dict(jax.tree.map(np.asarray, params), sep="/")
    path = folder / WEIGHTS
    partial = path.with_suffix(".partial")
    save_file(named, partial, metadata={"step": str(step)})
    partial.replace(path)
    return path


def read_step(workdir: pathlib.Path) -> int:
    """The step of an exported model; UserError if the file can't be read."""
    return _read(workdir / WEIGHTS)[1]


def read(workdir: pathlib.Path, shape: Any) -> Any:
    """The parameters of an exported model.

    Args:
      workdir: its folder.
      shape: the parameters' shapes, as a tree of `jax.ShapeDtypeStruct`.

    Raises:
      UserError: the file can't be read, or has the weights of another network.
    """
    path = workdir / WEIGHTS
    named, _ = _read(path)
    expected = traverse_util.flatten_dict(shape, sep="/")
    for name in sorted(expected.keys() | named.keys()):
        ours, theirs = expected.get(name), named.get(name)
        if ours is None or theirs is None or ours.shape != theirs.shape:
            has, wants = ("none" if x is None else str(x.shape) for x in (theirs, ours))
            raise UserError(
                f"{path} is of another network: {name} is {has} there, and the config's is {wants}"
            )
    return traverse_util.unflatten_dict(named, sep="/")


def _read(path: pathlib.Path) -> tuple[dict[str, np.ndarray], int]:
    """The arrays of a safetensors file by their names, and its step."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            step = int((file.metadata() or {})["step"])
            return {name: file.get_tensor(name) for name in file.keys()}, step  # noqa: SIM118
    except KeyError as error:
        raise UserError(
            f"{path} has no step among its metadata: --mode export wrote none"
        ) from error
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} can't be read ({first_line(error)})") from error
