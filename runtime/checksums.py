"""Checksums of arrays, to notice what has changed on a disk.

They are CRC-32C, at the speed of memory where SHA-256 would take longer than reading a checkpoint.
Orbax stores none of its data (zarr's first two formats have none, and of the third Orbax has it for
indices alone).
"""

from typing import Any

import google_crc32c
import jax
import numpy as np


def checksum(array: Any) -> str:
    """The CRC-32C of an array's bytes, 8 hex digits; every changed bit changes it."""
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return f"{google_crc32c.value(data):08x}"


def checksums(tree: Any) -> dict[str, str]:
    """The checksum of each array of a tree, by its path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): checksum(leaf) for path, leaf in leaves}


def compare(saved: dict[str, Any], tree: Any) -> None:
    """Raise a ValueError if an array of `tree` is not the one whose checksum was saved."""
    for name, own in checksums(tree).items():
        if saved.get(name, own) != own:
            raise ValueError(f"{name} is damaged: its checksum is another")
