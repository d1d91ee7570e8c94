"""Writing files as `torch.save` does, without PyTorch: the zip archive since PyTorch 1.6.

A stored object is made of plain containers, numbers, names, and NumPy arrays in place of tensors.
"""

import io
import pathlib
import pickle
import zipfile
from collections import OrderedDict
from typing import Any, NamedTuple

import numpy as np

_STORAGES = {np.dtype(np.float32): "FloatStorage", np.dtype(np.float64): "DoubleStorage"}


class _Global(NamedTuple):
    """A name of PyTorch's, which the reader looks up."""

    module: str
    name: str

    def __call__(self) -> None:
        """A pickle can only apply what can be called."""


_REBUILD_TENSOR = _Global("torch._utils", "_rebuild_tensor_v2")


class _Storage(NamedTuple):
    values: np.ndarray
    key: str


class _Pickler(pickle._Pickler):  # type: ignore[name-defined]
    """A pickler of arrays as tensors; the values of each are a member of the archive."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=2)
        self.arrays: list[np.ndarray] = []

    def persistent_id(self, obj: Any) -> Any:
        if type(obj) is not _Storage:
            return None
        kind = _Global("torch", _STORAGES[obj.values.dtype])
        return ("storage", kind, obj.key, "cpu", obj.values.size)

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is _Global:
            return f"{obj.module}\n{obj.name}"
        if not isinstance(obj, np.ndarray):
            return NotImplemented
        values = np.ascontiguousarray(obj).reshape(obj.shape)  # it makes a 0-d array 1-d
        storage = _Storage(values, str(len(self.arrays)))
        self.arrays.append(values)
        strides = tuple(stride // values.itemsize for stride in values.strides)
        # The last two: no gradient is wanted of it, and it has no hooks.
        return _REBUILD_TENSOR, (storage, 0, values.shape, strides, False, OrderedDict())

    def save_global(self, obj: Any, name: str | None = None) -> None:
        if type(obj) is not _Global:
            super().save_global(obj, name)  # type: ignore[misc]
            return
        # The base class would import the module.
        self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())  # type: ignore[attr-defined]
        self.memoize(obj)  # type: ignore[attr-defined]


def write_pth(path: pathlib.Path, tree: Any) -> None:
    """Write `tree` to a file that `torch.load` reads, with its arrays as tensors on the CPU.

    Arrays are float32 or float64.

    Raises:
      OSError: the file can't be written.
    """
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(tree)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        # ZipInfo, not the name alone: it has no time of now, and equal trees make equal files.
        archive.writestr(zipfile.ZipInfo("archive/data.pkl"), file.getvalue())
        archive.writestr(zipfile.ZipInfo("archive/byteorder"), "little")
        for i, values in enumerate(pickler.arrays):
            little = values.astype(values.dtype.newbyteorder("<"), copy=False)
            archive.writestr(zipfile.ZipInfo(f"archive/data/{i}"), little.data)
        archive.writestr(zipfile.ZipInfo("archive/version"), "3\n")
