"""Speed of the sampling methods and of bits/dim.

python -m benchmarks.sample                                          # CIFAR-10's DDPM++, for a GPU
python -m benchmarks.sample --nf 32 --num_res_blocks 1 --batch 16    # for a CPU
python -m benchmarks.sample --workdir RUN                            # a trained network

Methods are compiled as in `--mode sample`, for one device. The share is relative to the speed of
one large matrix product. Memory is the process's peak on the device so far, so give batch sizes in
increasing order. The likelihood's evaluations are Jacobian-vector products, which count as two
forward passes.

The output of an untrained network is close to 0, so the score of Gaussian images, N(0, ¼), is added
to keep x in the range of images. Only the number of evaluations of `ode` depends on the score: it
is smaller than for a trained network, which --workdir uses.
"""

import functools
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from ml_collections import ConfigDict

import build
import likelihood
import sampling
from benchmarks.measure import (
    Table,
    add_network,
    get_parser,
    gflop_a_call,
    load_run,
    peak_gib,
    product_rate,
    seconds_a_call,
    set_network,
)
from configs.vp import cifar10_st
from sde_lib import expand


def methods(config: ConfigDict, tolerance: float) -> dict[str, dict[str, Any]]:
    """The fields of `config.sampling` for each row of the table."""
    tolerances = {"rtol": tolerance, "atol": tolerance}
    predictor = {"predictor": "euler_maruyama", "corrector": "none", "probability_flow": False}
    return {
        "dpm_solver, 20 steps": {"method": "dpm_solver", "num_steps": 20},
        "heun, 18 steps": {"method": "heun", "num_steps": 18},
        f"ode, rtol = atol = {tolerance:g}": {"method": "ode", **tolerances},
        f"pc, euler_maruyama, {config.model.num_scales} steps": {"method": "pc", **predictor},
    }


def score_of(setup: build.Setup, trained: bool) -> Callable[[Any], sampling.ScoreFn]:
    """A function from parameters to the score function to sample from."""

    def make_score_fn(params: Any) -> sampling.ScoreFn:
        network = setup.make_score_fn(params)

        def with_gaussian(x: Array, t: Array) -> Array:
            variance = 0.25 * setup.sde.mean_coeff(t) ** 2 + setup.sde.std(t) ** 2
            return network(x, t) - x / expand(variance, x)

        return network if trained else with_gaussian

    return make_score_fn


def likelihood_of(
    setup: build.Setup,
    make_score_fn: Callable[[Any], sampling.ScoreFn],
    shape: tuple[int, ...],
    num_steps: int,
) -> Callable[[Any, Array], tuple[Array, Array]]:
    """A function (params, key) → (log-likelihoods (N,) of Gaussian images, evaluations)."""

    def evaluate(params: Any, key: Array) -> tuple[Array, Array]:
        x = 0.5 * jax.random.normal(key, shape)
        probe = jax.random.rademacher(jax.random.fold_in(key, 1), shape, dtype=jnp.float32)
        logp, _, nfe = likelihood.ode_log_likelihood(
            setup.sde, make_score_fn(params), x, probe, eps=1e-5, num_steps=num_steps
        )
        return logp, nfe

    return evaluate


def main() -> None:
    """Measure all methods and batch sizes, and print the table."""
    parser, on_cpu = get_parser(__doc__), jax.default_backend() == "cpu"
    add_network(parser, on_cpu=[16], on_gpu=[128])
    parser.add_argument("--workdir", type=pathlib.Path, help="workdir of a trained run")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="rtol and atol of ode")
    parser.add_argument("--pc_steps", type=int, default=20 if on_cpu else 1000)
    parser.add_argument("--nll_steps", type=int, default=64, help="steps of the likelihood")
    flags = parser.parse_args()
    if flags.workdir:
        config, _, params = load_run(flags.workdir)
    else:
        config = cifar10_st.get_config()
        set_network(config, flags)
        params = build.set_up(config).init_params()
    params = jax.device_put(params)
    config.model.update(dtype=flags.dtype, num_scales=flags.pc_steps)
    setup = build.set_up(config)
    make_score_fn = score_of(setup, bool(flags.workdir))
    shape = (config.data.image_size, config.data.image_size, config.data.num_channels)
    one = jnp.zeros((1, *shape)), jnp.zeros(1)
    gflop = gflop_a_call(setup.model.apply, {"params": params}, *one)
    columns = ("evaluations", "images/s", "ms an evaluation", "TFLOP/s", "share", "peak GiB")
    table = Table("", "batch", *columns, "compilation s")
    for batch in flags.batch:
        samplers: dict[str, Any] = {}
        for name, fields in methods(config, flags.tolerance).items():
            config.sampling.update(fields)
            samplers[name] = build.get_sampling_fn(config, setup.sde, make_score_fn, batch)
        likelihood_name = f"likelihood, {flags.nll_steps} steps"
        samplers[likelihood_name] = likelihood_of(
            setup, make_score_fn, (batch, *shape), flags.nll_steps
        )
        calls = {}
        for name, sampler in samplers.items():
            start = time.perf_counter()
            compiled = jax.jit(sampler).lower(params, jax.random.key(0)).compile()
            compilation = time.perf_counter() - start
            calls[name] = functools.partial(compiled, params, jax.random.key(0)), compilation
        rate = product_rate(flags.dtype)
        for name, (call, compilation) in calls.items():
            x, nfe = call()
            if not jnp.isfinite(x).all():
                raise SystemExit(f"{name} gives values that are not finite")
            seconds = seconds_a_call(call)
            passes = 2 if name == likelihood_name else 1
            speed = batch * gflop * passes * int(nfe) / seconds / 1e3
            rates = batch / seconds, 1e3 * seconds / int(nfe), speed
            cells = (f"{speed / rate:.0%}", peak_gib(), f"{compilation:.0f}")
            table.add(name, batch, int(nfe), *rates, *cells)
    table.show()
    if not flags.workdir:
        print("\nThe network is not trained; ode's evaluations are those of Gaussian images.")


if __name__ == "__main__":
    main()
