"""Checksums of arrays, to notice files that have changed on a disk.

They are XXH3 of 128 bits, which is as fast as memory; SHA-256 would take longer than reading a
checkpoint. Orbax stores no checksums of its data: zarr's first two formats have none, and with the
third Orbax has them for indices only.
"""

import hashlib
from collections.abc import Callable
from typing import Any

import google_crc32c
import jax
import numpy as np
import xxhash


def _bytes(array: Any) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def checksum(array: Any) -> str:
    """The XXH3 of an array's bytes, 32 hex digits."""
    return xxhash.xxh3_128_hexdigest(_bytes(array).data)


def crc_32c(array: Any) -> str:
    """The CRC-32C of an array's bytes, 8 hex digits; files from before XXH3 have it."""
    return f"{google_crc32c.value(_bytes(array)):08x}"


def sums_of_pages(array: Any) -> str:
    """The checksum that files from before CRC-32C have, 16 hex digits.

    It covers the array's type and shape, and the sums of its pages as words of 64 bits.
    """
    array = np.asarray(array)
    digest, data = hashlib.sha256(f"{array.dtype.str} {array.shape}".encode()), _bytes(array)
    paged = data.size - data.size % 4096
    digest.update(data[:paged].view(np.uint64).reshape(-1, 512).sum(axis=1).data)
    digest.update(data[paged:].data)
    return digest.hexdigest()[:16]


KINDS = (checksum, crc_32c, sums_of_pages)  # the newest first
_BY_LENGTH = {32: checksum, 8: crc_32c, 16: sums_of_pages}


def is_of(saved: Any, array: Any) -> bool:
    """Whether a saved checksum, of any of these kinds, is that of an array."""
    kind = _BY_LENGTH.get(len(str(saved)))
    return kind is not None and kind(array) == saved


def checksums(tree: Any, of_array: Callable[[Any], str] = checksum) -> dict[str, str]:
    """The checksum of each array of a tree, by its path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): of_array(leaf) for path, leaf in leaves}


def compare(saved: dict[str, Any], tree: Any) -> None:
    """Raise a ValueError if an array of `tree` is not the one whose checksum was saved."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path)
        if name in saved and not is_of(saved[name], leaf):
            raise ValueError(f"{name} is damaged: its checksum is another")
