"""Writing files on disks that can be full, broken or gone: each is there whole or not at all."""

import contextlib
import logging
import os
import pathlib
import secrets
from collections.abc import Iterator
from typing import BinaryIO

log = logging.getLogger("soft_truncation")


def beside(path: pathlib.Path, suffix: str = "") -> pathlib.Path:
    """A new hidden name beside `path`, which no other process takes, in a container or not."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}{suffix}")


@contextlib.contextmanager
def replacing(path: pathlib.Path, sync: bool = True) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` when the context ends, and not after an error.

    Args:
      path: the file; its folder must exist.
      sync: whether the file is on the disk before it takes the place, so that no crash of the
        machine leaves an empty one.

    Raises:
      OSError: it can't be written; what was at `path` is there still.
    """
    partial = beside(path, ".part")
    try:
        with partial.open("xb") as file:  # which follows no link
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        partial.replace(path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def write_text(path: pathlib.Path, text: str) -> None:
    """Write a text file in UTF-8, as `replacing` does."""
    with replacing(path) as file:
        file.write(text.encode())


@contextlib.contextmanager
def can_do_without(path: pathlib.Path) -> Iterator[None]:
    """Log a failure to write a file that is for people alone, instead of raising it."""
    try:
        yield
    except OSError as error:
        log.warning("%s can't be written (%s)", path, error.strerror or error)
