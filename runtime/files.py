"""Writes files completely or not at all, also on disks that may be full, broken or gone."""

import contextlib
import logging
import os
import pathlib
import secrets
from collections.abc import Iterator
from typing import BinaryIO

log = logging.getLogger("soft_truncation")


def beside(path: pathlib.Path, suffix: str = "") -> pathlib.Path:
    """A new hidden name in the folder of `path` that no other process uses, in any container."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}{suffix}")


@contextlib.contextmanager
def replacing(path: pathlib.Path, sync: bool = True) -> Iterator[BinaryIO]:
    """A new file that replaces `path` when the context ends without an error.

    Args:
      path: the file; its folder must exist.
      sync: whether the new file is written to the disk before it replaces the old one, so that a
        crash of the machine can't leave an empty file.

    Raises:
      OSError: it can't be written; an old file at `path` is still there.
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
    """Log a failure to write a file that the program does not need, instead of raising it."""
    try:
        yield
    except OSError as error:
        log.warning("%s can't be written (%s)", path, error.strerror or error)
