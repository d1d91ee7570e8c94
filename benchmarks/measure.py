"""What the benchmarks that measure speed have in common: a clock, a scale and a table."""

import importlib.util
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def seconds_a_call(call: Callable[[], Any], at_least: float = 3.0) -> float:
    """The median over five rounds of calls, each of which is waited for at its end.

    A call that alone takes `at_least` seconds is timed once.
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
    """TFLOP/s of a large square matrix product, what `share` is of; it is printed."""
    size = 8192 if jax.default_backend() != "cpu" else 2048
    a, b = jax.random.normal(jax.random.key(0), (2, size, size), dtype)
    product = jax.jit(lambda a, b: jnp.matmul(a, b, precision=precision))
    rate = 2 * size**3 / seconds_a_call(lambda: product(a, b)) / 1e12
    print(f"JAX {jax.__version__}, {jax.devices()}")
    print(f"a large matrix product in {dtype}: {rate:.3g} TFLOP/s\n")
    return rate


def count_flops(jaxpr: Any) -> float:
    """Operations of the convolutions and matrix products of a jaxpr, an addition being one."""
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
    """`count_flops` of fn(*args), arrays or their shapes, in 10⁹; nothing is computed."""
    return count_flops(jax.make_jaxpr(fn)(*args).jaxpr) / 1e9


def peak_gib() -> float | None:
    """The most memory that was in use on the device, in GiB; None where it is not known."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats["peak_bytes_in_use"] / 2**30 if "peak_bytes_in_use" in stats else None


def need(*packages: str) -> None:
    """Stop with a line that says so if a peer's packages are not installed."""
    missing = [name for name in packages if not importlib.util.find_spec(name)]
    if missing:
        raise SystemExit(f"--peer needs what is not installed: pip install {' '.join(missing)}")


def peer_rows(job: dict[str, Any]) -> list[dict[str, Any]]:
    """What benchmarks/peer.py measures of PyTorch, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.peer", json.dumps(job)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.strip().splitlines()[-1])


def _shown(cell: Any) -> str:
    if cell is None:
        return ""
    return f"{cell:,.4g}" if isinstance(cell, float) else str(cell)


class Table:
    """Rows that are printed as they are found, and all together at the end."""

    def __init__(self, *columns: str) -> None:
        """Of columns with these names; the first one's can be empty."""
        self._columns, self._rows = columns, list[tuple[str, ...]]()

    def add(self, *cells: Any) -> None:
        """A row; a float is shown with four digits, and None as nothing."""
        row = tuple(_shown(cell) for cell in cells)
        self._rows.append(row)
        print(" | ".join(f"{n} {c}".strip() for n, c in zip(self._columns, row, strict=True)))

    def show(self) -> None:
        """Print it, as Markdown."""
        print("\n| " + " | ".join(self._columns) + " |\n" + "|---" * len(self._columns) + "|")
        for row in self._rows:
            print("| " + " | ".join(row) + " |")
