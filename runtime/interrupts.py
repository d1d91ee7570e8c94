"""Signals: Ctrl-C ends a program, also while XLA compiles; a run is saved when it is told to stop.

Python calls its handlers when the main thread is back from C++, where XLA compiles for minutes. So
a thread is told of signals at once, too.
"""

import contextlib
import ctypes
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Collection, Iterator
from typing import Any, NoReturn

log = logging.getLogger("soft_truncation")

_ends_process = threading.Event()  # whether this process is a program, not a notebook's


def _end(_: signal.Signals) -> NoReturn:
    """End this process with one line, and the status of programs that SIGINT ended."""
    os.write(2, b"error: interrupted; the same command goes on from what is kept\n")
    os._exit(130)


@contextlib.contextmanager
def ending_program() -> Iterator[None]:
    """A context in which Ctrl-C ends the process at once.

    Whatever is being written is left as a kill would leave it, which every mode can go on from.
    """
    _ends_process.set()
    with _watching([signal.SIGINT], _end):
        yield


@contextlib.contextmanager
def _watching(
    numbers: Collection[signal.Signals], note: Callable[[signal.Signals], None]
) -> Iterator[None]:
    """A context in which a thread calls note(signal) for these signals, and nothing else happens.

    Signals that are ignored stay so. Outside the main thread the context does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    before = {n: signal.getsignal(n) for n in numbers if signal.getsignal(n) != signal.SIG_IGN}

    def watch() -> None:
        while received := receiver.recv(1):
            if received[0] in before:
                note(signal.Signals(received[0]))
        receiver.close()

    threading.Thread(target=watch, daemon=True).start()
    for number in before:
        signal.signal(number, lambda *_: None)  # a handler of Python's, or C would not tell
    outer = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(outer)
        for number, handler in before.items():
            signal.signal(number, handler)
        sender.close()


class Preemption:
    """Stops training after the current step at SIGTERM, SIGINT or SIGHUP.

    A second SIGINT raises KeyboardInterrupt. A SIGHUP that nohup ignores stays ignored.
    With several processes, a SIGTERM to any of them stops all after the same step.
    """

    def __init__(self) -> None:
        """Signals are handled within a `with` block only."""
        self._signal, self._asked, self._processes = "", 0, 1
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Preemption":
        import jax  # here, since main.py imports this module before it can answer Ctrl-C

        self._processes = jax.process_count()
        numbers = [signal.SIGINT, signal.SIGHUP]
        if self._processes == 1:  # with several, JAX itself handles SIGTERM
            numbers.append(signal.SIGTERM)
        self._stack.enter_context(_watching(numbers, self._note))
        return self

    def __exit__(self, *_: Any) -> None:
        self._stack.close()

    def _note(self, number: signal.Signals) -> None:
        if self._signal == "SIGINT" == number.name:
            if _ends_process.is_set():
                _end(number)
            main = ctypes.c_ulong(threading.main_thread().ident or 0)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(main, ctypes.py_object(KeyboardInterrupt))
            return
        self._signal = number.name
        more = "; a second Ctrl-C stops at once" if self._signal == "SIGINT" else ""
        log.warning("%s: stopping after this step%s", self._signal, more)
        if self._processes > 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def requested(self) -> bool:
        """Whether to stop now; all processes must call it after the same steps."""
        self._asked += 1
        if self._processes > 1:
            from jax.experimental import multihost_utils

            # JAX agrees on the highest number that was asked with, plus one. Steps would not do:
            # where a call takes several, that number is passed over.
            return bool(multihost_utils.reached_preemption_sync_point(self._asked))
        return bool(self._signal)
