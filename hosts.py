"""Several processes, on one machine or many, that train or evaluate together; and their signals.

All run the same program. Process 0, the main one, alone reads and writes the workdir.
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

from configs.default import UserError

log = logging.getLogger("soft_truncation")


def initialize(
    coordinator: str | None, num_processes: int | None, process_id: int | None, detect: bool
) -> None:
    """Join the other processes, before anything else of JAX is used.

    Args:
      coordinator: host:port of process 0, the same for all; None: alone, or as detected.
      num_processes, process_id: how many there are, and which this is.
      detect: ask SLURM, Open MPI or the TPU's metadata for these.

    Raises:
      UserError: some are missing, or the others do not come.
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


def is_main() -> bool:
    """Whether this process is the one that reads and writes the workdir."""
    return jax.process_index() == 0


def share(value: Any) -> Any:
    """The main process's value, on all; it must be one that pickle takes."""
    if jax.process_count() == 1:
        return value
    data = np.frombuffer(pickle.dumps(value), np.uint8) if is_main() else np.zeros(0, np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.array(len(data))))
    data = data if is_main() else np.zeros(size, np.uint8)
    return pickle.loads(multihost_utils.broadcast_one_to_all(data).tobytes())


def on_main(fn: Callable[[], Any]) -> Any:
    """What fn() gives on the main process, on all; so with a UserError that it raises."""
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
    """SIGTERM and SIGINT ask for a stop after the step; a second SIGINT stops at once.

    With several processes, a SIGTERM to any of them stops all after the same step.
    """

    def __init__(self) -> None:
        """Listens within a `with` block."""
        self._signal = ""
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Preemption":
        if threading.current_thread() is threading.main_thread():
            # JAX itself listens to SIGTERM where there are several processes.
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

    def requested(self, step: int) -> bool:
        """Whether to stop after `step`; all processes must ask after every step."""
        if jax.process_count() > 1:
            return bool(multihost_utils.reached_preemption_sync_point(step))
        return bool(self._signal)
