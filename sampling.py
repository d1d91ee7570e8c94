"""Samplers: predictor-corrector and the probability-flow ODE (arXiv 2011.13456, §4).

A predictor or a corrector is one pure function of the state, the time and the noise; a sampler is
a compiled function of (params, key).
"""

from collections.abc import Callable
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from ml_collections import ConfigDict

from sde_lib import VPSDE

ScoreFn = Callable[[Array, Array], Array]  # x (N, ...), t (N,) → ∇ log p_t(x)
MakeScoreFn = Callable[[Any], ScoreFn]  # parameters → score function


def fill_time(t: ArrayLike, x: Array) -> Array:
    """The time t for each row of x, (N,) float32."""
    return jnp.full(x.shape[:1], t, jnp.float32)


def euler_maruyama(
    sde: VPSDE, score_fn: ScoreFn, x: Array, t: Array, t_next: Array, z: Array
) -> tuple[Array, Array]:
    """Euler-Maruyama on the reverse SDE, from t to t_next < t with noise z: (x, its mean)."""
    dt = t - t_next
    g = sde.diffusion(t)
    mean = x - (sde.drift_coeff(t) * x - g**2 * score_fn(x, fill_time(t, x))) * dt
    return mean + g * jnp.sqrt(dt) * z, mean


def reverse_diffusion(
    sde: VPSDE, score_fn: ScoreFn, x: Array, t: Array, t_next: Array, z: Array
) -> tuple[Array, Array]:
    """The reverse of the forward chain x ← a x + G z (arXiv 2011.13456, eq. 46): (x, its mean)."""
    a, g = sde.discretize(t, t - t_next)
    mean = (2 - a) * x + g**2 * score_fn(x, fill_time(t, x))
    return mean + g * z, mean


def langevin(
    sde: VPSDE, score_fn: ScoreFn, x: Array, t: Array, dt: Array, snr: float, z: Array
) -> tuple[Array, Array]:
    """One step of Langevin dynamics at t (arXiv 2011.13456, alg. 5): (x, its mean).

    The step size follows from the norms of score and noise, averaged over the batch. `dt` is the
    predictor's step there, which gives the chain's factor α of the variance-preserving SDEs.
    """
    score = score_fn(x, fill_time(t, x))
    norm = lambda v: jnp.mean(jnp.linalg.norm(v.reshape(len(v), -1), axis=-1))  # noqa: E731
    a, _ = sde.discretize(t, dt)
    step = 2 * a**2 * (snr * norm(z) / norm(score)) ** 2
    mean = x + step * score
    return mean + jnp.sqrt(2 * step) * z, mean


PREDICTORS = {"euler_maruyama": euler_maruyama, "reverse_diffusion": reverse_diffusion}
CORRECTORS = {"none": None, "langevin": langevin}


def denoise(sde: VPSDE, score_fn: ScoreFn, x: Array, t: ArrayLike) -> Array:
    """Tweedie's formula, E[x_0 | x_t] = (x + σ² s(x, t)) / α."""
    return (x + sde.std(t) ** 2 * score_fn(x, fill_time(t, x))) / sde.mean_coeff(t)


def pc_sample(
    sde: VPSDE,
    score_fn: ScoreFn,
    key: Array,
    shape: tuple[int, ...],
    *,
    predictor: str,
    corrector: str,
    num_steps: int,
    eps: float,
    snr: float = 0.16,
    n_steps_each: int = 1,
    noise_removal: bool = True,
) -> tuple[Array, int]:
    """Predictor-corrector sampling (arXiv 2011.13456, alg. 1) on a uniform grid from T to eps.

    Args:
      sde, score_fn: the reverse SDE.
      key: for all noise.
      shape: of the samples, (N, H, W, C).
      predictor, corrector: names in PREDICTORS and CORRECTORS.
      num_steps: evaluations by the predictor and the final denoising, at least 2.
      eps: where the reverse process stops.
      snr: Langevin's signal-to-noise ratio.
      n_steps_each: corrector steps for each predictor step.
      noise_removal: end with `denoise` at eps.

    Returns:
      (x (N, H, W, C) in the model's range, number of score evaluations for each sample).
    """
    predict, correct = PREDICTORS[predictor], CORRECTORS[corrector]
    times = jnp.linspace(sde.T, eps, num_steps)

    def body(i: Array, x: Array) -> Array:
        keys = jax.random.split(jax.random.fold_in(key, i + 1), n_steps_each + 1)
        t, t_next = times[i], times[i + 1]
        if correct is not None:
            for corrector_key in keys[1:]:
                z = jax.random.normal(corrector_key, shape)
                x, _ = correct(sde, score_fn, x, t, t - t_next, snr, z)
        return predict(sde, score_fn, x, t, t_next, jax.random.normal(keys[0], shape))[0]

    x = sde.prior_std() * jax.random.normal(jax.random.fold_in(key, 0), shape)
    x = jax.lax.fori_loop(0, num_steps - 1, body, x)
    nfe = (num_steps - 1) * (1 + (0 if correct is None else n_steps_each))
    if noise_removal:
        return denoise(sde, score_fn, x, eps), nfe + 1
    return x, nfe


def solve_ode(
    vector_field: Callable[[Any, Any, Any], Any],
    y0: Any,
    t0: float,
    t1: float,
    rtol: float,
    atol: float,
) -> tuple[Any, Array]:
    """Dormand-Prince 5(4) with adaptive steps, entirely on the device.

    The error norm is the root mean square over the whole state, so that a batch shares its steps.

    Args:
      vector_field: (t, y, args) → dy/dt.
      y0: state at t0, a pytree.
      t0, t1: ends, in either order.
      rtol, atol: tolerances.

    Returns:
      (y at t1, number of evaluations of the vector field). A solve that fails gives NaN.
    """
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(vector_field),
        diffrax.Dopri5(),
        t0,
        t1,
        None,
        y0,
        # A field that is not finite would shrink the step forever: dtmin ends such a solve.
        stepsize_controller=diffrax.PIDController(
            rtol=rtol, atol=atol, dtmin=1e-10, force_dtmin=False
        ),
        max_steps=100_000,
        throw=False,
    )
    failed = solution.result != diffrax.RESULTS.successful
    y1 = jax.tree.map(lambda y: jnp.where(failed, jnp.nan, y[-1]), solution.ys)
    # Six new stages a step (the first is the last one's last), and two to choose the first step.
    return y1, 6 * solution.stats["num_steps"] + 2


def probability_flow(sde: VPSDE, score_fn: ScoreFn) -> Callable[[Any, Array, Any], Array]:
    """dx/dt = f x - ½ g² s(x, t), the ODE with the SDE's marginals, as a vector field (t, x, _)."""

    def drift(t: Array, x: Array, args: Any = None) -> Array:
        del args
        score = score_fn(x, fill_time(t, x))
        return sde.drift_coeff(t) * x - 0.5 * sde.diffusion(t) ** 2 * score

    return drift


def ode_sample(
    sde: VPSDE,
    score_fn: ScoreFn,
    z: Array,
    *,
    eps: float,
    rtol: float,
    atol: float,
    noise_removal: bool = True,
) -> tuple[Array, Array]:
    """Samples by the probability-flow ODE from the latents `z` at T: (x, score evaluations)."""
    x, nfe = solve_ode(probability_flow(sde, score_fn), z, sde.T, eps, rtol, atol)
    if noise_removal:
        return denoise(sde, score_fn, x, eps), nfe + 1
    return x, nfe


def get_sampling_fn(
    config: ConfigDict, sde: VPSDE, make_score_fn: MakeScoreFn, batch_size: int
) -> Callable[[Any, Array], tuple[Array, Array]]:
    """The sampler that `config.sampling` names, compiled: (params, key) → (x, nfe).

    x is (batch_size, H, W, C) in the model's range.
    """
    sampling = config.sampling
    shape = (batch_size, config.data.image_size, config.data.image_size, config.data.num_channels)

    def sample(params: Any, key: Array) -> tuple[Array, Array]:
        score_fn = make_score_fn(params)
        if sampling.method == "ode":
            z = sde.prior_std() * jax.random.normal(key, shape)
            return ode_sample(
                sde,
                score_fn,
                z,
                eps=sampling.truncation_time,
                rtol=sampling.rtol,
                atol=sampling.atol,
                noise_removal=sampling.noise_removal,
            )
        x, nfe = pc_sample(
            sde,
            score_fn,
            key,
            shape,
            predictor=sampling.predictor,
            corrector=sampling.corrector,
            num_steps=config.model.num_scales,
            eps=sampling.truncation_time,
            snr=sampling.snr,
            n_steps_each=sampling.n_steps_each,
            noise_removal=sampling.noise_removal,
        )
        return x, jnp.asarray(nfe)

    return jax.jit(sample)
