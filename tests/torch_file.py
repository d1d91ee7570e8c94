"""Writes what torch.save wrote before PyTorch 1.6, without PyTorch, for tests of the reader."""

import io
import pickle
import sys
import types
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
    def __init__(self, file, storages):
        super().__init__(file, protocol=2)
        self.storages = storages

    def persistent_id(self, obj):
        if isinstance(obj, _Storage):
            key = str(len(self.storages))
            self.storages[key] = obj.array
            return ("storage", _FLOATS, key, "cpu", obj.array.size, None)
        return None

    def reducer_override(self, obj):
        if isinstance(obj, np.ndarray):
            array = np.ascontiguousarray(obj, np.float32)
            stride = tuple(s // 4 for s in array.strides)
            return _rebuild, (_Storage(array), 0, array.shape, stride, False, OrderedDict())
        return NotImplemented


def _dump(tree):
    """(pickle, storages by their key)."""
    modules = {"torch": types.ModuleType("torch"), "torch._utils": types.ModuleType("torch._utils")}
    modules["torch"].FloatStorage = _FLOATS
    modules["torch._utils"]._rebuild_tensor_v2 = _rebuild
    payload, storages = io.BytesIO(), {}
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        _Pickler(payload, storages).dump(tree)
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
    return payload.getvalue(), storages


def save_row(tree, path):
    """Write dicts, lists, numbers and arrays (as float tensors) to `path`."""
    payload, storages = _dump(tree)
    machine = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"int": 4}}
    head = [pickle.dumps(x, protocol=2) for x in (0x1950A86A20F9469CFC6C, 1001, machine)]
    keys = pickle.dumps(sorted(storages), protocol=2)
    with open(path, "wb") as file:
        file.write(b"".join([*head, payload, keys]))
        for key in sorted(storages):
            file.write(storages[key].size.to_bytes(8, "little") + storages[key].tobytes())
