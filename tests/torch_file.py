"""Writes what torch.save would, without PyTorch: checkpoints for tests of the importer."""

import io
import pickle
import sys
import types
import zipfile
from collections import OrderedDict

import numpy as np


class _Storage:
    def __init__(self, array):
        self.array = array


def _rebuild(storage, offset, size, stride, requires_grad, hooks):
    raise AssertionError("only its name is written")


def _stand_in(module, name, value):
    value.__module__, value.__qualname__, value.__name__ = module, name, name
    return value


_rebuild = _stand_in("torch._utils", "_rebuild_tensor_v2", _rebuild)
_FLOATS = _stand_in("torch", "FloatStorage", type("FloatStorage", (), {}))


class _Pickler(pickle.Pickler):
    def __init__(self, file, storages, row=False):
        super().__init__(file, protocol=2)
        self.storages, self.row = storages, row

    def persistent_id(self, obj):
        if isinstance(obj, _Storage):
            key = str(len(self.storages))
            self.storages[key] = obj.array
            reference = ("storage", _FLOATS, key, "cpu", obj.array.size)
            return (*reference, None) if self.row else reference
        return None

    def reducer_override(self, obj):
        if isinstance(obj, np.ndarray):
            array = np.ascontiguousarray(obj, np.float32)
            stride = tuple(s // 4 for s in array.strides)
            return _rebuild, (_Storage(array), 0, array.shape, stride, False, OrderedDict())
        return NotImplemented


def _dump(tree, row):
    """(pickle, storages by their key)."""
    modules = {"torch": types.ModuleType("torch"), "torch._utils": types.ModuleType("torch._utils")}
    modules["torch"].FloatStorage = _FLOATS
    modules["torch._utils"]._rebuild_tensor_v2 = _rebuild
    payload, storages = io.BytesIO(), {}
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        _Pickler(payload, storages, row).dump(tree)
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
    return payload.getvalue(), storages


def save(tree, path):
    """Write dicts, lists, numbers and arrays (as float tensors) to `path`."""
    payload, storages = _dump(tree, row=False)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", payload)
        for key, array in storages.items():
            archive.writestr(f"archive/data/{key}", array.tobytes())


def save_row(tree, path):
    """The same in the layout before PyTorch 1.6."""
    payload, storages = _dump(tree, row=True)
    machine = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"int": 4}}
    head = [pickle.dumps(x, protocol=2) for x in (0x1950A86A20F9469CFC6C, 1001, machine)]
    keys = pickle.dumps(sorted(storages), protocol=2)
    with open(path, "wb") as file:
        file.write(b"".join([*head, payload, keys]))
        for key in sorted(storages):
            file.write(storages[key].size.to_bytes(8, "little") + storages[key].tobytes())
