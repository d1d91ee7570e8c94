"""Processes, on one machine or several, that train or evaluate together, and their signals.

All run the same program. Only process 0, the main process, reads and writes the workdir.
"""

import logging
import os
import pickle
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.typing import ArrayLike

from configs.default import UserError

log = logging.getLogger("soft_truncation")


def initialize(
    coordinator: str | None, num_processes: int | None, process_id: int | None, detect: bool
) -> None:
    """Connect to the other processes; call it before JAX is used for anything else.

    Args:
      coordinator: host:port of process 0, the same for every process; None: this process runs
        alone, or the address is detected.
      num_processes, process_id: the number of processes, and the index of this one.
      detect: get these three from SLURM, Open MPI or the TPU's metadata.

    Raises:
      UserError: only some of the three are given, or the other processes can't be reached.
    """
    given = [x is not None for x in (coordinator, num_processes, process_id)]
    if not any(given) and not detect:
        return
    if any(given) and not all(given):
        raise UserError(
            "--coordinator_address, --num_processes and --process_id belong together; or "
            "--distributed alone asks SLURM, Open MPI or the TPU for them"
        )
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id)
    except (ValueError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"the other processes can't be joined: {reason}") from error


_PART = 2**28  # bytes that are sent to the other processes at a time


def is_main() -> bool:
    """Whether this process is the one that reads and writes the workdir."""
    return jax.process_index() == 0


def share(value: Any) -> Any:
    """Send the main process's value, which must be picklable, to every process."""
    if jax.process_count() == 1:
        return value
    data = np.frombuffer(pickle.dumps(value), np.uint8) if is_main() else np.zeros(0, np.uint8)
    size = _read_length(multihost_utils.broadcast_one_to_all(_length(len(data))))
    received = []
    # In parts, since the whole would have to fit into a device's memory several times over.
    for start in range(0, size, _PART):
        part = (
            data[start : start + _PART]
            if is_main()
            else np.zeros(min(_PART, size - start), np.uint8)
        )
        received.append(np.asarray(multihost_utils.broadcast_one_to_all(part)))
    return pickle.loads(np.concatenate(received).tobytes())


def _length(size: int) -> np.ndarray:
    """A length as two numbers of 32 bits, since JAX has none of 64 bits by default."""
    return np.array(divmod(size, 2**32), np.uint32)


def _read_length(numbers: ArrayLike) -> int:
    high, low = (int(number) for number in np.asarray(numbers))
    return high * 2**32 + low


def on_main(fn: Callable[[], Any]) -> Any:
    """Call fn() on the main process; every process returns its result or raises its UserError."""
    value, problem = None, None
    if is_main():
        try:
            value = fn()
        except UserError as error:
            problem = error
    value, message = share((value, str(problem) if problem else None))
    if message:
        raise problem or UserError(message)
    return value


class Preemption:
    """Stops training after the current step at SIGTERM or SIGINT, at once at a second SIGINT.

    With several processes, a SIGTERM to any of them stops all after the same step.
    """

    def __init__(self) -> None:
        """Signals are handled within a `with` block only."""
        self._signal, self._asked = "", 0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Preemption":
        if threading.current_thread() is threading.main_thread():
            # With several processes, JAX itself handles SIGTERM.
            several = jax.process_count() > 1
            for number in (signal.SIGINT,) if several else (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self._signal == "SIGINT" == signal.Signals(number).name:
            raise KeyboardInterrupt
        self._signal = signal.Signals(number).name
        log.warning("%s: stopping after this step", self._signal)
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def requested(self) -> bool:
        """Whether to stop now; every process must ask equally often, after the same steps."""
        self._asked += 1
        if jax.process_count() > 1:
            # JAX agrees on the highest number that was asked with, plus one. Steps would not do:
            # where a call takes several, that number is passed over.
            return bool(multihost_utils.reached_preemption_sync_point(self._asked))
        return bool(self._signal)
