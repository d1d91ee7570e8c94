"""A lock that waits for another process instead of failing."""

import contextlib
import errno
import fcntl
import logging
import pathlib
from collections.abc import Iterator

log = logging.getLogger("soft_truncation")


@contextlib.contextmanager
def waiting_lock(path: pathlib.Path, waiting: str) -> Iterator[None]:
    """Hold the lock of a file; the system lets it go when the process ends, however it does.

    On a file system without locks two processes do the same work, and one result is kept.

    Args:
      path: the file, which is made.
      waiting: said in the log if another process holds it.
    """
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("%s; waiting for it", waiting)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL):
                raise
        yield
