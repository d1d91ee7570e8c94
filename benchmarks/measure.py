"""Common parts of the speed benchmarks: timing, counts of operations, and tables."""

import fcntl
import functools
import importlib.util
import json
import math
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

import jax
import jax.numpy as jnp
import numpy as np

# "DIR NAMES": the processes of benchmarks/gpu.sh, this one's name first. They compile side by side.
_TURNS = "BENCHMARK_TURNS"


@functools.cache
def take_turn() -> TextIO | None:
    """Wait until all processes of benchmarks/gpu.sh have compiled, and then for the others' timing.

    Returns:
      A lock that is held to the end of the process; None outside gpu.sh, where nothing waits.
    """
    if _TURNS not in os.environ:
        return None
    folder, *names = os.environ.pop(_TURNS).split()
    for name in names[:1]:
        (pathlib.Path(folder) / name).touch()
    while not all((pathlib.Path(folder) / name).exists() for name in names):
        time.sleep(0.1)
    lock = (pathlib.Path(folder) / "lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


def seconds_a_call(call: Callable[[], Any], at_least: float = 3.0) -> float:
    """The median duration of a call over five rounds of calls, with the device's work.

    The rounds take `at_least` seconds in all. A call that takes longer than that is timed once.
    """

    def measure(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            result = call()
        jax.block_until_ready(result)
        return (time.perf_counter() - start) / count

    measure(1)
    once = measure(1)
    if once > at_least:
        return once
    count = max(1, round(at_least / 5 / once))
    return float(np.median([measure(count) for _ in range(5)]))


def product_rate(dtype: str, precision: Any = None) -> float:
    """Measure and print the TFLOP/s of a large square matrix product, the reference of `share`."""
    take_turn()
    size = 8192 if jax.default_backend() != "cpu" else 2048
    a, b = jax.random.normal(jax.random.key(0), (2, size, size), dtype)
    product = jax.jit(lambda a, b: jnp.matmul(a, b, precision=precision))
    rate = 2 * size**3 / seconds_a_call(lambda: product(a, b)) / 1e12
    print(f"JAX {jax.__version__}, {jax.devices()[0].device_kind}")
    print(f"a large matrix product in {dtype}: {rate:.3g} TFLOP/s\n")
    return rate


def count_flops(jaxpr: Any) -> float:
    """Operations of the convolutions and matrix products in a jaxpr; a multiply-add counts as 2."""
    total = 0.0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "conv_general_dilated":
            kernel, out = eqn.invars[1].aval.shape, eqn.outvars[0].aval.shape
            total += 2.0 * math.prod(out) * math.prod(kernel[:-1])  # HWIO
        elif eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            terms = math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
            total += 2.0 * math.prod(eqn.outvars[0].aval.shape) * terms
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            total += count_flops(inner) if hasattr(inner, "eqns") else 0
    return total


def gflop_a_call(fn: Callable[..., Any], *args: Any) -> float:
    """`count_flops` of fn(*args) in 10⁹, from arrays or their shapes; fn is only traced."""
    return count_flops(jax.make_jaxpr(fn)(*args).jaxpr) / 1e9


def peak_gib() -> float | None:
    """The peak memory use of the device so far, in GiB; None if it is not known."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats["peak_bytes_in_use"] / 2**30 if "peak_bytes_in_use" in stats else None


def need(*packages: str) -> None:
    """Exit with a message if packages that --peer needs are not installed."""
    missing = [name for name in packages if not importlib.util.find_spec(name)]
    if missing:
        raise SystemExit(f"--peer needs what is not installed: pip install {' '.join(missing)}")


def peer_rows(job: dict[str, Any]) -> list[dict[str, Any]]:
    """Run benchmarks/peer.py, which measures PyTorch, in another process; returns its rows."""
    command = [sys.executable, "-m", "benchmarks.peer", json.dumps(job)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.strip().splitlines()[-1])


def _shown(cell: Any) -> str:
    if cell is None:
        return ""
    if isinstance(cell, float):
        return f"{cell:,.0f}" if abs(cell) >= 1000 else f"{cell:.4g}"
    return str(cell)


class Table:
    """A table that prints each row when it is added, and all rows at the end."""

    def __init__(self, *columns: str) -> None:
        """Start a table with these columns; the first name can be empty."""
        self._columns, self._rows = columns, list[tuple[str, ...]]()

    def add(self, *cells: Any) -> None:
        """Add a row; a float is shown with four digits, and None as an empty cell."""
        row = tuple(_shown(cell) for cell in cells)
        self._rows.append(row)
        print(" | ".join(f"{n} {c}".strip() for n, c in zip(self._columns, row, strict=True)))

    def show(self) -> None:
        """Print the table as Markdown."""
        print("\n| " + " | ".join(self._columns) + " |\n" + "|---" * len(self._columns) + "|")
        for row in self._rows:
            print("| " + " | ".join(row) + " |")
