"""Noticing within seconds that another process of a run has ended or hangs.

Without this the others would wait for it in a collective operation, until JAX aborts them after 100
seconds. Each process keeps a TCP connection to process 0; both ends say every second that they
live. The kernel closes the connection of a process that was killed at once.
"""

import contextlib
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable

from runtime.environment import shown

log = logging.getLogger("soft_truncation")

PATIENCE = 30.0  # seconds of silence after which a process counts as lost; copying 6 GiB takes some
_GRACE = 3.0  # seconds for this process to end by itself, when another one has failed
_ALIVE, _DONE, _FAILED = b".", b"!", b"?"
_HELLO = b"soft_truncation, process "  # and its index, in 4 bytes


def _notice_lost_machine(connection: socket.socket) -> None:
    """Let the kernel end a connection whose other machine has been silent for 15 seconds.

    A process that is busy may say nothing for longer, but its kernel answers.
    """
    if connection.family not in (socket.AF_INET, socket.AF_INET6):
        return
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = {"KEEPIDLE": 5, "KEEPINTVL": 3, "KEEPCNT": 3, "USER_TIMEOUT": 15_000}
    for name, value in options.items():
        if hasattr(socket, f"TCP_{name}"):  # as on Linux
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_{name}"), value)


class Peers:
    """The connections of this process; ends it, with one line, when another one is lost."""

    def __init__(self, index: int, count: int) -> None:
        """For process `index` of `count`; connect by `gather` (process 0) or `join`."""
        self._index, self._count = index, count
        self._sockets: dict[int, socket.socket] = {}
        self._lock, self._lost, self._left = threading.Lock(), threading.Event(), False
        # What to say of where the run is, and from where it goes on; for the main process.
        self.describe: Callable[[], tuple[str, str]] = lambda: ("", "")

    def gather(self, port: int = 0, timeout: float | None = None) -> int:
        """Accept the other processes: process 0's part.

        Args:
          port: where; 0: at any free port.
          timeout: seconds to wait for all of them; None: they are accepted in the background.

        Returns:
          The port.

        Raises:
          TimeoutError: some have not come; the message names them.
          OSError: the port can't be used.
        """
        # JAX's own service takes the port afterwards, while these connections last.
        server = socket.create_server(("", port), backlog=self._count, reuse_port=bool(port))
        place = server.getsockname()[1]
        if timeout is None:
            threading.Thread(target=self._accept, args=(server, None), daemon=True).start()
        else:
            self._accept(server, time.monotonic() + timeout)
        return place

    def join(self, host: str, port: int, timeout: float) -> None:
        """Connect to process 0, and wait until all are there; OSError if that fails."""
        until = time.monotonic() + timeout
        while True:
            try:
                connection = socket.create_connection((host, port), timeout=max(1.0, timeout))
                break
            except OSError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.2)
        connection.settimeout(max(1.0, until - time.monotonic()) + 5)
        connection.sendall(_HELLO + self._index.to_bytes(4, "big"))
        said = connection.recv(1024)
        if not said.startswith(_ALIVE):
            raise OSError(said.decode().removeprefix("lost ") or "it has ended")
        self._add(0, connection)
        threading.Thread(target=self._say_alive, daemon=True).start()

    def leave(self, well: bool) -> None:
        """Say that this process ends, as it should or by an error of its own."""
        self._left = True
        for connection in list(self._sockets.values()):
            with contextlib.suppress(OSError):
                connection.sendall(_DONE if well else _FAILED)

    def wait_if_lost(self) -> None:
        """After an error: if it comes from the loss of a process, wait until this one is ended."""
        if self._lost.wait(1.0):
            time.sleep(60)

    def _accept(self, server: socket.socket, until: float | None) -> None:
        """Accept the others until a time, and start to say that this process lives."""
        with server:
            while len(self._sockets) < self._count - 1:
                left = None if until is None else max(0.01, until - time.monotonic())
                server.settimeout(left)
                try:
                    connection, _ = server.accept()
                except TimeoutError as error:
                    missing = [i for i in range(1, self._count) if i not in self._sockets]
                    who = ", ".join(map(str, missing))
                    text = f"process{'es' * (len(missing) > 1)} {who} did not come"
                    self._tell(text)
                    raise TimeoutError(text) from error
                index = self._index_of(connection)
                if 0 < index < self._count and index not in self._sockets:
                    self._add(index, connection)
                else:
                    connection.close()
        threading.Thread(target=self._say_alive, daemon=True).start()

    def _index_of(self, connection: socket.socket) -> int:
        """The index of the process at the other end; 0 if it says nothing, or something else."""
        connection.settimeout(_GRACE)
        said = b""
        with contextlib.suppress(OSError):
            said = connection.recv(len(_HELLO) + 4, socket.MSG_WAITALL)
        whole = len(said) == len(_HELLO) + 4 and said.startswith(_HELLO)
        return int.from_bytes(said[-4:], "big") if whole else 0

    def _add(self, index: int, connection: socket.socket) -> None:
        connection.settimeout(PATIENCE)
        _notice_lost_machine(connection)
        with self._lock:
            self._sockets[index] = connection
        threading.Thread(target=self._watch, args=(index, connection), daemon=True).start()

    def _say_alive(self) -> None:
        while not self._left:
            for connection in list(self._sockets.values()):
                with contextlib.suppress(OSError):  # `_watch` notices
                    connection.sendall(_ALIVE)
            time.sleep(1.0)

    def _watch(self, index: int, connection: socket.socket) -> None:
        why = "was lost"
        try:
            while said := connection.recv(1024):
                if b"lost " in said:
                    self._end(said.decode().partition("lost ")[2])
                if _DONE in said:
                    return
                if _FAILED in said:
                    why = "ended with an error"
                    time.sleep(_GRACE)  # all may have the same error
                    break
        except TimeoutError as error:
            if error.errno is None:  # else the kernel has given its machine up
                why = f"has not answered for {PATIENCE:.0f} seconds"
        except OSError:
            pass
        with self._lock:
            is_first = not self._lost.is_set()
            self._lost.set()
        if not is_first:
            return  # those that are told of the first end, too, and are not what is wrong
        # At once: JAX aborts the others by a stack dump when it notices the loss of process 0.
        at, go_on = self.describe() if not self._index else ("", "")
        go_on = go_on or "from the newest checkpoint"
        text = f"process {index} {why}{at}; the same commands go on {go_on}"
        self._tell(text)
        self._end(text)

    def _tell(self, text: str) -> None:
        for connection in list(self._sockets.values()):
            with contextlib.suppress(OSError):
                connection.sendall(f"lost {text}".encode())

    def _end(self, text: str) -> None:
        # Not by an exception: the main thread waits for the lost process in compiled code.
        print(f"error: {shown(text)}", file=sys.stderr, flush=True)
        os._exit(1)
