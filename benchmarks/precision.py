"""Compare training in bfloat16 with training in float32, and what both see of small noise.

python -m benchmarks.precision                             # digits, 500 steps
python -m benchmarks.precision --config configs/vp/fashion_mnist_st.py --steps 2000 --nll
python -m benchmarks.precision --workdir RUN               # the second table alone, of a run

The two runs of `--mode train` differ only in `model.dtype`; images, times and noise of every step
are the same. On a GPU float32 means TF32, unless JAX_DEFAULT_MATMUL_PRECISION=float32 is set.

Then, for the float32 run's weights, its times and test images without dequantisation: the share of
the noise's variance that is lost when x(t) is rounded to a type, and the loss ‖σ s_θ + z‖² a
dimension of the network in each type. "x(t) rounded" is a network whose first convolution computes
in bfloat16 like the others, which ours does not. TF32 is imitated on a CPU, by rounding what
convolutions multiply to 11 bits.
"""

import argparse
import contextlib
import logging
import pathlib
import runpy
import tempfile
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from ml_collections import ConfigDict

import build
import datasets
import evaluation
import run_lib
from configs import saved
from runtime import checkpointing, environment
from runtime.metrics_log import read_metrics
from sde_lib import SDE, expand

DTYPES = ("float32", "bfloat16")


def to_tf32(x: Array) -> Array:
    """Round float32 to the 11 bits of TF32's fraction, with the first one, which is not stored."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    bits += np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1))
    return jax.lax.bitcast_convert_type(bits & np.uint32(0xFFFFE000), jnp.float32)


def to_bfloat16(x: Array) -> Array:
    """Round to bfloat16, as float32."""
    return x.astype(jnp.bfloat16).astype(jnp.float32)


def share_lost(sde: SDE, x0: Array, z: Array, t: float, rounded: Callable[[Array], Array]) -> float:
    """The share of the noise's variance that `rounded`(x(t)) does not explain."""
    mean, std = (float(f(jnp.float32(t))) for f in (sde.mean_coeff, sde.std))
    x_t = rounded(mean * x0 + std * z)
    noise = (np.asarray(x_t, np.float64) - mean * np.asarray(x0, np.float64)) / std
    drawn = np.asarray(z, np.float64)
    return 1 - float(np.mean(noise * drawn) ** 2 / (np.mean(noise**2) * np.mean(drawn**2)))


@contextlib.contextmanager
def tf32_products() -> Iterator[None]:
    """Convolutions round what they multiply to TF32, unless they ask for full precision."""
    exact = jax.lax.conv_general_dilated

    def convolution(x: Array, kernel: Array, *args: Any, **options: Any) -> Array:
        if options.get("precision") is None:
            x, kernel = to_tf32(x), to_tf32(kernel)
        return exact(x, kernel, *args, **options)

    with mock.patch.object(jax.lax, "conv_general_dilated", convolution):
        yield


def print_small_times(config: ConfigDict, params: Any) -> None:
    """The table of the noise that is lost and of the loss by time, in each type."""
    setup, test = build.set_up(config), datasets.get_dataset(config, "test")
    images = datasets.in_order(test, 256)["image"]
    x0 = jnp.asarray(setup.preprocessing.to_x0_without_noise(images))
    z = jax.random.normal(jax.random.key(0), x0.shape)
    # Of γ in equal steps from ε on: σ/α grows by √10 from one to the next.
    first = float(setup.sde.gamma(config.training.truncation_time))
    gammas = [first + n * np.log(10) for n in range(5)]
    times = [
        max(float(setup.sde.inverse_gamma(g)), config.training.truncation_time) for g in gammas
    ]

    def loss(dtype: str, t: float, rounded: Callable[[Array], Array]) -> float:
        of_type = config.copy_and_resolve_references()
        of_type.model.dtype = dtype
        score_fn = build.set_up(of_type).make_score_fn(params)
        at = jnp.full(len(x0), t, jnp.float32)

        @jax.jit
        def mean_loss(x0: Array, z: Array) -> Array:
            x_t = expand(setup.sde.mean_coeff(at), x0) * x0 + expand(setup.sde.std(at), x0) * z
            return jnp.mean((expand(setup.sde.std(at), x0) * score_fn(rounded(x_t), at) + z) ** 2)

        return float(mean_loss(x0, z))

    print(f"\n{len(x0)} test images of {test.num_levels} levels, not dequantised")
    print(
        "| t | σ | lost, bfloat16 | lost, TF32 | loss, float32 | TF32 | bfloat16 | x(t) rounded |"
    )
    print("|---" * 8 + "|")
    for t in times:
        lost = [share_lost(setup.sde, x0, z, t, f) for f in (to_bfloat16, to_tf32)]
        values = [loss("float32", t, jnp.asarray)]
        with tf32_products():
            values.append(loss("float32", t, jnp.asarray))
        values += [loss("bfloat16", t, f) for f in (jnp.asarray, to_bfloat16)]
        cells = [*(f"{x:.2%}" for x in lost), *(f"{x:.5f}" for x in values)]
        sigma = float(setup.sde.std(jnp.float32(t)))
        print(f"| {t:.1e} | {sigma:.2g} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Train both networks, and print a table of their losses."""
    environment.prepare()
    logging.getLogger("soft_truncation").setLevel(logging.INFO)  # show the runs' progress
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--config", default="configs/vp/digits_st.py")
    parser.add_argument("--workdir", help="a trained run, of float32")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--windows", type=int, default=5, help="number of rows of the table")
    parser.add_argument("--nll", action="store_true", help="also compute bits/dim of each run")
    flags = parser.parse_args()
    if flags.workdir:
        config = saved.get_config(flags.workdir)
        workdir, shape = pathlib.Path(flags.workdir), build.set_up(config).state_shape
        print_small_times(config, checkpointing.restore_latest(config, workdir, shape).ema_params)
        return
    losses, lines = {}, []
    with tempfile.TemporaryDirectory() as folder:
        for dtype in DTYPES:
            config = runpy.run_path(flags.config)["get_config"]()
            config.model.dtype = dtype
            config.training.update(
                n_iters=flags.steps,
                log_freq=1,
                eval_freq=flags.steps,
                snapshot_freq=flags.steps,
                snapshot_freq_for_preemption=flags.steps,
                snapshot_sampling=False,
            )
            config.eval.enable_sampling = False
            workdir = pathlib.Path(folder) / dtype
            state = run_lib.train(config, workdir)
            if dtype == "float32":
                params, of_float32 = state.ema_params, config
            rows = read_metrics(workdir / "metrics.jsonl")
            losses[dtype] = np.array([row["loss"] for row in rows if "loss" in row])
            if flags.nll:
                report = evaluation.evaluate(config, workdir)
                cells = report["nll"], report["nll_stderr"], report["num_test_images"]
                lines.append("{}: NLL {:.4f} ± {:.4f} bits/dim on {} images".format(dtype, *cells))
    print(f"\nJAX {jax.__version__}, {jax.devices()}, {flags.config}")
    print("| steps | loss, float32 | loss, bfloat16 | mean difference | standard error |")
    print("|---" * 5 + "|")
    for steps in np.array_split(np.arange(len(losses["float32"])), flags.windows):
        first, second = (losses[dtype][steps] for dtype in DTYPES)
        change = second - first
        error = change.std(ddof=1) / len(steps) ** 0.5
        numbers = " | ".join(
            f"{x:.4g}" for x in (first.mean(), second.mean(), change.mean(), error)
        )
        print(f"| {steps[0] + 1} to {steps[-1] + 1} | {numbers} |")
    print("\n".join(lines))
    print_small_times(of_float32, params)


if __name__ == "__main__":
    main()
