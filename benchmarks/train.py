"""How fast training and the network's forward pass are, and how much memory they take.

python -m benchmarks.train                                 # CIFAR-10's DDPM++, for a GPU
python -m benchmarks.train --peer                          # and PyTorch's, where it is installed
python -m benchmarks.train --peer --nf 32 --num_res_blocks 1 --batch 64 --dtype float32   # a CPU

Trains on noise with the objective of configs/vp/cifar10_st.py, by the same calls as `--mode train`.
A training step is counted as three forward passes; their share is of the rate of one large matrix
product, measured beside them. Memory is the process's peak on the device so far, so that batch
sizes should go up. `--profile` adds the kernels that take the most time.
"""

import argparse
import collections
import json
import math
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

import datasets
import environment
import losses
import run_lib
import session
from configs.vp import cifar10_st
from sources import ArraySource

COLUMNS = ("", "batch", "images/s", "ms", "TFLOP/s", "share", "peak GiB", "first call s")


def seconds_a_call(call: Callable[[], Any], at_least: float = 3.0) -> float:
    """The median over five rounds of calls, each of which is waited for at its end."""
    jax.block_until_ready(call())
    start = time.perf_counter()
    jax.block_until_ready(call())
    count = max(1, round(at_least / 5 / (time.perf_counter() - start)))
    rounds = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(count):
            result = call()
        jax.block_until_ready(result)
        rounds.append((time.perf_counter() - start) / count)
    return float(np.median(rounds))


def product_rate(dtype: str) -> float:
    """TFLOP/s of a large square matrix product."""
    size = 8192 if jax.default_backend() != "cpu" else 2048
    a, b = jax.random.normal(jax.random.key(0), (2, size, size), dtype)
    product = jax.jit(jnp.matmul)
    return 2 * size**3 / seconds_a_call(lambda: product(a, b)) / 1e12


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


def peak_gib() -> float | None:
    """The most memory that was in use on the device, in GiB; None where it is not known."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats["peak_bytes_in_use"] / 2**30 if "peak_bytes_in_use" in stats else None


def print_profile(run: Callable[[], Any], steps: int, rows: int) -> None:
    """The kernels that take the most time, numbers in their names left out, over one run."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
        profile = jax.profiler.ProfileData.from_file(str(path))
        times: dict[str, float] = collections.defaultdict(float)
        counts: dict[str, int] = collections.defaultdict(int)
        for plane in profile.planes:
            for line in plane.lines:
                if "GPU" in plane.name and line.name.startswith("Stream"):
                    for event in line.events:
                        name = re.sub(r"[._]?\d+(?=_|$)", "", event.name)[:90]
                        times[name] += event.duration_ns / 1e6 / steps
                        counts[name] += 1
    print(f"\nkernels, {sum(times.values()):.2f} ms a step in all")
    for name in sorted(times, key=lambda name: -times[name])[:rows]:
        print(f"{times[name]:8.3f} ms {counts[name] / steps:7.1f} times  {name}")


def ours(config: ConfigDict, profile: int) -> Iterator[dict[str, Any]]:
    """Rows for the training step and the forward pass of a config."""
    setup, data, batch = session.set_up(config), config.data, config.training.batch_size
    shape = (data.image_size, data.image_size, data.num_channels)
    images = np.random.default_rng(0).integers(0, 256, (10_000, *shape), dtype=np.uint8)
    noise = datasets.Dataset("noise", ArraySource(images, np.zeros(len(images))), 256, 0)
    packed = run_lib.replicate(
        losses.pack_state(session.init_state(config, setup.model, setup.optimizer)),
        jax.local_device_count(),
    )
    call, steps = run_lib.get_call(config, setup, noise, 0), run_lib.steps_a_call(config)
    name = config.model.dtype

    def train() -> Any:
        nonlocal packed
        packed, values = call(packed, steps)
        return values

    start = time.perf_counter()
    jax.block_until_ready(train())
    first = time.perf_counter() - start
    x, labels = jnp.zeros((batch, *shape)), jnp.linspace(0, 999, batch)
    params = losses.unpack_state(run_lib.first_copy(packed)).params
    jaxpr = jax.make_jaxpr(setup.model.apply)({"params": params}, x[:1], labels[:1])
    gflop = count_flops(jaxpr.jaxpr) / 1e9
    seconds = seconds_a_call(train) / steps
    yield {"": f"training, {name}", "first": first, "gflop": 3 * gflop, "seconds": seconds}
    if profile:
        print_profile(train, steps, profile)
    del packed
    apply = jax.jit(setup.model.apply)  # its arguments are no constants, which XLA would fold
    forward = lambda: apply({"params": params}, x, labels)  # noqa: E731
    start = time.perf_counter()
    jax.block_until_ready(forward())
    first = time.perf_counter() - start
    seconds = seconds_a_call(forward)
    yield {"": f"forward, {name}", "first": first, "gflop": gflop, "seconds": seconds}


def peers(config: ConfigDict) -> Iterator[dict[str, Any]]:
    """The same of PyTorch, in a process of its own."""
    model, data = config.model, config.data
    sizes = (model.nf, tuple(model.ch_mult), model.num_res_blocks, tuple(model.attn_resolutions))
    network = (*sizes, model.dropout, data.image_size, data.num_channels)
    job = {"network": network, "batch": config.training.batch_size, "dtype": model.dtype}
    command = [sys.executable, "-m", "benchmarks.peer", json.dumps(job)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    yield from json.loads(output.strip().splitlines()[-1])


def main() -> None:
    """Do it."""
    environment.prepare()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    on_cpu = jax.default_backend() == "cpu"
    parser.add_argument("--batch", type=int, nargs="+", default=[64] if on_cpu else [128, 512])
    parser.add_argument("--dtype", default="float32" if on_cpu else "bfloat16")
    parser.add_argument("--nf", type=int, default=128)
    parser.add_argument("--num_res_blocks", type=int, default=4)
    parser.add_argument("--peer", action="store_true", help="PyTorch's, too")
    parser.add_argument("--profile", type=int, default=0, help="rows of the profile")
    flags = parser.parse_args()
    rate = product_rate(flags.dtype)
    print(f"JAX {jax.__version__}, {jax.devices()}")
    print(f"a large matrix product in {flags.dtype}: {rate:.3g} TFLOP/s\n")
    lines = []
    for batch in flags.batch:
        config = cifar10_st.get_config()
        config.model.update(nf=flags.nf, num_res_blocks=flags.num_res_blocks, dtype=flags.dtype)
        config.training.batch_size = batch
        rows = list(ours(config, flags.profile))
        gflop = {row[""].split(",")[0]: row["gflop"] for row in rows}
        for row in rows:
            row["peak"] = peak_gib()
        for row in peers(config) if flags.peer else ():
            row["gflop"] = gflop[row[""].split(",")[0]]
            row[""] = "PyTorch's " + row[""]
            rows.append(row)
        for row in rows:
            rates = batch / row["seconds"], row["seconds"] * 1e3
            speed = batch * row["gflop"] / row["seconds"] / 1e3
            peak = "" if row["peak"] is None else f"{row['peak']:.1f}"
            cells = (row[""], batch, *(f"{r:,.4g}" for r in (*rates, speed)))
            lines.append((*cells, f"{speed / rate:.0%}", peak, f"{row['first']:.0f}"))
            print(" | ".join(f"{n} {c}".strip() for n, c in zip(COLUMNS, lines[-1], strict=True)))
    print("\n| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
    for line in lines:
        print("| " + " | ".join(map(str, line)) + " |")


if __name__ == "__main__":
    main()
