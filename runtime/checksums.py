"""Checksums of arrays, to notice what has changed on a disk.

They are CRC-32C, at the speed of memory where SHA-256 would take longer than reading a checkpoint.
Orbax stores none of its data (zarr's first two formats have none, and of the third Orbax has it for
indices alone).
"""

import hashlib
from collections.abc import Callable
from typing import Any

import google_crc32c
import jax
import numpy as np


def checksum(array: Any) -> str:
    """The CRC-32C of an array's bytes, 8 hex digits; every changed bit changes it."""
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return f"{google_crc32c.value(data):08x}"


def earlier_checksum(array: Any) -> str:
    """The checksum of checkpoints and models from before CRC-32C, 16 hex digits.

    It is of the array's type and shape and of the sums of its pages, as words of 64 bits.
    """
    array = np.asarray(array)
    digest = hashlib.sha256(f"{array.dtype.str} {array.shape}".encode())
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    paged = data.size - data.size % 4096
    digest.update(data[:paged].view(np.uint64).reshape(-1, 512).sum(axis=1).data)
    digest.update(data[paged:].data)
    return digest.hexdigest()[:16]


def checksums(tree: Any, of_array: Callable[[Any], str] = checksum) -> dict[str, str]:
    """The checksum of each array of a tree, by its path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): of_array(leaf) for path, leaf in leaves}


def compare(saved: dict[str, Any], tree: Any) -> None:
    """Raise a ValueError if an array of `tree` is not the one whose checksum was saved."""
    of_array = earlier_checksum if any(len(x) == 16 for x in saved.values()) else checksum
    for name, own in checksums(tree, of_array).items():
        if saved.get(name, own) != own:
            raise ValueError(f"{name} is damaged: its checksum is another")
