"""Common parts of the benchmarks: command lines, timing, counts of operations, and tables."""

import argparse
import fcntl
import functools
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
from absl import logging
from ml_collections import ConfigDict

import build
from configs import saved
from runtime import environment
from runtime.checkpointing import restore_latest

# "DIR NAMES": the processes of benchmarks/gpu.sh, this one's name first. They compile side by side.
_TURNS = "BENCHMARK_TURNS"


def get_parser(doc: str | None) -> argparse.ArgumentParser:
    """Set JAX up as main.py does; a parser that describes the module of this docstring."""
    environment.prepare()
    environment.keep_freed_memory()
    logging.set_verbosity(logging.ERROR)
    return argparse.ArgumentParser(description=(doc or "").split("\n")[0])


def add_network(parser: argparse.ArgumentParser, on_cpu: list[int], on_gpu: list[int]) -> None:
    """Add the options that `set_network` reads; the numbers are batch sizes."""
    is_cpu = jax.default_backend() == "cpu"
    parser.add_argument("--batch", type=int, nargs="+", default=on_cpu if is_cpu else on_gpu)
    parser.add_argument("--dtype", default="float32" if is_cpu else "bfloat16")
    for name in ("nf", "num_res_blocks"):
        parser.add_argument(f"--{name}", type=int, help=f"replaces model.{name}")


def set_network(config: ConfigDict, flags: argparse.Namespace) -> None:
    """Change a config's network as the command line asks, but for its dtype."""
    sizes = {"nf": flags.nf, "num_res_blocks": flags.num_res_blocks}
    config.model.update({name: size for name, size in sizes.items() if size})


def load_run(workdir: pathlib.Path) -> tuple[ConfigDict, Any, Any]:
    """A trained run's config, what `build.set_up` makes of it, and its EMA parameters."""
    config = saved.get_config(workdir)
    setup = build.set_up(config)
    return config, setup, restore_latest(config, workdir, setup.state_shape).ema_params


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


def timed(
    call: Callable[[], Any], count: int = 1, wait: Callable[[Any], Any] = jax.block_until_ready
) -> float:
    """The mean duration of so many calls in a row; `wait` waits for the result of the last."""
    start = time.perf_counter()
    for _ in range(count):
        result = call()
    wait(result)
    return (time.perf_counter() - start) / count


def seconds_a_call(
    call: Callable[[], Any],
    at_least: float = 3.0,
    wait: Callable[[Any], Any] = jax.block_until_ready,
) -> float:
    """The median duration of a call over five rounds of calls, with the device's work.

    The rounds take `at_least` seconds in all. A call that takes longer than that is timed once.
    """
    timed(call, wait=wait)
    once = timed(call, wait=wait)
    if once > at_least:
        return once
    count = max(1, round(at_least / 5 / once))
    return float(np.median([timed(call, count, wait) for _ in range(5)]))


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


def rows_of(module: str, *args: str, **options: Any) -> list[dict[str, Any]]:
    """Run a module in a process of its own; the rows that it prints as JSON in its last line."""
    command = [sys.executable, "-m", module, *args]
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, **options)
    rows: list[dict[str, Any]] = json.loads(run.stdout.strip().splitlines()[-1])
    return rows


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
        named = (f"{name} {cell}".strip() for name, cell in zip(self._columns, row, strict=True))
        print(" | ".join(named), flush=True)

    def show(self) -> None:
        """Print the table as Markdown."""
        print("\n| " + " | ".join(self._columns) + " |\n" + "|---" * len(self._columns) + "|")
        for row in self._rows:
            print("| " + " | ".join(row) + " |")
