"""Speed and error of bits/dim by the probability-flow ODE, on the device and with SciPy.

python -m benchmarks.nll --workdir runs/vp/digits_st       # after `make demo`
python -m benchmarks.nll --workdir RUN --batch 200         # any run, with its own config

All solvers integrate the same ODE for the same test images, network and probe. Ours is
`likelihood.ode_log_likelihood`, one program on the device, with fixed and with adaptive steps. The
other one is the official releases': SciPy's RK45, which copies the state to the host, in float64,
for every stage, and a vector field that computes the drift, and then the divergence in reverse
mode. Errors are those of the mean and of the worst image, in bits/dim, relative to 512 fixed steps.
"""

import functools
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.integrate

import datasets
import likelihood
import losses
from benchmarks.measure import Table, get_parser, load_run
from data.batches import in_order
from sampling import probability_flow


def host_driven(
    field: Callable[[jax.Array, jax.Array], Any], setup: Any, eps: float, **options: Any
) -> Any:
    """A function of x (N, H, W, C) that solves the ODE of `ode_log_likelihood` by SciPy's RK45."""

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


def official_field(drift: Any, probe: jax.Array) -> Callable[[jax.Array, jax.Array], Any]:
    """The drift, and after it its divergence in reverse mode, each a program."""

    @jax.jit
    def divergence(x: jax.Array, t: jax.Array) -> jax.Array:
        grad = jax.grad(lambda x: jnp.sum(drift(t, x, None) * probe))(x)
        return losses.sum_image(grad * probe)

    drift_alone = jax.jit(lambda x, t: drift(t, x, None))
    return lambda x, t: (drift_alone(x, t), divergence(x, t))


def main() -> None:
    """Measure all solvers, and print the table."""
    parser = get_parser(__doc__)
    parser.add_argument("--workdir", type=pathlib.Path, required=True, help="of a trained run")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--tolerances", type=float, nargs="+", default=[1e-5, 1e-4])
    parser.add_argument("--steps", type=int, nargs="+", default=[64, 32])
    flags = parser.parse_args()
    config, setup, params = load_run(flags.workdir)
    score_fn, eps = setup.make_score_fn(params), config.training.truncation_time
    images = in_order(datasets.load_data(config).test, flags.batch)["image"]
    keys = jax.random.split(jax.random.key(0), len(images))
    x = setup.preprocessing.to_x0(jnp.asarray(images), keys, flip=False)
    probe = jax.random.rademacher(jax.random.key(1), x.shape, dtype=jnp.float32)

    def ours(**options: Any) -> Any:
        solve = functools.partial(likelihood.ode_log_likelihood, setup.sde, score_fn, eps=eps)
        return jax.jit(lambda x: solve(x, probe, **options))

    field = official_field(probability_flow(setup.sde, score_fn), probe)
    solvers = {f"one program, {n} steps": ours(num_steps=n) for n in flags.steps}
    for tolerance in flags.tolerances:
        options = {"rtol": tolerance, "atol": tolerance}
        solvers[f"one program, {tolerance:g}"] = ours(**options)
        solvers[f"official, {tolerance:g}"] = host_driven(field, setup, eps, **options)
    jax.block_until_ready(field(x, jnp.float32(eps)))  # compiles

    def bits(logp: jax.Array) -> np.ndarray:
        nats, offset = -jnp.asarray(logp), setup.preprocessing.bits_offset
        return np.asarray(likelihood.to_bits_per_dim(nats, x[0].size, offset), np.float64)

    exact = bits(ours(num_steps=512)(x)[0])
    print(f"JAX {jax.__version__}, {jax.devices()}; {len(x)} images, {exact.mean():.4f} bits/dim")
    columns = ("evaluations", "ms an image", "times", "error of the mean", "of an image")
    table, first = Table("solver", *columns), None
    for name, solve in solvers.items():
        if hasattr(solve, "lower"):
            jax.block_until_ready(solve(x))  # compiles
        start = time.perf_counter()
        logp, _, nfe = jax.block_until_ready(solve(x))
        each = 1e3 * (time.perf_counter() - start) / len(x)
        first = first or each
        error = bits(logp) - exact
        errors = f"{error.mean():+.4f}", f"{np.abs(error).max():.4f}"
        table.add(name, int(nfe), f"{each:.1f}", f"{each / first:.1f}", *errors)
    table.show()


if __name__ == "__main__":
    main()
