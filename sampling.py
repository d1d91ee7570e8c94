"""Samplers: predictor-corrector (arXiv 2011.13456, §4), and three solvers of the ODE.

A predictor or a corrector is a pure function of a step, the state and the noise. A sampler is a
compiled function of (params, key, labels). If each sample has its own key, it does not depend on
the samples that are drawn together with it (docs/samplers.md names the exceptions).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from sde_lib import SDE, expand, one_minus_exp

ScoreFn = Callable[[Array, Array], Array]  # x (N, ...), t (N,) → ∇ log p_t(x)
MakeScoreFn = Callable[..., ScoreFn]  # (parameters, labels=None, guidance=0.0) → score function
Constraint = Callable[[Array, Array, Array], Array]  # (key, x, t) → x with its known part replaced


def fill_time(t: ArrayLike, x: Array) -> Array:
    """The time t for each row of x, (N,) float32."""
    return jnp.full(x.shape[:1], t, jnp.float32)


def make_score(
    make_score_fn: MakeScoreFn, params: Any, labels: Array | None, guidance: float = 0.0
) -> ScoreFn:
    """The score function. If `labels` is None, `make_score_fn` may take `params` alone."""
    return make_score_fn(params) if labels is None else make_score_fn(params, labels, guidance)


def sample_keys(key: Array, start: ArrayLike, count: int) -> Array:
    """The keys (count,) of the samples with the indices start … start + count - 1."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, start + jnp.arange(count))


def _keys(key: Array, count: int, *numbers: ArrayLike) -> Array:
    """A key for each of `count` samples, from one key or `count` keys; `numbers` are folded in."""
    if not jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    keys = key if key.ndim else sample_keys(key, 0, count)
    for number in numbers:
        keys = jax.vmap(jax.random.fold_in, (0, None))(keys, number)
    return keys


def normal(key: Array, shape: tuple[int, ...], *numbers: ArrayLike) -> Array:
    """Standard normal noise of `shape`, (N, …).

    With keys (N,), each row has its own key; with a single key, all rows come from it. `numbers`,
    such as that of a step, are folded into the keys.
    """
    keys = _keys(key, shape[0], *numbers)
    return jax.vmap(lambda one: jax.random.normal(one, shape[1:]))(keys)


@dataclasses.dataclass(frozen=True)
class Step:
    """A step of a sampler, from t to t_next < t, both scalars."""

    sde: SDE
    score_fn: ScoreFn
    t: Array
    t_next: Array

    def score(self, x: Array) -> Array:
        """The score of x (N, ...) at t."""
        return self.score_fn(x, fill_time(self.t, x))

    def transition(self) -> tuple[Array, Array]:
        """(a, b) of the forward step x_t = a x_(t_next) + b z."""
        return self.sde.transition(self.t_next, self.t)


# A predictor or a corrector: (step, x (N, ...), noise of x's shape) → (x, its mean).
StepFn = Callable[[Step, Array, Array], tuple[Array, Array]]


def euler_maruyama(probability_flow: bool = False) -> StepFn:
    """Euler-Maruyama on the reverse SDE, or Euler on the probability-flow ODE."""

    def predict(step: Step, x: Array, z: Array) -> tuple[Array, Array]:
        dt = step.t - step.t_next
        f, g, score = step.sde.drift_coeff(step.t), step.sde.diffusion(step.t), step.score(x)
        if probability_flow:
            x = x - (f * x - 0.5 * g**2 * score) * dt
            return x, x
        mean = x - (f * x - g**2 * score) * dt
        return mean + g * jnp.sqrt(dt) * z, mean

    return predict


def reverse_diffusion(probability_flow: bool = False) -> StepFn:
    """The reverse of the forward chain x ← a x + b z (arXiv 2011.13456, eq. 46), or of its ODE."""

    def predict(step: Step, x: Array, z: Array) -> tuple[Array, Array]:
        (a, b), score = step.transition(), step.score(x)
        if probability_flow:
            x = (2 - a) * x + 0.5 * b**2 * score
            return x, x
        mean = (2 - a) * x + b**2 * score
        return mean + b * z, mean

    return predict


def ancestral_sampling() -> StepFn:
    """A sample of p(x_s | x_t, x_0 = E[x_0 | x_t]) for s = t_next.

    This posterior of the forward chain is exact for every linear SDE (arXiv 2006.11239, eq. 7;
    arXiv 2011.13456, eq. 47 for VE).
    """

    def predict(step: Step, x: Array, z: Array) -> tuple[Array, Array]:
        sde, (a, b) = step.sde, step.transition()
        mean = (x + b**2 * step.score(x)) / a
        return mean + b * sde.std(step.t_next) / sde.std(step.t) * z, mean

    return predict


def langevin(snr: float) -> StepFn:
    """Langevin dynamics at t (arXiv 2011.13456, alg. 5).

    The step size is 2 a² (snr ‖z‖/‖score‖)², with norms averaged over the batch and the factor a of
    the forward transition from t_next to t.
    """

    def norm(v: Array) -> Array:
        return jnp.mean(jnp.linalg.norm(v.reshape(len(v), -1), axis=-1))

    def correct(step: Step, x: Array, z: Array) -> tuple[Array, Array]:
        (a, _), score = step.transition(), step.score(x)
        size = 2 * a**2 * (snr * norm(z) / norm(score)) ** 2
        mean = x + size * score
        return mean + jnp.sqrt(2 * size) * z, mean

    return correct


def annealed_langevin(snr: float) -> StepFn:
    """Annealed Langevin dynamics (arXiv 1907.05600, alg. 1), with the step size 2 a² (snr σ)²."""

    def correct(step: Step, x: Array, z: Array) -> tuple[Array, Array]:
        a, _ = step.transition()
        size = 2 * a**2 * (snr * step.sde.std(step.t)) ** 2
        mean = x + size * step.score(x)
        return mean + jnp.sqrt(2 * size) * z, mean

    return correct


# What `sampling.predictor` and `sampling.corrector` can name: functions whose parameters are fields
# of `config.sampling`, and which return a `StepFn`. None: x is unchanged.
PREDICTORS: dict[str, Callable[..., StepFn] | None] = {
    "none": None,
    "euler_maruyama": euler_maruyama,
    "reverse_diffusion": reverse_diffusion,
    "ancestral_sampling": ancestral_sampling,
}
CORRECTORS: dict[str, Callable[..., StepFn] | None] = {
    "none": None,
    "langevin": langevin,
    "ald": annealed_langevin,
}


def denoise(sde: SDE, score_fn: ScoreFn, x: Array, t: ArrayLike) -> Array:
    """E[x_0 | x_t = x], by `sde.denoise`."""
    return sde.denoise(x, t, score_fn(x, fill_time(t, x)))


def pc_sample(
    sde: SDE,
    score_fn: ScoreFn,
    key: Array,
    shape: tuple[int, ...],
    *,
    predictor: StepFn | None,
    corrector: StepFn | None,
    num_steps: int,
    eps: float,
    n_steps_each: int = 1,
    noise_removal: bool = True,
    constrain: Constraint | None = None,
) -> tuple[Array, int]:
    """Predictor-corrector sampling (arXiv 2011.13456, alg. 1) on `sde.time_grid` from T to eps.

    Args:
      sde, score_fn: the reverse SDE.
      key: the key of all noise; or keys (N,), one for the noise of each sample.
      shape: the shape of the samples, (N, H, W, C).
      predictor, corrector: the functions of a step; None: none.
      num_steps: number of times, at least 2: predictor steps, plus one for the final denoising.
      eps: the last time.
      n_steps_each: number of corrector steps for each predictor step.
      noise_removal: whether to end with `denoise` at eps.
      constrain: (keys (N,), x, t) → x, applied after every step to replace the known part of x_t.

    Returns:
      (x (N, H, W, C) in the model's range, number of score evaluations per sample).
    """
    times, key = sde.time_grid(eps, num_steps), _keys(key, shape[0])

    def known(number: Array, x: Array, t: Array) -> Array:
        return x if constrain is None else constrain(_keys(key, shape[0], number, 1), x, t)

    def body(i: Array, x: Array) -> Array:
        step = Step(sde, score_fn, times[i], times[i + 1])
        number = 1 + i * (n_steps_each + 1)
        if corrector:
            for _ in range(n_steps_each):
                x, _ = corrector(step, x, normal(key, shape, number))
                x = known(number, x, step.t)
                number = number + 1
        if predictor:
            x, _ = predictor(step, x, normal(key, shape, number))
        return known(number, x, step.t_next)

    x = sde.prior_std() * normal(key, shape, 0)
    x = jax.lax.fori_loop(0, num_steps - 1, body, x)
    each = bool(predictor) + (n_steps_each if corrector else 0)
    nfe = (num_steps - 1) * each
    if noise_removal:
        return denoise(sde, score_fn, x, eps), nfe + 1
    return x, nfe


def noise_ratio_grid(sde: SDE, eps: float, num_steps: int, rho: float = 7.0) -> Array:
    """Times (num_steps + 1,) from T to eps whose σ/α is EDM's grid (arXiv 2206.00364, eq. 5)."""
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

    With y = x/α and r = σ/α the ODE of every SDE is dy/dr = (y - E[x_0 | x])/r.

    Args:
      sde, score_fn: the ODE.
      x: latents at T, (N, ...).
      num_steps: number of steps, with two score evaluations each.
      eps: the last time.
      noise_removal: whether to end with `denoise` at eps.

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

    Arguments and results are those of `heun_sample`, but a step takes one score evaluation.
    """
    times = noise_ratio_grid(sde, eps, num_steps)
    alphas, stds, lambdas = sde.mean_coeff(times), sde.std(times), -0.5 * sde.gamma(times)

    def body(i: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        x, previous = state
        h = lambdas[i + 1] - lambdas[i]
        x0 = denoise(sde, score_fn, x, times[i])
        # The first step has no previous one to extrapolate from, and its r would be infinite.
        before = lambdas[i] - lambdas[jnp.maximum(i - 1, 0)]
        weight = jnp.where(i == 0, 0.0, h / jnp.where(i == 0, 1.0, 2 * before))
        data = x0 + weight * (x0 - previous)
        return stds[i + 1] / stds[i] * x + alphas[i + 1] * one_minus_exp(h) * data, x0

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
    """Solve an ODE by Dormand-Prince 5(4) with adaptive steps, entirely on the device.

    Each row has its own steps, which depend on the root mean square of its errors, so a row does
    not depend on the others. The vector field is evaluated for all rows until the last one is done.

    Args:
      vector_field: (t (N,), y, args) → dy/dt, where y has rows (N, ...) in each leaf.
      y0: state at t0, a pytree of (N, ...).
      t0, t1: start and end time, in either order.
      rtol, atol: tolerances.

    Returns:
      (y at t1, number of evaluations of the vector field for each row, (N,)). If the solver fails
      for a row, y is NaN there.
    """
    import diffrax  # takes half a second

    def field_of_row(t: Any, y: Any, args: Any) -> Any:
        times, rows = jax.lax.all_gather((t, y), "rows")
        slopes = vector_field(times, rows, args)
        return jax.tree.map(lambda slope: slope[jax.lax.axis_index("rows")], slopes)

    def solve_row(y0: Any) -> tuple[Any, Array]:
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(field_of_row),
            diffrax.Dopri5(),
            t0,
            t1,
            None,
            y0,
            # A field that is not finite would shrink the step forever; dtmin stops the solver then.
            stepsize_controller=diffrax.PIDController(
                rtol=rtol, atol=atol, dtmin=1e-10, force_dtmin=False
            ),
            max_steps=100_000,
            throw=False,
        )
        failed = solution.result != diffrax.RESULTS.successful
        y1 = jax.tree.map(lambda y: jnp.where(failed, jnp.nan, y[-1]), solution.ys)
        # Six evaluations per step (the first stage is the last of the previous step), and two to
        # choose the first step size.
        return y1, 6 * solution.stats["num_steps"] + 2

    return jax.vmap(solve_row, axis_name="rows")(y0)


def probability_flow(sde: SDE, score_fn: ScoreFn) -> Callable[[Any, Array, Any], Array]:
    """dx/dt = f x - ½ g² s(x, t), the ODE with the SDE's marginals, as a vector field (t, x, _).

    t is a scalar or (N,).
    """

    def drift(t: Array, x: Array, args: Any = None) -> Array:
        del args
        f, g = expand(sde.drift_coeff(t), x), expand(sde.diffusion(t), x)
        return f * x - 0.5 * g**2 * score_fn(x, fill_time(t, x))

    return drift


def in_solver_time(
    sde: SDE, vector_field: Callable[[Any, Any, Any], Any]
) -> Callable[[Any, Any, Any], Any]:
    """Convert a vector field (t, y, args) → dy/dt to (c, y, args) → dy/dc for c = solver_time(t).

    In t itself, an adaptive solver would step over [1e-5, 1e-3], where RVE changes most.
    """

    def field(c: Array, y: Any, args: Any) -> Any:
        t, rate = jax.jvp(sde.time_of_solver, (c,), (jnp.ones_like(c),))
        return jax.tree.map(lambda slope: expand(rate, slope) * slope, vector_field(t, y, args))

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
    """Samples by the probability-flow ODE from latents `z` at T: (x, evaluations (N,))."""
    field = in_solver_time(sde, probability_flow(sde, score_fn))
    x, each = solve_ode(field, z, sde.solver_time(sde.T), sde.solver_time(eps), rtol, atol)
    nfe = jnp.max(each)
    if noise_removal:
        return denoise(sde, score_fn, x, eps), nfe + 1
    return x, nfe


def slerp(a: Array, b: Array, share: ArrayLike) -> Array:
    """Spherical interpolation of latents, from a at share 0 to b at share 1.

    Latents of D dimensions lie close to a sphere whose radius is √D times the prior's standard
    deviation. So do the points of a great circle, but not the middle of a straight line.

    Args:
      a, b: (N, ...); their rows must not be opposite to each other.
      share: scalar or (N,).
    """

    def dot(u: Any, v: Any) -> Any:
        return jnp.sum(u * v, axis=tuple(range(1, u.ndim)))

    angle = jnp.arccos(jnp.clip(dot(a, b) / jnp.sqrt(dot(a, a) * dot(b, b)), -1, 1))

    def weight(share: Array) -> Array:
        # sin(share·angle)/sin(angle), whose limit for parallel rows is `share`.
        return share * jnp.sinc(share * angle / jnp.pi) / jnp.sinc(angle / jnp.pi)

    share = jnp.asarray(share)
    return expand(weight(1 - share), a) * a + expand(weight(share), b) * b


# A sampling method: (sde, score_fn, key or keys (N,), shape (N, H, W, C)) → (x, number of score
# evaluations).
SamplerFn = Callable[[SDE, ScoreFn, Array, tuple[int, ...]], tuple[Array, ArrayLike]]


def pc(
    predictor: StepFn | None,
    corrector: StepFn | None,
    num_scales: int,
    truncation_time: float,
    n_steps_each: int,
    noise_removal: bool,
) -> Callable[..., tuple[Array, int]]:
    """`pc_sample` as a sampling method, which also takes `constrain`."""
    return functools.partial(
        pc_sample,
        predictor=predictor,
        corrector=corrector,
        num_steps=num_scales,
        eps=truncation_time,
        n_steps_each=n_steps_each,
        noise_removal=noise_removal,
    )


def _along_the_ode(solve: Callable[..., tuple[Array, ArrayLike]], **options: Any) -> SamplerFn:
    """A sampling method from a solver of the ODE that starts at latents."""

    def sample(
        sde: SDE, score_fn: ScoreFn, key: Array, shape: tuple[int, ...]
    ) -> tuple[Array, ArrayLike]:
        return solve(sde, score_fn, sde.prior_std() * normal(key, shape), **options)

    return sample


def _adaptive(truncation_time: float, rtol: float, atol: float, noise_removal: bool) -> SamplerFn:
    options = {"rtol": rtol, "atol": atol, "noise_removal": noise_removal}
    return _along_the_ode(ode_sample, eps=truncation_time, **options)


def _in_steps(
    solve: Callable[..., Any], truncation_time: float, num_steps: int, noise_removal: bool
) -> SamplerFn:
    options = {"num_steps": num_steps, "noise_removal": noise_removal}
    return _along_the_ode(solve, eps=truncation_time, **options)


# What `sampling.method` can name: functions whose parameters are fields of `config.sampling` and
# `config.model`, with a `StepFn` or None for `predictor` and `corrector`; they return a sampling
# method.
SAMPLERS: dict[str, Callable[..., SamplerFn]] = {
    "pc": pc,
    "ode": _adaptive,
    "heun": functools.partial(_in_steps, heun_sample),
    "dpm_solver": functools.partial(_in_steps, dpm_solver_sample),
}


class Chain:
    """Keeps the states of a sampler at noise levels that are evenly spaced in log σ²/α².

    A state is x_t/√(α² + σ²), which is about as large as an image for every SDE. For each sample,
    the points at which the sampler evaluates the score are kept that are nearest to the levels.

    Attributes:
      states: (count, N, H, W, C) float32, from T to eps; set by the sampler.
    """

    def __init__(self, sde: SDE, eps: float, count: int) -> None:
        """`count` levels from T to eps."""
        first, last = (float(sde.gamma(jnp.asarray(t, jnp.float32))) for t in (sde.T, eps))
        self._levels = np.linspace(first, last, count)[:, None]
        self._off = self.states = np.zeros(0, np.float32)

    def watch(self, sampler: SamplerFn) -> SamplerFn:
        """The sampling method, whose states are kept when it runs."""

        def sample(
            sde: SDE, score_fn: ScoreFn, key: Array, shape: tuple[int, ...]
        ) -> tuple[Array, ArrayLike]:
            def told(x: Array, t: Array) -> Array:
                size = jnp.hypot(sde.mean_coeff(t), sde.std(t))
                jax.debug.callback(self._note, x / expand(size, x), sde.gamma(t))
                return score_fn(x, t)

            return sampler(sde, told, key, shape)

        return sample

    def _note(self, x: ArrayLike, gamma: ArrayLike) -> None:
        states, off = np.asarray(x), np.abs(np.asarray(gamma) - self._levels)
        if not len(self.states):
            self._off = np.full_like(off, np.inf)
            self.states = np.zeros((len(off), *states.shape), np.float32)
        for level, nearer in enumerate(off < self._off):
            self.states[level, nearer] = states[nearer]
        self._off = np.minimum(off, self._off)


def get_sampling_fn(
    sampler: SamplerFn,
    sde: SDE,
    make_score_fn: MakeScoreFn,
    shape: tuple[int, ...],
    guidance: float = 0.0,
) -> Callable[..., tuple[Array, Array]]:
    """The compiled function of a sampling method, (params, key, labels=None) → (x, nfe).

    `key` is a single key, or keys (N,), one for each sample; `labels` are (N,). x has the given
    `shape`, (N, H, W, C), and is in the model's range.
    """

    def sample(params: Any, key: Array, labels: Array | None = None) -> tuple[Array, Array]:
        score_fn = make_score(make_score_fn, params, labels, guidance)
        x, nfe = sampler(sde, score_fn, key, shape)
        return jnp.asarray(x), jnp.asarray(nfe)

    return jax.jit(sample)
