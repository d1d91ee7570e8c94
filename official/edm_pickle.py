"""Reading EDM's network pickles without PyTorch and without running code from the file.

Such a file is a pickle of modules. A module has the source text of its class, which is left aside,
and its state, with its arguments and its tensors; a tensor's values are a file of `torch.save`
within the pickle. Names and states become stand-ins, and a file that has anything else is refused.
"""

import io
import os
import pathlib
import pickle
from typing import Any, NamedTuple

import numpy as np

from configs.errors import UserError
from official.pth_reader import Storage, read_storage, rebuild_tensor
from runtime.unpickling import Called, InertUnpickler, Named

# EDM's DDPM++ for CIFAR-10 has 223 MB, in tensors of at most 5 MB. A file takes twice its size in
# memory, and a tensor three times.
_MOST_BYTES, _MOST_OF_TENSOR, _MOST_MODULES = 2**28, 2**25, 10_000

_PERSISTENT = ("torch_utils.persistence", "_reconstruct_persistent_obj")
_BYTES = ("torch.storage", "_load_from_bytes")
_TENSOR, _PARAMETER = (("torch._utils", f"_rebuild_{n}") for n in ("tensor_v2", "parameter"))
_DICTS = (("collections", "OrderedDict"), ("dnnlib.util", "EasyDict"))
_MODULES = ("torch.nn.modules.container", "ModuleDict")
# The numbers of NumPy that a state has are not needed.
_NUMBERS = tuple(
    (module, name)
    for module in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray")
    for name in ("dtype", "scalar")
)
_NAMES = {_PERSISTENT, _BYTES, _TENSOR, _PARAMETER, *_DICTS, _MODULES, *_NUMBERS}


class Network(NamedTuple):
    """A network in its preconditioning.

    Attributes:
      kind: the class of the preconditioning.
      state: the attributes of the preconditioning.
      body: the class of the network itself.
      arguments: the named arguments of the network itself.
      tensors: its parameters and buffers, by their path in it, in the order of the forward pass.
    """

    kind: str
    state: dict[Any, Any]
    body: str
    arguments: dict[Any, Any]
    tensors: dict[str, np.ndarray]


class _Module(NamedTuple):
    kind: str  # the name of its class
    state: dict[Any, Any]

    def part(self, name: str) -> dict[Any, Any]:
        """An attribute that is a dictionary; empty if there is none."""
        part = self.state.get(name)
        return part if type(part) is dict else {}

    def modules(self) -> dict[str, "_Module"]:
        """The modules in it."""
        found = {name: _as_module(one) for name, one in self.part("_modules").items()}
        return {name: one for name, one in found.items() if one}


def _as_module(value: Any) -> _Module | None:
    if type(value) is Called and value.function == _MODULES:
        state = value.state[0] if value.state else None
        return _Module("ModuleDict", state) if type(state) is dict else None
    return value if type(value) is _Module else None


def _tensors(module: _Module) -> dict[str, np.ndarray]:
    """All tensors of a module and of the modules in it, by their path."""
    tensors: dict[str, np.ndarray] = {}
    waiting: list[tuple[tuple[str, ...], _Module]] = [((), module)]
    for _ in range(_MOST_MODULES):
        if not waiting:
            return tensors
        path, module = waiting.pop()
        inner = module.modules()
        own = {**module.part("_parameters"), **module.part("_buffers")}
        names = [*inner, *own]
        if len(path) > 8 or any(type(name) is not str or len(name) > 100 for name in names):
            break
        for name, value in own.items():
            if type(value) is np.ndarray:
                tensors[".".join((*path, name))] = value
        waiting += [((*path, name), one) for name, one in reversed(inner.items())]
    raise pickle.UnpicklingError("its modules are not those of a network")


class _Memo(dict[int, Any]):
    """What a pickle can refer to again: not bytes, which would take as much memory again."""

    def __setitem__(self, key: int, value: Any) -> None:
        super().__setitem__(key, None if type(value) is bytes else value)


class _Unpickler(InertUnpickler):
    """An unpickler of modules that refuses all names but `_NAMES`."""

    def __init__(self, raw: bytes) -> None:
        super().__init__(io.BytesIO(raw))
        self.memo = _Memo()
        self._left = len(raw)  # the tensors are part of the file

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _NAMES:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no network of EDM needs")
        return Named(module, name)

    def call(self, function: Any, arguments: Any) -> Any:
        if type(function) is not Named or type(arguments) is not tuple:
            raise pickle.UnpicklingError("it calls what no network of EDM needs")
        if function in _DICTS and not arguments:
            return {}
        if function == _TENSOR:
            return rebuild_tensor(*arguments)
        if function == _PARAMETER and arguments and type(arguments[0]) is np.ndarray:
            return arguments[0]
        if function == _BYTES:
            return self._storage(*arguments)
        if function == _PERSISTENT:
            return self._module(*arguments)
        if function == _MODULES or function in _NUMBERS:
            return Called(function, arguments, [])
        raise pickle.UnpicklingError("it calls what no network of EDM needs")

    def _storage(self, raw: Any) -> Storage:
        if type(raw) is not bytes or len(raw) > _MOST_OF_TENSOR:
            raise pickle.UnpicklingError(f"a tensor has more than {_MOST_OF_TENSOR >> 20} MiB")
        storage = read_storage(raw)
        self._left -= storage.values.nbytes
        if self._left < 0:
            raise pickle.UnpicklingError("its tensors are longer than the file")
        return storage

    def _module(self, about: Any) -> _Module:
        given = about if type(about) is dict else {}
        kind, state = given.get("class_name"), given.get("state")
        if type(kind) is not str or type(state) is not dict:
            raise pickle.UnpicklingError("a module has no class and state")
        return _Module(kind, state)


def _network(tree: Any) -> Network:
    whole = tree.get("ema") if type(tree) is dict else None
    body = whole.modules().get("model") if type(whole) is _Module else None
    if whole is None or body is None:
        raise pickle.UnpicklingError("it has no network under 'ema'")
    return Network(whole.kind, whole.state, body.kind, body.part("_init_kwargs"), _tensors(body))


def read(path: str | pathlib.Path) -> Network:
    """Read the network in a file of EDM, with the moving average of its weights.

    Raises:
      UserError: the file is missing, damaged or too large, or is no such file.
    """
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size > _MOST_BYTES:
                raise pickle.UnpicklingError(
                    f"it has more than {_MOST_BYTES >> 20} MiB, as only EDM's ADM networks have, "
                    "which can't be imported"
                )
            raw = file.read(_MOST_BYTES)
        return _network(_Unpickler(raw).load())
    except Exception as error:  # a damaged pickle can raise any kind of error
        reason = str(error) or type(error).__name__
        raise UserError(f"{path} can't be read as a network of EDM: {reason}") from error
