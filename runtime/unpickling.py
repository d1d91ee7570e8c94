"""Reads pickles without calling, importing or changing anything that they name."""

import io
import pickle
import pickletools
from collections.abc import Callable
from typing import Any, NamedTuple

# What pickles of arrays and tensors in plain containers have. An opcode takes at most 150 bytes of
# memory more than its part of the file, and none refers to Python's own classes, or fills sets,
# whose hashes could overflow.
_OPCODES = """
    PROTO FRAME STOP MARK GLOBAL STACK_GLOBAL REDUCE NEWOBJ BUILD BINPERSID NONE NEWTRUE NEWFALSE
    BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE BINSTRING SHORT_BINSTRING
    BINBYTES SHORT_BINBYTES EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS
    EMPTY_DICT SETITEM SETITEMS EMPTY_SET BINPUT LONG_BINPUT BINGET LONG_BINGET MEMOIZE
"""
_MOST_OPCODES = 2**20  # the largest networks' checkpoints have a third of it


class _Dispatch(dict[int, Callable[[Any], None]]):
    left = _MOST_OPCODES

    def __getitem__(self, code: int) -> Callable[[Any], None]:
        self.left -= 1
        if self.left < 0:
            raise pickle.UnpicklingError(f"it has more than {_MOST_OPCODES:,} pickle opcodes")
        return super().__getitem__(code)

    def __missing__(self, code: int) -> Callable[[Any], None]:
        name = next((op.name for op in pickletools.opcodes if ord(op.code) == code), hex(code))
        raise pickle.UnpicklingError(f"it has the pickle opcode {name}, which is not read")


# Named tuples, because no opcode of a pickle can change them.
class Named(NamedTuple):
    """A function or class that a pickle names."""

    module: str
    name: str


class Called(NamedTuple):
    """Stands for the result of a call that is not made; `state` is what would be set on it."""

    function: Any
    arguments: Any
    state: list[Any]


class InertUnpickler(pickle._Unpickler):  # type: ignore[name-defined]
    """An unpickler of plain containers, with `Named` and `Called` in place of everything else.

    It derives from pickle's Python implementation, from which single opcodes can be removed.
    """

    stack: list[Any]  # an attribute of the base class, like pop_mark
    pop_mark: Callable[[], list[Any]]
    dispatch = _Dispatch(
        (ord(op.code), pickle._Unpickler.dispatch[ord(op.code)])  # type: ignore[attr-defined]
        for op in pickletools.opcodes
        if op.name in _OPCODES.split()
    )

    def __init__(self, file: io.BytesIO) -> None:
        """Read from a file in memory; strings of Python 2 become bytes."""
        super().__init__(file, encoding="bytes")
        self.dispatch = _Dispatch(self.dispatch)  # type: ignore[misc]  # it counts

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for a function or class."""
        return Named(module, name)

    def call(self, function: Any, arguments: Any) -> Any:
        """The stand-in for a call's result."""
        return Called(function, arguments, [])

    def build(self, made: Any, state: Any) -> None:
        """Keep the state that would have been set on an object."""
        if type(made) is not Called:
            raise pickle.UnpicklingError("it sets attributes of what has none")
        made.state.append(state)

    def _load_reduce(self) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = self.call(self.stack[-1], arguments)

    def _load_build(self) -> None:
        state = self.stack.pop()
        self.build(self.stack[-1], state)

    def _load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set(self.stack[-1], [key, value])

    def _load_setitems(self) -> None:
        items = self.pop_mark()
        self._set(self.stack[-1], items)

    def _set(self, target: Any, items: list[Any]) -> None:
        if not isinstance(target, dict):
            raise pickle.UnpicklingError("it sets an item of what is no dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Hashing deeply nested tuples could overflow the stack.
            if type(key) not in (str, int, bytes):
                raise pickle.UnpicklingError("it has a key that is neither a name nor a number")
            target[key] = value

    dispatch.update(
        {
            pickle.BUILD[0]: _load_build,
            pickle.REDUCE[0]: _load_reduce,
            pickle.NEWOBJ[0]: _load_reduce,
            pickle.SETITEM[0]: _load_setitem,
            pickle.SETITEMS[0]: _load_setitems,
        }
    )
