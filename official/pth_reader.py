"""Reading files of `torch.save` without PyTorch and without running code from the file.

Only tensors and plain containers are unpickled. Both formats are supported: the zip archive (since
PyTorch 1.6), and the older format, a sequence of pickles followed by the storages.
"""

import io
import math
import os
import pathlib
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from configs.errors import UserError
from runtime.unpickling import InertUnpickler

# Dtypes of the storage classes. A pickle can refer to these names, but not to the classes.
_DTYPES: dict[str, np.dtype] = {
    "FloatStorage": np.dtype(np.float32),
    "DoubleStorage": np.dtype(np.float64),
    "HalfStorage": np.dtype(np.float16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}


# Named tuples, because no opcode of a pickle can change them.
class _StorageKind(NamedTuple):
    dtype: np.dtype


class Storage(NamedTuple):
    """The values that tensors are views of."""

    values: np.ndarray


def rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> np.ndarray:
    """The tensor of a storage, from the arguments in a file, which are checked."""
    plain = type(size) is tuple and type(stride) is tuple and len(size) == len(stride)
    if not plain or type(storage) is not Storage:
        raise pickle.UnpicklingError("a tensor is not built as torch.save builds it")
    if any(type(n) is not int or n < 0 for n in (offset, *size, *stride)):
        raise pickle.UnpicklingError("a tensor has a size that is not a whole number")
    values = storage.values
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    if math.prod(size) > len(values) or (math.prod(size) and last >= len(values)):
        raise pickle.UnpicklingError("a tensor reaches beyond its storage")
    if not math.prod(size):
        return np.zeros(size, values.dtype)
    strides = [s * values.itemsize for s in stride]
    # A view, so that many tensors of one storage take no more memory than the storage.
    return np.lib.stride_tricks.as_strided(values[offset:], size, strides, writeable=False)


# (dtype, the storage's name in the file, number of values) → the storage
_FindStorage = Callable[[np.dtype, str, int], Storage]


class _Unpickler(InertUnpickler):
    """An unpickler for tensors and OrderedDict that refuses all other names."""

    def __init__(self, file: io.BytesIO, find_storage: _FindStorage) -> None:
        super().__init__(file)
        self._find_storage = find_storage

    def build(self, made: Any, state: Any) -> None:
        # Only an OrderedDict has attributes, with versions; they are dropped.
        if type(made) is not OrderedDict:
            raise pickle.UnpicklingError("it sets attributes, which no tensor has")

    def call(self, function: Any, arguments: Any) -> Any:
        if function is OrderedDict and arguments == ():
            return OrderedDict()
        if function is rebuild_tensor and type(arguments) is tuple:
            return rebuild_tensor(*arguments)
        raise pickle.UnpicklingError("it calls what no checkpoint needs")

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return rebuild_tensor
        if module == "torch" and name in _DTYPES:
            return _StorageKind(_DTYPES[name])
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")

    def persistent_load(self, pid: Any) -> Storage:
        # The older format has a sixth entry, a view of the storage, which is always None.
        plain = type(pid) is tuple and (len(pid) == 5 or (len(pid) == 6 and pid[5] is None))
        if not plain or pid[0] != "storage":
            raise pickle.UnpicklingError("it has a reference that is not a tensor's storage")
        _, kind, key, _, count = pid[:5]
        if type(kind) is not _StorageKind or type(key) is not str or type(count) is not int:
            raise pickle.UnpicklingError("it has a reference that is not a tensor's storage")
        return self._find_storage(kind.dtype, key, count)


def _read_archive(file: BinaryIO, size: int) -> Any:
    with zipfile.ZipFile(file) as archive:
        if any(item.compress_type != zipfile.ZIP_STORED for item in archive.infolist()):
            raise pickle.UnpicklingError("it is compressed, as torch.save's archives never are")
        pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise pickle.UnpicklingError("it is not an archive that torch.save wrote")
        root = pickles[0].removesuffix("/data.pkl")
        storages: dict[str, Storage] = {}

        def find_storage(dtype: np.dtype, key: str, _: int) -> Storage:
            if key not in storages:
                entry = archive.getinfo(f"{root}/data/{key}")
                if sum(s.values.nbytes for s in storages.values()) + entry.file_size > size:
                    raise pickle.UnpicklingError("its storages are longer than the file")
                storages[key] = Storage(np.frombuffer(archive.read(entry), dtype))
            return storages[key]

        return _Unpickler(io.BytesIO(archive.read(pickles[0])), find_storage).load()


_ZIP = b"PK\x03\x04"
_MAGIC, _VERSION = 0x1950A86A20F9469CFC6C, 1001


def _read_row(file: io.BytesIO, size: int) -> Any:
    """The format before PyTorch 1.6: magic number, version, machine, object, keys, storages."""
    storages: dict[str, tuple[np.ndarray, np.dtype]] = {}

    def refuse(*_: Any) -> Storage:
        raise pickle.UnpicklingError("it has a tensor where none belongs")

    def find_storage(dtype: np.dtype, key: str, count: int) -> Storage:
        # The values come later in the file; the tensor is a view of an array that is filled then.
        if key not in storages:
            claimed = sum(values.nbytes for values, _ in storages.values())
            if not 0 <= count * dtype.itemsize <= size - claimed:
                raise pickle.UnpicklingError("its storages are longer than the file")
            storages[key] = np.empty(count, dtype), dtype
        return Storage(storages[key][0])

    def read(find: Any) -> Any:
        return _Unpickler(file, find).load()

    if read(refuse) != _MAGIC or read(refuse) != _VERSION:
        raise pickle.UnpicklingError("it is not a file that torch.save wrote")
    machine = read(refuse)
    if type(machine) is not dict or machine.get("little_endian") is not True:
        raise pickle.UnpicklingError("it was written on a machine of another byte order")
    tree, keys = read(find_storage), read(refuse)
    if type(keys) is not list or set(keys) != storages.keys() or len(keys) != len(storages):
        raise pickle.UnpicklingError("its storages are not those of its tensors")
    for key in keys:
        values, dtype = storages[key]
        count = int.from_bytes(file.read(8), "little")
        raw = file.read(values.nbytes)
        if count != len(values) or len(raw) != values.nbytes:
            raise pickle.UnpicklingError(f"it ends within storage {key}")
        values[:] = np.frombuffer(raw, dtype)
    return tree


def read_storage(raw: bytes) -> Storage:
    """Read a storage that `torch.save` wrote by itself, as within other pickles.

    Raises:
      Exception: of any kind, if it is anything else.
    """
    if raw[:4] == _ZIP and raw.count(b"PK\x01\x02") > 100:  # an entry each, which takes memory
        raise pickle.UnpicklingError("a storage has too many parts")
    read = _read_archive if raw[:4] == _ZIP else _read_row
    found = read(io.BytesIO(raw), len(raw))
    if type(found) is not Storage:
        raise pickle.UnpicklingError("it has a file within it that is no storage")
    return found


def read_pth(path: str | pathlib.Path) -> Any:
    """Read the object in a file of `torch.save`, with NumPy arrays for tensors.

    Raises:
      UserError: the file is missing, damaged, or has more than tensors and plain containers.
    """
    try:
        with open(path, "rb") as file:
            if file.read(4) == _ZIP:
                return _read_archive(file, os.fstat(file.fileno()).st_size)
            file.seek(0)
            raw = file.read()
        return _read_row(io.BytesIO(raw), len(raw))
    except Exception as error:  # a damaged pickle can raise any kind of error
        reason = str(error) or type(error).__name__
        raise UserError(f"{path} can't be read as a checkpoint: {reason}") from error
