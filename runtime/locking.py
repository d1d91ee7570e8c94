"""File locks between processes: one waits until the lock is free, the other raises an error."""

import contextlib
import errno
import fcntl
import logging
import os
import pathlib
import socket
from collections.abc import Iterator

from configs.default import UserError

log = logging.getLogger("soft_truncation")

_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL)  # what such a file system answers


@contextlib.contextmanager
def waiting_lock(path: pathlib.Path, waiting: str) -> Iterator[None]:
    """Hold the lock of a file, after waiting for it; it is released even if the process is killed.

    On a file system without locks two processes may do the same work; one result is kept.

    Args:
      path: the file, which is created.
      waiting: the beginning of the log line if another process holds the lock.
    """
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("%s; waiting for it", waiting)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _WITHOUT_LOCKS:
                raise
        yield


@contextlib.contextmanager
def locked(folder: pathlib.Path) -> Iterator[None]:
    """Hold the lock of a folder; it is released even if the process is killed.

    Raises:
      UserError: another process holds the lock.
    """
    with (folder / ".lock").open("a+") as file:
        file.seek(0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            who = file.read(1000).strip() or "another process"
            raise UserError(f"{who} is at work in {folder}; wait for it, or end it") from error
        except OSError as error:
            if error.errno not in _WITHOUT_LOCKS:
                raise
            log.warning("the file system of %s has no locks: start no second run there", folder)
        with contextlib.suppress(OSError):  # the disk may be full
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
        yield
