"""Speed and memory of training and of the network's forward pass.

python -m benchmarks.train                                 # CIFAR-10's DDPM++, for a GPU
python -m benchmarks.train --peer torch edm                # also in PyTorch, if it is installed
python -m benchmarks.train --peer torch --nf 32 --num_res_blocks 1 --batch 64      # for a CPU
python -m benchmarks.train --no_kernels                    # normalisation by XLA on a GPU

Trains on noise with the objective of configs/vp/cifar10_st.py, by the same calls as `--mode train`.
The peers are the same network in PyTorch, compiled on a GPU, and the one of EDM, which has no level
of half the channels (55.7 M parameters); --only_peer leaves ours out.
The operations of a training step are counted as those of three forward passes. The share is
relative to the speed of one large matrix product. Memory is the process's peak on the device so
far, so give batch sizes in increasing order. `--profile` lists the kernels that take the most time.
"""

import collections
import importlib.util
import json
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

import build
import train_step
from benchmarks.measure import (
    Table,
    add_network,
    get_parser,
    gflop_a_call,
    peak_gib,
    product_rate,
    rows_of,
    seconds_a_call,
    set_network,
    take_turn,
    timed,
)
from configs.vp import cifar10_st
from data.batches import Dataset
from models import norm_kernels
from models import utils as mutils
from readers.source import ArraySource


def print_profile(run: Callable[[], Any], steps: int, rows: int) -> None:
    """Print the kernels that take the most time in one run, with numbers in names removed."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
        planes = jax.profiler.ProfileData.from_file(str(path)).planes
        lines = [line for plane in planes if "GPU" in plane.name for line in plane.lines]
        times, counts = collections.Counter[str](), collections.Counter[str]()
        for line in lines:
            for event in line.events if line.name.startswith("Stream") else ():
                name = re.sub(r"[._]?\d+(?=_|$)", "", event.name)[:90]
                times[name] += event.duration_ns / 1e6 / steps  # type: ignore[assignment]
                counts[name] += 1
    print(f"\nkernels, {sum(times.values()):.2f} ms a step in all")
    for name, ms in times.most_common(rows):
        print(f"{ms:8.3f} ms {counts[name] / steps:7.1f} times  {name}")


def ours(config: ConfigDict, profile: int = 0) -> Iterator[dict[str, Any]]:
    """Rows for the training step and the forward pass of a config."""
    setup, data, batch = build.set_up(config), config.data, config.training.batch_size
    shape = (data.image_size, data.image_size, data.num_channels)
    images = np.random.default_rng(0).integers(0, 256, (10_000, *shape), dtype=np.uint8)
    noise = Dataset("noise", ArraySource(images, np.zeros(len(images))), 256)
    packed = train_step.replicate(
        train_step.pack_state(setup.init_state()),
        jax.local_device_count(),
    )
    train_call = build.get_train_call(setup, noise, first_step=0)
    steps = train_step.steps_a_call(setup.loop)

    def train() -> Any:
        nonlocal packed
        packed, values = train_call(packed, steps)
        return values

    first = timed(train)
    x, times = jnp.zeros((batch, *shape)), jnp.linspace(0, 999, batch)
    params = train_step.unpack_state(train_step.first_copy(packed)).params
    gflop = gflop_a_call(setup.model.apply, {"params": params}, x[:1], times[:1])
    apply = jax.jit(setup.model.apply)  # as arguments, since XLA would fold constants

    def forward() -> Any:
        return apply({"params": params}, x, times)

    first_forward = timed(forward)
    take_turn()
    seconds = seconds_a_call(train) / steps
    row = {"first": first, "gflop": 3 * gflop, "seconds": seconds, "peak": peak_gib()}
    yield {"": f"training, {config.model.dtype}", **row}
    if profile:
        print_profile(train, steps, profile)
    del packed
    row = {"first": first_forward, "gflop": gflop, "seconds": seconds_a_call(forward)}
    yield {"": f"forward, {config.model.dtype}", **row}


def peer(config: ConfigDict, name: str) -> Iterator[dict[str, Any]]:
    """The rows of `ours` in PyTorch, for the network `name` (torch, edm); see `peer.Trainer`."""
    if not importlib.util.find_spec("torch"):
        raise SystemExit("the peer needs PyTorch: pip install torch")
    config = config.copy_and_resolve_references()
    if name == "edm":
        config.model.update(ch_mult=(2, 2, 2), dropout=0.13)
    model, data = config.model, config.data
    network = mutils.create_model(config)
    one = jnp.zeros((1, data.image_size, data.image_size, data.num_channels)), jnp.zeros(1)
    params = jax.eval_shape(network.init, jax.random.key(0), *one)
    gflop = gflop_a_call(network.apply, params, *one)
    fields = ("nf", "ch_mult", "num_res_blocks", "attn_resolutions", "dropout")
    sizes = {"image_size": data.image_size, "channels": data.num_channels}
    job = {"network": {**{field: model[field] for field in fields}, **sizes}}
    job |= {"batch": config.training.batch_size, "dtype": model.dtype}
    for row in rows_of("benchmarks.peer", json.dumps(job)):
        whose = "EDM's network in PyTorch, " if name == "edm" else "PyTorch's "
        times = 3 if row[""].startswith("training") else 1
        yield {**row, "": whose + row[""], "gflop": gflop * times}


def main() -> None:
    """Measure all batch sizes, and print the table."""
    parser = get_parser(__doc__)
    add_network(parser, on_cpu=[64], on_gpu=[128, 512])
    parser.add_argument("--peer", nargs="+", choices=("torch", "edm"), default=[])
    parser.add_argument("--only_peer", action="store_true", help="not ours")
    parser.add_argument("--no_kernels", action="store_true", help="XLA normalises in training")
    parser.add_argument("--profile", type=int, default=0, help="number of kernels to list")
    flags = parser.parse_args()
    columns = ("images/s", "ms", "TFLOP/s", "share", "peak GiB", "first call s")
    table = Table("", "batch", *columns)
    for batch in flags.batch:
        config = cifar10_st.get_config()
        set_network(config, flags)
        config.model.dtype, config.training.batch_size = flags.dtype, batch
        rows = []
        if flags.no_kernels:
            with mock.patch.object(norm_kernels, "work", return_value=False):
                rows = [{**row, "": row[""] + ", normalisation by XLA"} for row in ours(config)]
        elif not flags.only_peer:
            rows = list(ours(config, flags.profile))
        rows += [row for name in flags.peer for row in peer(config, name)]
        rate = product_rate(flags.dtype)
        for row in rows:
            rates = batch / row["seconds"], row["seconds"] * 1e3
            speed = batch * row["gflop"] / row["seconds"] / 1e3
            cells = (*rates, speed, f"{speed / rate:.0%}", row.get("peak"), f"{row['first']:.0f}")
            table.add(row[""], batch, *cells)
    table.show()


if __name__ == "__main__":
    main()
