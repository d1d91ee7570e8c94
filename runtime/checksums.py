"""Checksums of arrays, to notice what has changed on a disk, at the speed of memory.

SHA-256 alone would take longer than reading a checkpoint does, and Orbax stores no checksum of its
data (zarr's first two formats have none, and of the third Orbax has it for indices alone).
"""

import hashlib
from typing import Any

import jax
import numpy as np

_BLOCK = 512  # words of 64 bits, a page of memory
_PART = 2**23  # words whose sums are taken at a time


def checksum(array: Any) -> str:
    """16 hex digits: a hash of an array's type, its shape, and the sums of blocks of its bytes.

    Every changed bit changes a sum, and blocks that change places change the hash.
    """
    array = np.asarray(array)
    digest = hashlib.sha256(f"{array.dtype.str} {array.shape}".encode())
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    whole = data.size - data.size % (8 * _BLOCK)
    words = data[:whole].view(np.uint64)
    for start in range(0, len(words), _PART):
        digest.update(words[start : start + _PART].reshape(-1, _BLOCK).sum(axis=1).data)
    digest.update(data[whole:].data)
    return digest.hexdigest()[:16]


def checksums(tree: Any) -> dict[str, str]:
    """The checksum of each array of a tree, by its path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): checksum(leaf) for path, leaf in leaves}


def compare(saved: dict[str, Any], tree: Any) -> None:
    """Raise a ValueError if an array of `tree` is not the one whose checksum was saved."""
    for name, own in checksums(tree).items():
        if saved.get(name, own) != own:
            raise ValueError(f"{name} is damaged: its checksum is another")
