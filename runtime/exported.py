"""Exported models: the EMA weights of one step, in a folder that can be used like a run.

`model.safetensors` has the weights, float32, by their path in the network, such as `Conv_0/kernel`.
Its metadata have the step and, except in older files, a digest of everything. config.json is that
of the run.
"""

import contextlib
import hashlib
import logging
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from flax import traverse_util

from configs.errors import UserError
from runtime.checksums import KINDS, checksums
from runtime.workdir import first_line, short_hash

log = logging.getLogger("soft_truncation")

WEIGHTS = "model.safetensors"
PICTURE = "samples.png"  # a grid of samples, if there is one


def is_exported(workdir: pathlib.Path) -> bool:
    """Whether a folder has an exported model instead of checkpoints."""
    return (workdir / WEIGHTS).is_file()


def refuse(workdir: pathlib.Path) -> None:
    """Raise a UserError if a folder for a run has an exported model."""
    if is_exported(workdir):
        raise UserError(
            f"{workdir} is an exported model, without the state of training; choose another "
            "--workdir"
        )


def write(folder: pathlib.Path, params: Any, step: int) -> None:
    """Write parameters, a tree of arrays, to `folder`; OSError if the disk fails."""
    from safetensors.numpy import save

    # The library writes an array's memory as it lies, so that it must be in C's order.
    named = traverse_util.flatten_dict(params, sep="/")
    named = {name: np.asarray(x, np.float32, order="C") for name, x in named.items()}
    facts = {"step": str(step), "config": _digest_of_config(folder)}
    facts["digest"] = short_hash(facts, checksums(named))
    # Not its save_file, which lets nobody but the owner read the file.
    (folder / WEIGHTS).write_bytes(save(named, metadata=facts))


def _digest_of_config(folder: pathlib.Path) -> str:
    path = folder / "config.json"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def read_step(workdir: pathlib.Path) -> int:
    """The step of an exported model; UserError if the file can't be read."""
    with _opened(workdir / WEIGHTS) as file:
        step = (file.metadata() or {}).get("step", "")
        if not step.isdecimal() or int(step) >= 2**31:
            raise ValueError(f"its step is {step!r}; --mode export writes a number")
        return int(step)


def read(workdir: pathlib.Path, shape: Any) -> Any:
    """The parameters of an exported model, NumPy arrays of float32.

    Args:
      workdir: its folder.
      shape: the parameters' shapes, as a tree of `jax.ShapeDtypeStruct`.

    Raises:
      UserError: the file can't be read, or has the weights of another network.
    """
    path = workdir / WEIGHTS
    expected = {
        name: list(x.shape) for name, x in traverse_util.flatten_dict(shape, sep="/").items()
    }
    named = {}
    with _opened(path) as file:
        there = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        for name in sorted(expected.keys() | there.keys()):
            has = there[name].get_shape() if name in there else "none"
            wants = expected.get(name, "none")
            if has != wants:
                raise UserError(
                    f"{path} is of another network: {name} is {has} there, and the config's is "
                    f"{wants}"
                )
            if there[name].get_dtype() != "F32":
                raise ValueError(f"{name} is {there[name].get_dtype()}, not F32")
            named[name] = file.get_tensor(name)
        facts = file.metadata() or {}
        digest = facts.pop("digest", None)
        digests = (short_hash(facts, checksums(named, x)) for x in KINDS)
        if digest is not None and digest not in digests:
            raise ValueError("it is damaged: its checksum is another")
    if digest and facts["config"] != _digest_of_config(workdir):
        log.warning("%s has changed since the model was exported", workdir / "config.json")
    return traverse_util.unflatten_dict(named, sep="/")


@contextlib.contextmanager
def _opened(path: pathlib.Path) -> Iterator[Any]:
    """An open safetensors file; raises a UserError if it can't be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            yield file
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} can't be read ({first_line(error)})") from error
