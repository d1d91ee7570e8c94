"""Estimates how much device memory a computation needs, before it is compiled."""

import dataclasses
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

log = logging.getLogger("soft_truncation")

# The share of a GPU's memory that JAX takes, and the variable's old name; both must not be set.
_FRACTION, _OLD_FRACTION = "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"
_MARGIN = 0.95  # the share of the memory that estimates may fill


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Operations that XLA computes within those that use their results.
_VIEWS = _names(
    "broadcast_in_dim convert_element_type copy expand_dims name reshape squeeze stop_gradient"
)
_ELEMENTWISE = _names(
    "abs add add_any and clamp cos div eq erf exp expm1 ge gt integer_pow iota is_finite le "
    "linear_call log log1p logistic lt max min mul ne neg not or pad pow rem rsqrt select_n "
    "shift_left shift_right_logical sign sin sqrt square sub tanh transpose xor"
)
_REDUCTIONS = _names(
    "argmax argmin reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum"
)
# Operations that only call a jaxpr with their own arguments.
_CALLS = _names("checkpoint closed_call core_call custom_jvp_call custom_vjp_call jit pjit")


def _bytes(x: Any) -> int:
    """Bytes of a variable of a jaxpr."""
    if not hasattr(x.aval, "shape"):
        return 0
    if jax.dtypes.issubdtype(x.aval.dtype, jax.dtypes.prng_key):
        return 8 * math.prod(x.aval.shape)
    return math.prod(x.aval.shape) * jnp.dtype(x.aval.dtype).itemsize


def _is_literal(x: Any) -> bool:
    return hasattr(x, "val")


def _inner(equation: Any) -> list[Any]:
    """The jaxprs in an equation."""
    values = [v if isinstance(v, (list, tuple)) else [v] for v in equation.params.values()]
    jaxprs = [getattr(value, "jaxpr", value) for row in values for value in row]
    return [jaxpr for jaxpr in jaxprs if hasattr(jaxpr, "eqns")]


@dataclasses.dataclass
class _Operation:
    """One operation of a computation without calls; values are known by numbers."""

    name: str
    inputs: list[int]
    outputs: list[int]
    within: int  # bytes that it needs while it runs, besides inputs and outputs


class _Program:
    """A jaxpr as a list of operations, with calls expanded in their place."""

    def __init__(self, jaxpr: Any) -> None:
        self.sizes: list[int] = []
        self.operations: list[_Operation] = []
        names: dict[Any, int] = {}
        self.inputs = [self._new(x, names) for x in jaxpr.invars]
        for x in jaxpr.constvars:
            self._new(x, names)
        self._expand(jaxpr, names)
        self.outputs = [names[x] for x in jaxpr.outvars if not _is_literal(x)]

    def _new(self, x: Any, names: dict[Any, int]) -> int:
        names[x] = len(self.sizes)
        self.sizes.append(_bytes(x))
        return names[x]

    def _expand(self, jaxpr: Any, names: dict[Any, int]) -> None:
        for equation in jaxpr.eqns:
            inner = _inner(equation)
            if equation.primitive.name in _CALLS and len(inner) == 1:
                (called,) = inner
                within: dict[Any, int] = {}
                for x, given in zip(called.invars, equation.invars, strict=True):
                    within[x] = self._new(x, {}) if _is_literal(given) else names[given]
                for x in called.constvars:
                    self._new(x, within)
                self._expand(called, within)
                for x, result in zip(equation.outvars, called.outvars, strict=True):
                    names[x] = self._new(x, {}) if _is_literal(result) else within[result]
                continue
            # A kernel's own values are in the processors' memory.
            kernel = equation.primitive.name == "pallas_call"
            needed = [] if kernel else [_Program(jaxpr).peak() for jaxpr in inner]
            inputs = [names[x] for x in equation.invars if not _is_literal(x)]
            outputs = [self._new(x, names) for x in equation.outvars]
            self.operations.append(
                _Operation(equation.primitive.name, inputs, outputs, max(needed, default=0))
            )

    def peak(self, donated: Sequence[int] = ()) -> int:
        """The largest number of bytes alive at a time, without inputs that are not `donated`."""
        number_of_uses = [0] * len(self.sizes)
        in_memory = [False] * len(self.sizes)  # used by an operation that reads memory
        for operation in self.operations:
            fused = operation.name in _VIEWS | _ELEMENTWISE | _REDUCTIONS
            for x in operation.inputs:
                number_of_uses[x] += 1
                in_memory[x] |= not fused
        for x in (*self.outputs, *self.inputs):
            in_memory[x] = True

        # Without memory of its own: computed again wherever it is used.
        def is_virtual(operation: _Operation) -> bool:
            if len(operation.outputs) != 1 or in_memory[operation.outputs[0]]:
                return False
            if operation.name in _VIEWS:
                return True
            return operation.name in _ELEMENTWISE and number_of_uses[operation.outputs[0]] == 1

        virtual = [is_virtual(operation) for operation in self.operations]
        end = len(self.operations)
        last = [-1] * len(self.sizes)
        for x in self.outputs:
            last[x] = end
        for number in range(end - 1, -1, -1):
            operation = self.operations[number]
            needed_at = last[operation.outputs[0]] if virtual[number] else number
            for x in operation.inputs:
                last[x] = max(last[x], needed_at)
        dying: list[list[int]] = [[] for _ in range(end + 1)]
        ours = set(donated) | {
            x
            for operation, absent in zip(self.operations, virtual, strict=True)
            for x in operation.outputs
            if not absent
        }
        for x in ours:
            if last[x] >= 0:
                dying[last[x]].append(x)
        alive = sum(self.sizes[x] for x in set(donated) if last[x] >= 0)
        peak = alive
        for number, (operation, absent) in enumerate(zip(self.operations, virtual, strict=True)):
            made = 0 if absent else sum(self.sizes[x] for x in operation.outputs if last[x] >= 0)
            freed = sum(self.sizes[x] for x in dying[number])
            during = max(made, operation.within)
            if operation.name in _ELEMENTWISE:  # the result takes an argument's place
                during = max(0, made - freed)
            peak = max(peak, alive + during)
            alive += made - freed
        return peak


def needed_bytes(fn: Callable[..., Any], *args: Any, donate: int = 0, devices: int = 1) -> int:
    """Estimate the memory, in bytes, of fn(*args) with its arguments, by tracing it only.

    The estimate follows the order of the jaxpr, adds up the arrays that are still needed, and
    leaves out those that XLA computes within other operations. XLA can find a better order, and its
    libraries may need work space. `python -m benchmarks.memory` measures how good the estimate is.

    Args:
      fn: a function of arrays, which may sum over the axis "batch" of `devices` devices.
      args: the arrays of one device, or their shapes.
      donate: the number of first arguments whose memory the function may reuse.
      devices: the number of devices.
    """
    jaxpr = jax.make_jaxpr(fn, axis_env=[("batch", devices)])(*args)
    program = _Program(getattr(jaxpr, "jaxpr", jaxpr))
    donated = program.inputs[: len(jax.tree.leaves(args[:donate]))]
    kept = sum(program.sizes[x] for x in program.inputs[len(donated) :])
    return kept + program.peak(donated)


def limit_bytes() -> int | None:
    """The memory, in bytes, that JAX may use on a device; None if unknown, as on CPUs."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit")


def advise(
    what: str, needed: Callable[[Mapping[str, Any]], int], remedies: Sequence[Mapping[str, Any]]
) -> None:
    """Log how much memory a computation needs, and what to set if a device has less.

    Args:
      what: the computation, as the subject of a sentence.
      needed: (changes of the config) → the bytes that a device then needs.
      remedies: changes of the config to suggest, the mildest first.
    """
    limit = limit_bytes()
    if limit is None:
        return
    whole = limit
    if jax.default_backend() == "gpu":
        fraction = os.environ.get(_FRACTION) or os.environ.get(_OLD_FRACTION) or 0.75
        whole = round(limit / float(fraction) * 0.95)
    need = needed({})
    text = f"{what} needs about {_gib(need)} GiB of a device's memory, of which JAX may use"
    if need <= _MARGIN * limit:
        log.info("%s %s", text, _gib(limit))
        return
    for fields in ({}, *remedies):
        then = needed(fields) if fields else need
        for available in sorted({limit, whole}):
            if then <= _MARGIN * available:
                settings = [f"--config.{name}={value}" for name, value in fields.items()]
                if available > limit:
                    settings.append(f"the environment variable {_FRACTION}=0.95")
                log.warning(
                    "%s %s: too little; set %s (about %s of %s GiB)",
                    text,
                    _gib(limit),
                    " and ".join(settings),
                    _gib(then),
                    _gib(available),
                )
                return
    log.warning("%s %s: too little, whatever is set; use more devices", text, _gib(limit))


def _gib(size: int) -> str:
    return f"{size / 2**30:.3g}"
