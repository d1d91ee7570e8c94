"""How long bits/dim by the probability-flow ODE takes, against loops that the host drives.

python -m benchmarks.nll --workdir runs/vp/digits_st       # after `make demo`
python -m benchmarks.nll --workdir RUN --config configs/vp/fashion_mnist_st.py --batch 200

All integrate the same ODE of the same test images with the same network, probe and tolerances.
Ours is `likelihood.ode_log_likelihood`, one program on the device. The others are SciPy's RK45,
which brings the state to the host, in float64, for every stage: once with our vector field, where
a derivative in forward mode gives drift and divergence together, and once with the official
releases', which take the drift, and then the divergence in reverse mode.
"""

import argparse
import pathlib
import runpy
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.integrate
from absl import logging

import checkpointing
import datasets
import environment
import likelihood
import losses
import session
from models import utils as mutils
from sampling import probability_flow


def host_driven(field: Callable[[jax.Array, jax.Array], Any], setup: Any, **options: Any) -> Any:
    """x (N, H, W, C) → as of `ode_log_likelihood`, by SciPy's RK45."""
    eps = options.pop("eps")

    def solve(x: jax.Array) -> Any:
        def flat_field(t: float, state: np.ndarray) -> np.ndarray:
            at = jnp.asarray(state[: x.size].reshape(x.shape), jnp.float32)
            return np.concatenate(
                [np.asarray(part, np.float64).ravel() for part in field(at, jnp.float32(t))]
            )

        start = np.concatenate([np.asarray(x, np.float64).ravel(), np.zeros(len(x))])
        span = (eps, setup.sde.T)
        solution = scipy.integrate.solve_ivp(flat_field, span, start, method="RK45", **options)
        latent = jnp.asarray(solution.y[: x.size, -1].reshape(x.shape), jnp.float32)
        return setup.sde.prior_logp(latent) + solution.y[x.size :, -1], latent, solution.nfev

    return solve


def main() -> None:
    """Do it."""
    environment.prepare()
    logging.set_verbosity(logging.ERROR)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--config", default="configs/vp/digits_st.py")
    parser.add_argument("--workdir", type=pathlib.Path, required=True, help="a trained run's")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--tolerance", type=float, default=1e-4)
    flags = parser.parse_args()
    config = runpy.run_path(flags.config)["get_config"]()
    setup = session.set_up(config)
    state = checkpointing.restore_latest(config, flags.workdir, setup.state_shape)
    score_fn = mutils.get_score_fn(config, setup.sde, setup.model, state.ema_params)
    images = datasets.in_order(session.load_data(config).test, flags.batch)["image"]
    keys = jax.random.split(jax.random.key(0), len(images))
    x = datasets.preprocess(jnp.asarray(images), keys, setup.num_levels, config, flip=False)
    probe = jax.random.rademacher(jax.random.key(1), x.shape, dtype=jnp.float32)
    drift = probability_flow(setup.sde, score_fn)
    options = {"rtol": flags.tolerance, "atol": flags.tolerance}
    options["eps"] = config.training.truncation_time

    @jax.jit
    def ours(x: jax.Array) -> Any:
        return likelihood.ode_log_likelihood(setup.sde, score_fn, x, probe, **options)

    @jax.jit
    def forward_mode(x: jax.Array, t: jax.Array) -> Any:
        dx, tangent = jax.jvp(lambda x: drift(t, x, None), (x,), (probe,))
        return dx, losses.sum_image(tangent * probe)

    drift_alone = jax.jit(lambda x, t: drift(t, x, None))

    @jax.jit
    def divergence(x: jax.Array, t: jax.Array) -> jax.Array:
        grad = jax.grad(lambda x: jnp.sum(drift(t, x, None) * probe))(x)
        return losses.sum_image(grad * probe)

    solvers = {
        "one program": ours,
        "SciPy, our field": host_driven(forward_mode, setup, **options),
        "SciPy, the official field": host_driven(
            lambda x, t: (drift_alone(x, t), divergence(x, t)), setup, **options
        ),
    }
    print(f"JAX {jax.__version__}, {jax.devices()}, rtol = atol = {flags.tolerance:g}")
    print("| | images | evaluations | s | ms an image | times | bits/dim |\n" + "|---" * 7 + "|")
    first = None
    offset = datasets.bits_offset(setup.num_levels, config.data.centered)
    for name, solve in solvers.items():
        jax.block_until_ready(solve(x))  # compiles
        start = time.perf_counter()
        logp, _, nfe = jax.block_until_ready(solve(x))
        seconds = time.perf_counter() - start
        first = first or seconds
        dims = int(np.prod(x.shape[1:]))
        bits = float(np.mean(likelihood.to_bits_per_dim(-jnp.asarray(logp), dims, offset)))
        each = 1e3 * seconds / len(x)
        cells = (name, len(x), int(nfe), f"{seconds:.2f}", f"{each:.2f}", f"{seconds / first:.1f}")
        print("| " + " | ".join(map(str, (*cells, f"{bits:.4f}"))) + " |")


if __name__ == "__main__":
    main()
