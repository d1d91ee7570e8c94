"""Samplers: predictor-corrector (arXiv 2011.13456, §4), and four ways along the ODE.

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

from sde_lib import SDE, expand

ScoreFn = Callable[[Array, Array], Array]  # x (N, ...), t (N,) → ∇ log p_t(x)
MakeScoreFn = Callable[[Any], ScoreFn]  # parameters → score function
Constraint = Callable[[Array, Array, Array], Array]  # (key, x, t) → x with what is known of it


def fill_time(t: ArrayLike, x: Array) -> Array:
    """The time t for each row of x, (N,) float32."""
    return jnp.full(x.shape[:1], t, jnp.float32)


def euler_maruyama(
    sde: SDE,
    score_fn: ScoreFn,
    x: Array,
    t: Array,
    t_next: Array,
    z: Array,
    probability_flow: bool = False,
) -> tuple[Array, Array]:
    """Euler-Maruyama on the reverse SDE, from t to t_next < t with noise z: (x, its mean)."""
    dt = t - t_next
    g, score = sde.diffusion(t), score_fn(x, fill_time(t, x))
    if probability_flow:
        x = x - (sde.drift_coeff(t) * x - 0.5 * g**2 * score) * dt
        return x, x
    mean = x - (sde.drift_coeff(t) * x - g**2 * score) * dt
    return mean + g * jnp.sqrt(dt) * z, mean


def reverse_diffusion(
    sde: SDE,
    score_fn: ScoreFn,
    x: Array,
    t: Array,
    t_next: Array,
    z: Array,
    probability_flow: bool = False,
) -> tuple[Array, Array]:
    """The reverse of the forward chain x ← a x + b z (arXiv 2011.13456, eq. 46): (x, its mean)."""
    a, b = sde.transition(t_next, t)
    score = score_fn(x, fill_time(t, x))
    if probability_flow:
        x = (2 - a) * x + 0.5 * b**2 * score
        return x, x
    mean = (2 - a) * x + b**2 * score
    return mean + b * z, mean


def ancestral_sampling(
    sde: SDE,
    score_fn: ScoreFn,
    x: Array,
    t: Array,
    t_next: Array,
    z: Array,
    probability_flow: bool = False,
) -> tuple[Array, Array]:
    """A draw from p(x_s | x_t, x_0 = E[x_0 | x_t]) for s = t_next: (x, its mean).

    The posterior of the forward chain, exact for every linear SDE (arXiv 2006.11239, eq. 7;
    arXiv 2011.13456, eq. 47 for VE).
    """
    del probability_flow  # the config refuses it
    a, b = sde.transition(t_next, t)
    mean = (x + b**2 * score_fn(x, fill_time(t, x))) / a
    return mean + b * sde.std(t_next) / sde.std(t) * z, mean


def no_predictor(
    sde: SDE,
    score_fn: ScoreFn,
    x: Array,
    t: Array,
    t_next: Array,
    z: Array,
    probability_flow: bool = False,
) -> tuple[Array, Array]:
    """Leaves x alone: the corrector does everything."""
    del sde, score_fn, t, t_next, z, probability_flow
    return x, x


def langevin(
    sde: SDE, score_fn: ScoreFn, x: Array, t: Array, t_next: Array, snr: float, z: Array
) -> tuple[Array, Array]:
    """One step of Langevin dynamics at t (arXiv 2011.13456, alg. 5): (x, its mean).

    The step size follows from the norms of score and noise, averaged over the batch, and from the
    factor of the chain's step from t_next.
    """
    score = score_fn(x, fill_time(t, x))
    norm = lambda v: jnp.mean(jnp.linalg.norm(v.reshape(len(v), -1), axis=-1))  # noqa: E731
    a, _ = sde.transition(t_next, t)
    step = 2 * a**2 * (snr * norm(z) / norm(score)) ** 2
    mean = x + step * score
    return mean + jnp.sqrt(2 * step) * z, mean


def annealed_langevin(
    sde: SDE, score_fn: ScoreFn, x: Array, t: Array, t_next: Array, snr: float, z: Array
) -> tuple[Array, Array]:
    """Annealed Langevin dynamics of NCSN (arXiv 1907.05600, alg. 1): a step ∝ σ(t)²: (x, mean)."""
    a, _ = sde.transition(t_next, t)
    step = 2 * a**2 * (snr * sde.std(t)) ** 2
    mean = x + step * score_fn(x, fill_time(t, x))
    return mean + jnp.sqrt(2 * step) * z, mean


PREDICTORS = {
    "none": no_predictor,
    "euler_maruyama": euler_maruyama,
    "reverse_diffusion": reverse_diffusion,
    "ancestral_sampling": ancestral_sampling,
}
CORRECTORS = {"none": None, "langevin": langevin, "ald": annealed_langevin}


def denoise(sde: SDE, score_fn: ScoreFn, x: Array, t: ArrayLike) -> Array:
    """E[x_0 | x_t = x], by `sde.denoise`."""
    return sde.denoise(x, t, score_fn(x, fill_time(t, x)))


def pc_sample(
    sde: SDE,
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
    probability_flow: bool = False,
    noise_removal: bool = True,
    constrain: Constraint | None = None,
) -> tuple[Array, int]:
    """Predictor-corrector sampling (arXiv 2011.13456, alg. 1) on `sde.time_grid` from T to eps.

    Args:
      sde, score_fn: the reverse SDE.
      key: for all noise.
      shape: of the samples, (N, H, W, C).
      predictor, corrector: names in PREDICTORS and CORRECTORS.
      num_steps: evaluations by the predictor and the final denoising, at least 2.
      eps: where the reverse process stops.
      snr: Langevin's signal-to-noise ratio.
      n_steps_each: corrector steps for each predictor step.
      probability_flow: the predictor steps along the ODE, without noise.
      noise_removal: end with `denoise` at eps.
      constrain: (key, x, t) → x, applied after every step: what is known of x_t is put in.

    Returns:
      (x (N, H, W, C) in the model's range, number of score evaluations for each sample).
    """
    predict, correct = PREDICTORS[predictor], CORRECTORS[corrector]
    times = sde.time_grid(eps, num_steps)

    def known(key: Array, x: Array, t: Array) -> Array:
        return x if constrain is None else constrain(jax.random.fold_in(key, 1), x, t)

    def body(i: Array, x: Array) -> Array:
        keys = jax.random.split(jax.random.fold_in(key, i + 1), n_steps_each + 1)
        t, t_next = times[i], times[i + 1]
        if correct is not None:
            for corrector_key in keys[1:]:
                z = jax.random.normal(corrector_key, shape)
                x, _ = correct(sde, score_fn, x, t, t_next, snr, z)
                x = known(corrector_key, x, t)
        z = jax.random.normal(keys[0], shape)
        x, _ = predict(sde, score_fn, x, t, t_next, z, probability_flow)
        return known(keys[0], x, t_next)

    x = sde.prior_std() * jax.random.normal(jax.random.fold_in(key, 0), shape)
    x = jax.lax.fori_loop(0, num_steps - 1, body, x)
    each = (predictor != "none") + (0 if correct is None else n_steps_each)
    nfe = (num_steps - 1) * each
    if noise_removal:
        return denoise(sde, score_fn, x, eps), nfe + 1
    return x, nfe


def noise_ratio_grid(sde: SDE, eps: float, num_steps: int, rho: float = 7.0) -> Array:
    """Times at which σ/α falls from T to eps as EDM's grid does (arXiv 2206.00364, eq. 5)."""
    start, stop = (jnp.exp(0.5 * sde.gamma(t) / rho) for t in (sde.T, eps))
    ratios = jnp.linspace(start, stop, num_steps + 1) ** rho
    times = sde.inverse_gamma(2 * jnp.log(ratios))
    return times.at[0].set(sde.T).at[-1].set(eps)


def heun_sample(
    sde: SDE,
    score_fn: ScoreFn,
    x: Array,
    *,
    num_steps: int,
    eps: float,
    noise_removal: bool = True,
) -> tuple[Array, int]:
    """Heun's second-order method on the probability-flow ODE (arXiv 2206.00364, alg. 1).

    For every SDE, with y = x/α and r = σ/α the ODE is dy/dr = (y - E[x_0 | x])/r.

    Args:
      sde, score_fn: the ODE.
      x: latents at T, (N, ...).
      num_steps: steps of two score evaluations each.
      eps: where it stops.
      noise_removal: end with `denoise` at eps.

    Returns:
      (x at eps or denoised, number of score evaluations).
    """
    times = noise_ratio_grid(sde, eps, num_steps)
    ratios, alphas = jnp.exp(0.5 * sde.gamma(times)), sde.mean_coeff(times)

    def slope(y: Array, i: Array) -> Array:
        return (y - denoise(sde, score_fn, y * alphas[i], times[i])) / ratios[i]

    def body(i: Array, y: Array) -> Array:
        dr = ratios[i + 1] - ratios[i]
        first = slope(y, i)
        return y + 0.5 * dr * (first + slope(y + dr * first, i + 1))

    x = alphas[-1] * jax.lax.fori_loop(0, num_steps, body, x / alphas[0])
    if noise_removal:
        return denoise(sde, score_fn, x, eps), 2 * num_steps + 1
    return x, 2 * num_steps


def dpm_solver_sample(
    sde: SDE,
    score_fn: ScoreFn,
    x: Array,
    *,
    num_steps: int,
    eps: float,
    noise_removal: bool = True,
) -> tuple[Array, int]:
    """DPM-Solver++ (2M), a second-order multistep method (arXiv 2211.01095, alg. 2).

    Arguments and results as of `heun_sample`, but a step takes one score evaluation.
    """
    times = noise_ratio_grid(sde, eps, num_steps)
    alphas, stds, lambdas = sde.mean_coeff(times), sde.std(times), -0.5 * sde.gamma(times)

    def body(i: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        x, previous = state
        h = lambdas[i + 1] - lambdas[i]
        x0 = denoise(sde, score_fn, x, times[i])
        # The first step has nothing to extrapolate from; its own r would be infinite.
        before = lambdas[i] - lambdas[jnp.maximum(i - 1, 0)]
        weight = jnp.where(i == 0, 0.0, h / jnp.where(i == 0, 1.0, 2 * before))
        data = x0 + weight * (x0 - previous)
        return stds[i + 1] / stds[i] * x - alphas[i + 1] * jnp.expm1(-h) * data, x0

    x, _ = jax.lax.fori_loop(0, num_steps, body, (x, jnp.zeros_like(x)))
    if noise_removal:
        return denoise(sde, score_fn, x, eps), num_steps + 1
    return x, num_steps


def solve_ode(
    vector_field: Callable[[Any, Any, Any], Any],
    y0: Any,
    t0: ArrayLike,
    t1: ArrayLike,
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


def probability_flow(sde: SDE, score_fn: ScoreFn) -> Callable[[Any, Array, Any], Array]:
    """dx/dt = f x - ½ g² s(x, t), the ODE with the SDE's marginals, as a vector field (t, x, _)."""

    def drift(t: Array, x: Array, args: Any = None) -> Array:
        del args
        score = score_fn(x, fill_time(t, x))
        return sde.drift_coeff(t) * x - 0.5 * sde.diffusion(t) ** 2 * score

    return drift


def on_clock(
    sde: SDE, vector_field: Callable[[Any, Any, Any], Any]
) -> Callable[[Any, Any, Any], Any]:
    """A vector field (t, y, args) → dy/dt as (c, y, args) → dy/dc, with c = `sde.clock(t)`.

    On t itself an adaptive solver steps over all that RVE does, between 1e-5 and 1e-3.
    """

    def field(c: Array, y: Any, args: Any) -> Any:
        t, rate = jax.jvp(sde.inverse_clock, (c,), (jnp.ones_like(c),))
        return jax.tree.map(lambda slope: rate * slope, vector_field(t, y, args))

    return field


def ode_sample(
    sde: SDE,
    score_fn: ScoreFn,
    z: Array,
    *,
    eps: float,
    rtol: float,
    atol: float,
    noise_removal: bool = True,
) -> tuple[Array, Array]:
    """Samples by the probability-flow ODE from the latents `z` at T: (x, score evaluations)."""
    field = on_clock(sde, probability_flow(sde, score_fn))
    x, nfe = solve_ode(field, z, sde.clock(sde.T), sde.clock(eps), rtol, atol)
    if noise_removal:
        return denoise(sde, score_fn, x, eps), nfe + 1
    return x, nfe


def slerp(a: Array, b: Array, share: ArrayLike) -> Array:
    """Spherical interpolation of latents: a at share 0, b at 1, between them along a great circle.

    Latents of D dimensions lie close to a sphere of radius √D times the prior's deviation. What is
    between two of them does so too; the middle of a straight line would be too near the centre.

    Args:
      a, b: (N, ...), rows that are not opposite.
      share: scalar or (N,).
    """
    dot = lambda u, v: jnp.sum(u * v, axis=tuple(range(1, u.ndim)))  # noqa: E731
    angle = jnp.arccos(jnp.clip(dot(a, b) / jnp.sqrt(dot(a, a) * dot(b, b)), -1, 1))

    def weight(share: Array) -> Array:
        # sin(share·angle)/sin(angle), which is `share` where the rows are parallel.
        return share * jnp.sinc(share * angle / jnp.pi) / jnp.sinc(angle / jnp.pi)

    share = jnp.asarray(share)
    return expand(weight(1 - share), a) * a + expand(weight(share), b) * b


# A method: (config, sde, score_fn, key, shape (N, H, W, C)) → (x, score evaluations).
SamplerFn = Callable[[ConfigDict, SDE, ScoreFn, Array, tuple[int, ...]], tuple[Array, ArrayLike]]


def _along_the_ode(solve: Callable[..., tuple[Array, ArrayLike]], *options: str) -> SamplerFn:
    """A method that starts from latents, and takes some of `config.sampling`'s fields."""

    def sample(
        config: ConfigDict, sde: SDE, score_fn: ScoreFn, key: Array, shape: tuple[int, ...]
    ) -> tuple[Array, ArrayLike]:
        z = sde.prior_std() * jax.random.normal(key, shape)
        given = {name: config.sampling[name] for name in ("noise_removal", *options)}
        return solve(sde, score_fn, z, eps=config.sampling.truncation_time, **given)

    return sample


SAMPLERS: dict[str, SamplerFn] = {
    "pc": lambda config, sde, score_fn, key, shape: pc_sample(
        sde, score_fn, key, shape, **pc_options(config)
    ),
    "ode": _along_the_ode(ode_sample, "rtol", "atol"),
    "heun": _along_the_ode(heun_sample, "num_steps"),
    "dpm_solver": _along_the_ode(dpm_solver_sample, "num_steps"),
}


def get_sampling_fn(
    config: ConfigDict, sde: SDE, make_score_fn: MakeScoreFn, batch_size: int
) -> Callable[[Any, Array], tuple[Array, Array]]:
    """The sampler that `config.sampling` names, compiled: (params, key) → (x, nfe).

    x is (batch_size, H, W, C) in the model's range.
    """
    shape = (batch_size, config.data.image_size, config.data.image_size, config.data.num_channels)

    def sample(params: Any, key: Array) -> tuple[Array, ArrayLike]:
        return SAMPLERS[config.sampling.method](config, sde, make_score_fn(params), key, shape)

    return jax.jit(lambda params, key: jax.tree.map(jnp.asarray, sample(params, key)))


def pc_options(config: ConfigDict) -> dict[str, Any]:
    """The arguments of `pc_sample` that a config names."""
    sampling = config.sampling
    return {
        "predictor": sampling.predictor,
        "corrector": sampling.corrector,
        "num_steps": config.model.num_scales,
        "eps": sampling.truncation_time,
        "snr": sampling.snr,
        "n_steps_each": sampling.n_steps_each,
        "probability_flow": sampling.probability_flow,
        "noise_removal": sampling.noise_removal,
    }
