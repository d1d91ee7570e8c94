"""Connects the processes, on one or several machines, that share a run.

All processes run the same program. Only process 0, the main process, reads and writes the workdir.
"""

import contextlib
import ctypes
import io
import json
import logging
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from configs.errors import UserError
from runtime import last_line

log = logging.getLogger("soft_truncation")


# Seconds without a sign of life after which a process counts as lost. A thread in C++ gives the
# signs, also while Python is busy.
_PATIENCE = 12
_GRACE = 3.0  # seconds for the others to end by themselves: all may have the same error


def initialize(
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    detect: bool,
    timeout: int = 300,
) -> None:
    """Connect to the other processes; call it before JAX is used for anything else.

    From then on this process ends, with one line, if another one is lost (`runtime.last_line`).

    Args:
      coordinator: host:port of process 0, the same for every process; None: this process runs
        alone, or the address is detected.
      num_processes, process_id: the number of processes, and the index of this one.
      detect: whether to get these three from SLURM, Open MPI or the TPU's metadata.
      timeout: seconds to wait for the others. Then the process ends with one line.

    Raises:
      UserError: only some of the three are given, they are wrong, or the port can't be used.
    """
    given = [x is not None for x in (coordinator, num_processes, process_id)]
    if not any(given) and not detect:
        return
    if any(given) and not all(given):
        raise UserError(
            "--coordinator_address, --num_processes and --process_id belong together; or "
            "--distributed alone asks SLURM, Open MPI or the TPU for them"
        )
    if coordinator and num_processes is not None and process_id is not None:
        _check_place(coordinator, num_processes, process_id)
    last_line.relay()
    # JAX aborts when a process is lost. Then neither memory is dumped nor does the shell say so.
    libc = ctypes.CDLL(None)
    libc.signal(signal.SIGABRT, libc._exit)
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            initialization_timeout=timeout,
            heartbeat_timeout_seconds=_PATIENCE,
        )
    except (ValueError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"the other processes can't be joined: {reason}") from error


def _check_place(coordinator: str, count: int, index: int) -> None:
    host, _, port = coordinator.rpartition(":")
    if not (host and port.isdecimal() and 0 < int(port) < 2**16):
        raise UserError(f"--coordinator_address is {coordinator!r}; it must be host:port")
    if not 0 <= index < count:
        raise UserError(f"--process_id is {index}; it must be from 0 to {count - 1}")


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """A context in which an error of one process also ends the others.

    At a normal exit JAX would wait for the other processes; here this one ends at once, and they
    notice it within seconds. In a run of one process the error is just raised.
    """
    try:
        yield
    except BaseException as error:
        if not jax.distributed.is_initialized():
            raise
        status: Any = 1
        if isinstance(error, SystemExit):
            status = error.code
        else:
            if re.match("[A-Z_]+: ", str(error)):  # as XLA's errors begin
                # It may come from the loss of another process, whose line is then the last one.
                time.sleep(_PATIENCE + 3)
            traceback.print_exc()
        sys.stderr.flush()
        time.sleep(_GRACE)
        os._exit(status)


_PART = 2**28  # bytes that are sent to the other processes at a time


def is_main() -> bool:
    """Whether this process is the one that reads and writes the workdir."""
    return jax.process_index() == 0


def share(value: Any, like: Any = None) -> Any:
    """Send the main process's value to every process.

    Args:
      value: made of JSON's types and arrays; sequences arrive as lists. No received code is run.
      like: a tree of the same structure, if the value is a tree of other types.
    """
    if jax.process_count() == 1:
        return value
    is_tree = like is not None
    data = np.zeros(0, np.uint8)
    if is_main():
        data = _pack(jax.tree.leaves(value) if is_tree and value is not None else value)
    # In parts, since the whole would have to fit into a device's memory several times over.
    lengths = multihost_utils.broadcast_one_to_all(np.array(divmod(len(data), _PART), np.int32))
    parts, rest = (int(length) for length in lengths)
    received = []
    for i, size in enumerate([_PART] * parts + [rest]):
        part = data[i * _PART :][:size] if is_main() else np.zeros(size, np.uint8)
        received.append(np.asarray(multihost_utils.broadcast_one_to_all(part)))
    value = _unpack(np.concatenate(received))
    return jax.tree.unflatten(jax.tree.structure(like), value) if is_tree and value else value


_ARRAY = "an array's index"


def _pack(value: Any) -> np.ndarray:
    """JSON, in which arrays are numbered, and these arrays, as the bytes of an .npz file."""
    arrays: list[np.ndarray] = []

    def number(x: Any) -> dict[str, int]:
        if not isinstance(x, np.ndarray | np.generic | jax.Array):
            raise TypeError(f"a {type(x).__name__} can't be shared")
        arrays.append(np.asarray(x))
        return {_ARRAY: len(arrays) - 1}

    text, file = json.dumps(value, default=number).encode(), io.BytesIO()
    np.savez(file, *arrays, json=np.frombuffer(text, np.uint8), allow_pickle=False)
    return np.frombuffer(file.getbuffer(), np.uint8)


def _unpack(data: np.ndarray) -> Any:
    with np.load(io.BytesIO(data.data), allow_pickle=False) as file:

        def array(fields: dict[str, Any]) -> Any:
            return file[f"arr_{fields[_ARRAY]}"] if _ARRAY in fields else fields

        return json.loads(bytes(file["json"]), object_hook=array)


def on_main(fn: Callable[[], Any], like: Any = None) -> Any:
    """Call fn() on the main process; every process returns its result or raises its UserError.

    `like` is as in `share`.
    """
    value, problem = None, None
    if is_main():
        try:
            value = fn()
        except UserError as error:
            problem = error
    message = share(str(problem) if problem else None)
    if message is not None:
        raise problem or UserError(message)
    return share(value, like)


def check_equal(facts: dict[str, Any]) -> None:
    """Raise a UserError on every process if the facts (of JSON's types) of one differ from 0's."""
    if jax.process_count() == 1:
        return
    of_main = share(facts)
    own = json.loads(json.dumps(facts))
    others = [i for i, name in enumerate(of_main) if own.get(name) != of_main[name]]
    first = np.array(others[0] if others else -1, np.int32)
    found = np.asarray(multihost_utils.process_allgather(first)).ravel()
    for index, place in enumerate(found):
        if place >= 0:
            name = list(of_main)[place]
            raise UserError(
                f"{name} of process {index} is not that of process 0, {of_main[name]!r}; start all "
                "by the same command, on the same data"
            )
