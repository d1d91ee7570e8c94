"""Speed and memory of training and of the network's forward pass.

python -m benchmarks.train                                 # CIFAR-10's DDPM++, for a GPU
python -m benchmarks.train --peer torch edm                # also in PyTorch, if it is installed
python -m benchmarks.train --peer --nf 32 --num_res_blocks 1 --batch 64 --dtype float32   # a CPU
python -m benchmarks.train --kernels xla                   # group normalisation without its kernels

Trains on noise with the objective of configs/vp/cifar10_st.py, by the same calls as `--mode train`;
`--recipe` takes the network of another: of digits_st, or of the sweep of photographs.
The peers are the same network in PyTorch, compiled on a GPU, and the one of EDM, which has no level
of half the channels (55.7 M parameters); --only_peer leaves ours out.
The operations of a training step are counted as those of three forward passes. The share is
relative to the speed of one large matrix product. Memory is the process's peak on the device so
far, so give batch sizes in increasing order. `--profile` lists the kernels that take the most time.
"""

import argparse
import collections
import pathlib
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

import build
import datasets
import train_step
from benchmarks.measure import (
    Table,
    gflop_a_call,
    need,
    peak_gib,
    peer_rows,
    product_rate,
    seconds_a_call,
    take_turn,
)
from configs.vp import cifar10_st, digits_st
from experiments.sweeps import photographs_16
from models import norm_kernels
from models import utils as mutils
from readers.source import ArraySource
from runtime import environment


def print_profile(run: Callable[[], Any], steps: int, rows: int) -> None:
    """Print the kernels that take the most time in one run, with numbers in names removed."""
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


def ours(config: ConfigDict, profile: int, kernels: str | None = None) -> Iterator[dict[str, Any]]:
    """Rows for the training step and the forward pass of a config.

    `kernels` names the module with the normalisation's kernels, or is "xla", for none; then the
    forward pass, which doesn't use them, has no row.
    """
    if kernels:
        chosen = {kernels} & set(norm_kernels.BACKENDS)
        norm_kernels.BACKENDS = {name: norm_kernels.BACKENDS[name] for name in chosen}
        if chosen and (jax.default_backend() != "gpu" or norm_kernels.backend() is None):
            raise SystemExit(f"the kernels of {kernels} do not work here")
    setup, data, batch = build.set_up(config), config.data, config.training.batch_size
    shape = (data.image_size, data.image_size, data.num_channels)
    images = np.random.default_rng(0).integers(0, 256, (10_000, *shape), dtype=np.uint8)
    noise = datasets.Dataset("noise", ArraySource(images, np.zeros(len(images))), 256)
    packed = train_step.replicate(
        train_step.pack_state(setup.init_state()),
        jax.local_device_count(),
    )
    train_call = build.get_train_call(setup, noise, first_step=0)
    steps = train_step.steps_a_call(config)
    name = config.model.dtype

    def train() -> Any:
        nonlocal packed
        packed, values = train_call(packed, steps)
        return values

    def timed(call: Callable[[], Any]) -> float:
        start = time.perf_counter()
        jax.block_until_ready(call())
        return time.perf_counter() - start

    first = timed(train)
    x, labels = jnp.zeros((batch, *shape)), jnp.linspace(0, 999, batch)
    params = train_step.unpack_state(train_step.first_copy(packed)).params
    gflop = gflop_a_call(setup.model.apply, {"params": params}, x[:1], labels[:1])
    apply = jax.jit(setup.model.apply)  # as arguments, since XLA would fold constants

    def forward() -> Any:
        return apply({"params": params}, x, labels)

    first_forward = 0.0 if kernels else timed(forward)
    take_turn()
    seconds = seconds_a_call(train) / steps
    row = {"first": first, "gflop": 3 * gflop, "seconds": seconds, "peak": peak_gib()}
    by = f", normalisation by {kernels}" if kernels else ""
    yield {"": f"training, {name}{by}", **row}
    if profile:
        print_profile(train, steps, profile)
    del packed
    if kernels:
        return
    row = {"first": first_forward, "gflop": gflop, "seconds": seconds_a_call(forward)}
    yield {"": f"forward, {name}", **row}


def peers(config: ConfigDict, names: Sequence[str], compiled: str) -> Iterator[dict[str, Any]]:
    """The rows of `ours` in PyTorch, for the networks `names` (torch, edm); see `peer.Trainer`."""
    for name in names:
        if name == "edm":
            config.model.update(ch_mult=(2, 2, 2), dropout=0.13)
        model, data, batch = config.model, config.data, config.training.batch_size
        attention = tuple(model.attn_resolutions)
        network = (model.nf, tuple(model.ch_mult), model.num_res_blocks, attention)
        shape = (data.image_size, data.image_size, data.num_channels)
        ours = mutils.create_model(config)
        one = jnp.zeros((1, *shape)), jnp.zeros(1)
        params = jax.eval_shape(ours.init, jax.random.key(0), *one)
        gflop = gflop_a_call(ours.apply, params, *one)
        job = {"network": (*network, model.dropout, *shape[1:]), "batch": batch}
        for row in peer_rows({**job, "dtype": model.dtype, "compiled": compiled}):
            training = row[""].startswith("training")
            whose = "EDM's network in PyTorch, " if name == "edm" else "PyTorch's "
            how = "" if compiled == "nothing" else f", {compiled} compiled"
            yield {**row, "": whose + row[""] + how, "gflop": gflop * (3 if training else 1)}


def _photographs() -> ConfigDict:
    config = photographs_16.get_sweep().config
    config.data.path = "not read"
    return config


RECIPES: dict[str, Callable[[], ConfigDict]] = {
    "cifar10": cifar10_st.get_config,
    "digits": digits_st.get_config,
    "photographs": _photographs,
}


def main() -> None:
    """Measure all batch sizes, and print the table."""
    environment.prepare()
    environment.keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    on_cpu = jax.default_backend() == "cpu"
    parser.add_argument("--batch", type=int, nargs="+", default=[64] if on_cpu else [128, 512])
    parser.add_argument("--dtype", default="float32" if on_cpu else "bfloat16")
    parser.add_argument("--recipe", choices=RECIPES, default="cifar10")
    parser.add_argument("--nf", type=int, help="by default the recipe's")
    parser.add_argument("--num_res_blocks", type=int, help="by default the recipe's")
    parser.add_argument(
        "--peer", nargs="*", choices=("torch", "edm"), help="also measure PyTorch (torch)"
    )
    parser.add_argument("--only_peer", action="store_true", help="not ours")
    parser.add_argument(
        "--kernels",
        choices=(*norm_kernels.BACKENDS, "xla"),
        help="what normalises in training, rather than what a run chooses",
    )
    parser.add_argument(
        "--compiled",
        choices=("network", "blocks", "nothing"),
        default="nothing" if on_cpu else "network",
        help="what PyTorch compiles; on a CPU that needs a C++ compiler",
    )
    parser.add_argument("--profile", type=int, default=0, help="number of kernels to list")
    flags = parser.parse_args()
    networks = ["torch"] if flags.peer == [] else flags.peer or []
    if networks:
        need("torch")
    columns = ("images/s", "ms", "TFLOP/s", "share", "peak GiB", "first call s")
    table = Table("", "batch", *columns)
    for batch in flags.batch:
        config = RECIPES[flags.recipe]()
        config.model.dtype = flags.dtype
        for name in ("nf", "num_res_blocks"):
            if getattr(flags, name):
                config.model[name] = getattr(flags, name)
        config.training.batch_size = batch
        rows = [] if flags.only_peer else list(ours(config, flags.profile, flags.kernels))
        rows += peers(config, networks, flags.compiled)
        rate = product_rate(flags.dtype)
        for row in rows:
            rates = batch / row["seconds"], row["seconds"] * 1e3
            speed = batch * row["gflop"] / row["seconds"] / 1e3
            cells = (*rates, speed, f"{speed / rate:.0%}", row.get("peak"), f"{row['first']:.0f}")
            table.add(row[""], batch, *cells)
    table.show()


if __name__ == "__main__":
    main()
