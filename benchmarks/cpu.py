"""Training and the forward pass on a CPU beside PyTorch's, in alternation.

    python -m benchmarks.cpu [--networks cifar10 digits] [--rounds 5] [--before CHECKOUT]

In each round a network is timed in processes of their own, one after the other: ours as it was in
an older checkout (which has a copy of this folder of benchmarks), ours, and PyTorch's, all on the
same threads. The table has the medians over the rounds, and the medians of the rounds' quotients.
Needs PyTorch.

    python -m benchmarks.cpu --layers cifar10

times the layers of a network instead, each alone: the sums over all of its layers of a kind.
"""

import argparse
import collections
import json
import pathlib
import statistics
import subprocess
import sys
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from benchmarks import train
from benchmarks.measure import Table, need, peer_rows, seconds_a_call
from models import layers
from models import utils as mutils
from runtime import environment

# (kind, shape of its input, channels of its output, size of its kernel)
Layer = tuple[str, tuple[int, ...], int, int]
_WHOSE, _SPANS = ("ours", "PyTorch"), ("forward", "with gradient")

# name: (recipe, its fields, batch size)
_NETWORKS: dict[str, tuple[str, dict[str, Any], int]] = {
    "cifar10": ("cifar10", {"nf": 32, "num_res_blocks": 1}, 64),
    "cifar10_wide": ("cifar10", {"nf": 64, "num_res_blocks": 1}, 64),
    "photographs": ("photographs", {}, 32),
    "digits": ("digits", {"ch_mult": (1, 1)}, 64),  # of today, for older checkouts too
}


def _config(name: str) -> ConfigDict:
    recipe, fields, batch = _NETWORKS[name]
    config = train.RECIPES[recipe]()
    config.model.update(dtype="float32", **fields)
    config.training.batch_size = batch
    return config


def _measure_ours(name: str, checkout: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of `train.ours` of a checkout, measured in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.cpu", "--job", name]
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=checkout)
    rows: list[dict[str, Any]] = json.loads(run.stdout.strip().splitlines()[-1])
    return rows


def _find_layers(config: ConfigDict) -> collections.Counter[Layer]:
    """The layers of a network that take most of its time, and how often it has each."""
    found: collections.Counter[Layer] = collections.Counter()

    def see(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        inside = any(name.startswith("AttnBlock") for name in module.path[:-1])
        if args and context.method_name == "__call__" and not inside:
            shape, name = np.shape(args[0]), type(module).__name__
            if name == "AttnBlock":
                found["attention", shape, shape[-1], 1] += 1
            elif name == "Conv":
                found["convolution", shape, module.features, module.kernel_size[0]] += 1
            elif name == "GroupNorm":
                shifted = len(args) > 1 and args[1] is not None
                kind = "normalisation, shift and dropout" if shifted else "normalisation"
                found[kind, shape, shape[-1], 1] += 1
        return call(*args, **kwargs)

    model, data, batch = mutils.create_model(config), config.data, config.training.batch_size
    x = jnp.zeros((batch, data.image_size, data.image_size, data.num_channels))
    with nn.intercept_methods(see):
        jax.eval_shape(model.init, jax.random.key(0), x, jnp.zeros(batch))
    return found


def _layer_seconds(layer: Layer) -> list[float]:
    """Seconds of our layer's forward pass, and with its gradient."""
    kind, shape, outputs, size = layer
    x = jax.random.normal(jax.random.key(0), shape)
    args: tuple[Any, ...] = (x,)
    if kind == "attention":
        module: Any = layers.AttnBlock(True, 0.0)
    elif kind == "convolution":
        module = layers.Conv(outputs, (size, size))
    else:
        module = layers.GroupNorm(rate=0.1)
        if kind != "normalisation":
            keys = jax.random.bits(jax.random.key(1), (len(x), 2), jnp.uint32)
            args = x, jnp.ones((len(x), shape[-1])), keys
    params = module.init(jax.random.key(0), *args)
    forward = jax.jit(module.apply)
    y = forward(params, *args)

    @jax.jit
    def both(params: Any, x: Any, y: Any) -> Any:
        out, pull = jax.vjp(lambda params, x: module.apply(params, x, *args[1:]), params, x)
        return out, pull(y)

    calls = (lambda: forward(params, *args), lambda: both(params, x, y))
    return [seconds_a_call(call, 0.5) for call in calls]


def _show_layers(name: str) -> None:
    """Print how long the layers of a network take, each alone, ours and PyTorch's."""
    found = _find_layers(_config(name))
    theirs = peer_rows({"layers": list(found)})
    table = Table("layer", "count", *(f"{w} {s}, ms" for w in _WHOSE for s in _SPANS))
    sums: dict[str, Any] = {}
    for (layer, count), row in zip(found.items(), theirs, strict=True):
        kind, (_, height, _, channels), outputs, size = layer
        group = f"{size}×{size} {kind}s" if kind == "convolution" else kind
        values = np.array([*_layer_seconds(layer), *row["seconds"]]) * 1e3 * count
        print(group, f"{height}²", channels, outputs, count, values, flush=True)
        total = sums.setdefault(group, [0, np.zeros(4)])
        sums[group] = [total[0] + count, total[1] + values]
    for group, (count, values) in sums.items():
        table.add(group, count, *(float(value) for value in values))
    table.add("all of these", "", *(float(v) for v in sum(values for _, values in sums.values())))
    table.show()


def main() -> None:
    """Measure all networks, and print the table."""
    environment.prepare()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--networks", nargs="+", choices=_NETWORKS, default=list(_NETWORKS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", choices=_NETWORKS, help="of this network, each alone")
    parser.add_argument("--before", type=pathlib.Path, help="an older checkout")
    parser.add_argument("--job", choices=_NETWORKS, help="time ours alone, once")
    options = parser.parse_args()
    if hasattr(environment, "keep_freed_memory"):  # not in the oldest checkouts
        environment.keep_freed_memory()
    if options.job:
        print(json.dumps(list(train.ours(_config(options.job), 0))))
        return
    need("torch")
    if options.layers:
        _show_layers(options.layers)
        return
    here = pathlib.Path(__file__).resolve().parent.parent
    checkouts = {"before": options.before, "ours": here} if options.before else {"ours": here}
    columns = [f"{side}, ms" for side in (*checkouts, "PyTorch")]
    table = Table("network", "", *columns, *(f"{side} / PyTorch" for side in checkouts))
    for name in options.networks:
        times: dict[str, list[list[float]]] = {}
        for _ in range(options.rounds):
            sides = [_measure_ours(name, checkout) for checkout in checkouts.values()]
            sides.append(list(train.peers(_config(name), ["torch"], "nothing")))
            for rows in zip(*sides, strict=True):
                what = rows[-2][""].split(",")[0]
                times.setdefault(what, []).append([row["seconds"] * 1e3 for row in rows])
                print(name, what, *(f"{ms:.1f}" for ms in times[what][-1]), flush=True)
        for what, rounds in times.items():
            medians = [statistics.median(side) for side in zip(*rounds, strict=True)]
            quotients = [
                statistics.median(round_[i] / round_[-1] for round_ in rounds)
                for i in range(len(checkouts))
            ]
            table.add(name, what, *medians, *(f"{value:.2f}" for value in quotients))
    table.show()


if __name__ == "__main__":
    main()
