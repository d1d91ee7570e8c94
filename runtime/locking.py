"""Locks between processes, which end with their process, however that ends; links are refused."""

import contextlib
import errno
import logging
import os
import pathlib
import socket
from collections.abc import Iterator

from filelock import FileLock, Timeout

from configs.errors import UserError

log = logging.getLogger("soft_truncation")

# What a file system without locks answers.
_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS)


def _sign(descriptor: int) -> None:
    """Write into a lock's file who holds it, but not into a file that has another name too."""
    with contextlib.suppress(OSError):  # the disk may be full
        if os.fstat(descriptor).st_nlink == 1:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)


@contextlib.contextmanager
def _held(path: pathlib.Path, waiting: str = "") -> Iterator[None]:
    lock = FileLock(path, blocking=False, fallback_to_soft=False, on_acquired=_sign)
    try:
        lock.acquire()
    except Timeout as error:
        if not waiting:
            who = path.read_text(errors="replace")[:200].strip() if path.is_file() else ""
            who = f"{who or 'another process'} is at work in {path.parent}"
            raise UserError(f"{who}; wait for it, or end it") from error
        log.info("%s; waiting for it", waiting)
        lock.acquire(blocking=True, poll_interval=0.2)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UserError(f"{path} is a link, which no lock is; delete it") from error
        if error.errno not in _WITHOUT_LOCKS:
            raise
        log.warning("the file system of %s has no locks: start no second run there", path.parent)
    try:
        yield
    finally:
        lock.release()


def waiting_lock(path: pathlib.Path, waiting: str) -> contextlib.AbstractContextManager[None]:
    """Create a file and hold its lock, after waiting for other processes.

    On a file system without locks two processes may do the same work; one result is kept.
    `waiting` is the beginning of the log line if another process holds the lock.
    """
    return _held(path, waiting)


def locked(folder: pathlib.Path) -> contextlib.AbstractContextManager[None]:
    """Hold the lock of a folder; UserError if another process holds it, or its file is a link."""
    return _held(folder / ".lock")
