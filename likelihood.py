"""Bits/dim: NLL by the probability-flow ODE, and the variational bound NELBO.

Both are computed with and without the residual, the reconstruction term of the truncation at ε:

    -log p(x_0) ≤ E[-log p_ε(x_ε)] + E[log p_0ε(x_ε | x_0) - log p(x_0 | x_ε)],

with x_ε ~ p_0ε(· | x_0); `losses.reconstruction_loss` computes the residual. With it, the value is
an upper bound on -log p(x_0). Without it, the NLL is that of x_0 taken as x_ε (as is common), and
the NELBO is that of x_ε. For data without dequantisation (`lossless`) there is a NELBO with a
decoder of the levels.

Truncated-normal dequantisation (arXiv 2305.03935) bounds the probability of the levels without a
decoder: x_ε = α x_0 + σ z with normal z, truncated to the cell of x_0, |z| ≤ r = α Δ/(2 σ), for
levels that are Δ apart. The cells are disjoint, so for the density q of this x_ε

    -log P(x_0) = -log ∫_cell p_ε ≤ E_q[log q(x_ε) - log p_ε(x_ε)].

If r ≥ 3 and the network was trained on data without dequantisation, q is close to its training
distribution.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from ml_collections import ConfigDict

import losses
from configs.data import data_spec
from data.pixels import Preprocessing, get_preprocessing
from sampling import (
    MakeScoreFn,
    ScoreFn,
    fill_time,
    in_solver_time,
    make_score,
    probability_flow,
    solve_ode,
)
from sde_lib import SDE, expand


def ode_log_likelihood(
    sde: SDE,
    score_fn: ScoreFn,
    x: Array,
    probe: Array,
    *,
    eps: float,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    num_steps: int = 0,
) -> tuple[Array, Array, Array]:
    """log p_ε(x) by the instantaneous change of variables (arXiv 2011.13456, eq. 39).

    Args:
      sde, score_fn: the probability-flow ODE.
      x: data at ε, (N, ...).
      probe: Hutchinson's probe for the divergence, of x's shape, with unit covariance.
      eps: the time ε, at which the ODE starts.
      rtol, atol: tolerances of the adaptive solver.
      num_steps: number of steps of `_fixed_steps`, 32 or more; 0: the adaptive solver.

    Returns:
      (log-likelihood in nats (N,), latents at T (N, ...), number of score evaluations (N,)).
    """
    if num_steps:
        latent, divergence = _fixed_steps(sde, score_fn, x, probe, eps, num_steps)
        return sde.prior_logp(latent) + divergence, latent, jnp.full(len(x), num_steps + 1)
    drift = probability_flow(sde, score_fn)

    def vector_field(t: Array, state: tuple[Array, Array], args: Any) -> tuple[Array, Array]:
        dx, tangent = jax.jvp(lambda x: drift(t, x, args), (state[0],), (probe,))
        return dx, losses.sum_image(tangent * probe)

    start, stop = sde.solver_time(eps), sde.solver_time(sde.T)
    (latent, divergence), nfe = solve_ode(
        in_solver_time(sde, vector_field), (x, jnp.zeros(len(x))), start, stop, rtol, atol
    )
    return sde.prior_logp(latent) + divergence, latent, nfe


def _integrals(nodes: np.ndarray, start: float, stop: float) -> np.ndarray:
    """∫ ½ e^{u/2} L_j(u) du from start to stop, for the Lagrange polynomials of `nodes`."""
    roots, weights = np.polynomial.legendre.leggauss(20)
    u = (start + stop) / 2 + (stop - start) / 2 * roots
    values = weights * (stop - start) / 4 * np.exp(u / 2)
    moments = [np.sum(values * u**power) for power in range(len(nodes))]
    return np.linalg.solve(np.vander(nodes, increasing=True).T, moments)


def _adams_weights(h: float, num_steps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights of `_fixed_steps` at each node, (num_steps + 1, …), float64.

    Returns:
      (corrector (…, 4): weights of the slopes at this node and the three before, for the step to
      this node; predictor (…, 3): weights of the slopes at this node and the two before, for the
      step to the next node; quadrature (…): Gregory's rule of fourth order).
    """
    corrector, predictor = np.zeros((num_steps + 1, 4)), np.zeros((num_steps + 1, 3))
    for known in range(1, 5):  # the first steps have fewer previous nodes
        nodes, first = -h * np.arange(known), known - 1
        if known > 1:
            corrector[first:, :known] = _integrals(nodes, -h, 0)
        if known < 4:
            predictor[first:, :known] = _integrals(nodes, 0, h)
    quadrature = np.full(num_steps + 1, h)
    quadrature[:3] *= (3 / 8, 7 / 6, 23 / 24)
    quadrature[-3:] *= (23 / 24, 7 / 6, 3 / 8)
    return corrector, predictor, quadrature


def _fixed_steps(
    sde: SDE, score_fn: ScoreFn, x: Array, probe: Array, eps: float, num_steps: int
) -> tuple[Array, Array]:
    """Latents and ∫ div, by a multistep method with one evaluation per step, uniform in log-SNR.

    With y = x/α, γ = log σ²/α² and the predicted noise ε̂ = -σ s, the ODE of every SDE is
    dy/dγ = ½ e^{γ/2} ε̂. It has no linear term, and ε̂ is as smooth in γ as the denoised image. Each
    step integrates an interpolating polynomial of ε̂ times ½ e^{γ/2} (as DEIS, arXiv 2204.13902):
    first a predictor through three nodes, then a corrector through four, which evaluates ε̂ at the
    predicted point (as UniPC, arXiv 2302.04867). The divergence is integrated over the same nodes
    by a rule of fourth order. log p(x) = log p(y) - D log α.
    """
    with jax.ensure_compile_time_eval():
        start, stop = float(sde.gamma(eps)), float(sde.gamma(sde.T))
    h, dims = (stop - start) / num_steps, int(np.prod(x.shape[1:]))
    gammas = start + h * np.arange(num_steps + 1)
    corrector, predictor, quadrature = _adams_weights(h, num_steps)
    growth = np.exp(gammas / 2)[:, None]
    weights = gammas, growth * corrector, growth * predictor, quadrature
    table = jax.tree.map(lambda a: jnp.asarray(a, x.dtype), weights)

    def node(i: Array, carry: Any) -> Any:
        y, guess, (*before, _), divergence = carry
        gamma, correct, predict, weight = jax.tree.map(lambda a: a[i], table)
        t = jnp.clip(sde.inverse_gamma(gamma), eps, sde.T)
        alpha, std = sde.mean_coeff(t), sde.std(t)
        noise, tangent = jax.jvp(
            lambda y: -std * score_fn(alpha * y, fill_time(t, y)), (guess,), (probe,)
        )
        slopes = (noise, *before)
        y = y + sum(w * slope for w, slope in zip(correct, slopes, strict=True))
        guess = y + sum(w * slope for w, slope in zip(predict, slopes[:3], strict=True))
        local = 0.5 * jnp.exp(gamma / 2) * losses.sum_image(tangent * probe)
        return y, guess, slopes, divergence + weight * local

    y = x / sde.mean_coeff(eps)
    first = y, y, (jnp.zeros_like(y),) * 4, jnp.zeros(len(x))
    y, _, _, divergence = jax.lax.fori_loop(0, num_steps + 1, node, first)
    scale = sde.log_mean_coeff(sde.T) - sde.log_mean_coeff(eps)
    return sde.mean_coeff(sde.T) * y, divergence + dims * scale


def diffusion_term(
    sde: SDE, score_fn: ScoreFn, x0: Array, t: Array, z: Array, inverse_density: Array
) -> Array:
    """An unbiased estimate of the score's term in the bound on -E log p_ε(x_ε), in nats, (N,).

    The integral is ½ ∫_ε^T E[g² (‖s - ∇ log p_0t‖² - ‖∇ log p_0t‖²) - 2 div f] dt (arXiv
    2101.09258, thm. 3). This function estimates its first term from one time for each image, drawn
    with a density whose reciprocal is `inverse_density`; `nelbo_constants` has the other two.
    """
    weight = sde.diffusion(t) ** 2 * inverse_density
    return losses.score_matching_loss(score_fn, sde, x0, t, z, weight)


def nelbo_constants(sde: SDE, eps: float, dims: int) -> Array:
    """-½ ∫ E[g² ‖∇ log p_0t‖² + 2 div f] dt = -D (½ Z_ε + log α(T) - log α(ε)), in nats."""
    drift = sde.log_mean_coeff(sde.T) - sde.log_mean_coeff(eps)
    return -dims * (0.5 * sde.importance_normalizer(eps) + drift)


def _keys_per_image(key: Array, count: int) -> Array:
    """A key for each image: `key` itself if it is (N,), else derived from the single key."""
    if key.ndim:
        return key
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(count))


def _draw(sample: Callable[..., Array], keys: Array, x: Array) -> Array:
    """Noise of x's shape, with one key for each image."""
    return jax.vmap(lambda key: sample(key, x.shape[1:]))(keys)


def mean_and_errors(values: np.ndarray) -> tuple[float, float, float | None]:
    """The mean over images and draws, and its standard errors.

    Args:
      values: (draws, N); a column has the values of one image for all draws.

    Returns:
      (mean; its standard error over images and draws, nan for a single image; the standard error
      over draws alone, for the mean over exactly these images, None for a single draw).
    """
    draws, count = values.shape
    stderr = float("nan")
    if count > 1:
        stderr = float(values.mean(axis=0).std(ddof=1) / np.sqrt(count))
    if draws == 1:
        return float(values.mean()), stderr, None
    of_draws = float(np.sqrt(values.var(axis=0, ddof=1).mean() / (draws * count)))
    return float(values.mean()), stderr, of_draws


def to_bits_per_dim(nats: Array, dims: int, offset: float) -> Array:
    """Convert -log p of scaled, dequantised data to bits/dim of their levels."""
    return nats / (dims * np.log(2)) + offset


def cell_radius(sde: SDE, eps: float, width: float) -> Array:
    """r = α Δ/(2 σ) at ε with Δ = `width`: half a cell in standard deviations of the noise."""
    return 0.5 * width * jnp.exp(-0.5 * sde.gamma(eps))


def largest_eps(sde: SDE, width: float, radius: float = 3.0) -> float | None:
    """The largest ε at which `cell_radius` is `radius`; None if the SDE has no such time."""
    gamma = 2 * np.log(0.5 * width / radius)
    t = float(sde.inverse_gamma(gamma))
    return t if sde.smallest_time < t < sde.T and abs(float(sde.gamma(t)) - gamma) < 0.01 else None


def truncated_normal(key: Array, shape: tuple[int, ...], radius: Array) -> tuple[Array, Array]:
    """Normal noise truncated to |z| ≤ radius, and the sum of its log-density (in z), a scalar."""
    z = jax.random.truncated_normal(key, -radius, radius, shape)
    log_mass = jnp.log1p(-2 * jax.scipy.special.ndtr(-radius))
    log_density = -0.5 * z**2 - 0.5 * np.log(2 * np.pi) - log_mass
    return z, jnp.sum(log_density)


def _draw_in_cells(
    sde: SDE, eps: float, width: float, keys: Array, x: Array
) -> tuple[Array, Array]:
    """x_ε (N, ...) in the cells of scaled levels x, and log q(x_ε) in nats, (N,)."""
    # Beyond 5 nothing is cut off, and in float32 some draws would be -r exactly.
    radius = jnp.minimum(cell_radius(sde, eps, width), 5.0)
    dims = int(np.prod(x.shape[1:]))
    z, log_density = jax.vmap(lambda key: truncated_normal(key, x.shape[1:], radius))(keys)
    return losses.perturb(sde, x, fill_time(eps, x), z), log_density - dims * jnp.log(sde.std(eps))


def importance_weighted(bits: np.ndarray, dims: int) -> np.ndarray:
    """The bound of several draws, -log mean 2^(-D bits)/D, which is tighter than their mean.

    Args:
      bits: bits/dim of one draw each, (draws, N).
      dims: D, the number of dimensions.

    Returns:
      (N,) bits/dim. The draws must be exact: noise in them, such as that of an estimated trace,
      makes the result too small.
    """
    nats = -np.asarray(bits, np.float64) * dims * np.log(2)
    top = nats.max(axis=0)
    return -(top + np.log(np.mean(np.exp(nats - top), axis=0))) / (dims * np.log(2))


def nelbo_of_x_eps(
    sde: SDE, score_fn: ScoreFn, x_eps: Array, eps: float, u: Array, z: Array
) -> Array:
    """An estimate of the bound's integral for -log p_ε(x_ε), with the diffusion starting at x_ε.

    With x_t = a x_ε + b z (`sde.transition`), the bound of arXiv 2101.09258, thm. 3, on p_ε is

        E[-log p_T(x_T)] + ½ ∫ E[σ² ‖s + z/b‖² - σ² ‖z/b‖²] dγ - D (log α(T) - log α(ε)).

    Near ε both squares diverge, but their difference, σ² ‖s‖² + 2 σ² s·z/b, does not. Adding
    ‖z‖² - D does not change its mean; where b is near σ, the sum is ‖σ s + z‖² - D, as in the usual
    estimate. Times are drawn as γ = γ(ε) + Z_ε u², since 1/b ~ (γ - γ(ε))^-½.

    Args:
      sde, score_fn: the model.
      x_eps: (N, ...).
      eps: the time of x_ε.
      u: uniforms in [0, 1], (N,).
      z: normal noise, of x_eps's shape.

    Returns:
      One draw of the integral (without the first and the last term), in nats, (N,).
    """
    span = sde.importance_normalizer(eps)
    t = jnp.clip(sde.inverse_gamma(sde.gamma(eps) + span * u**2), eps, sde.T)
    a, b = (expand(c, x_eps) for c in sde.transition(eps, t))
    b = jnp.maximum(b, 1e-3 * sde.std(eps))  # not 0 at u = 0, which has no weight
    scaled = expand(sde.std(t), x_eps) * score_fn(a * x_eps + b * z, t)
    product = 2 * expand(sde.std(t), x_eps) / b * scaled * z
    dims = int(np.prod(x_eps.shape[1:]))
    value = losses.sum_image(scaled**2 + product + z**2) - dims
    return 0.5 * 2 * span * u * value


def make_nll_fn(
    sde: SDE,
    make_score_fn: MakeScoreFn,
    preprocessing: Preprocessing,
    eps: float,
    *,
    num_steps: int = 0,
    rtol: float = 1e-5,
    atol: float = 1e-5,
) -> Callable[..., dict[str, Array]]:
    """A compiled function that computes the NLL of a batch.

    Args:
      sde, make_score_fn: the model.
      preprocessing: the preprocessing of the data, for their units.
      eps: the time ε.
      num_steps, rtol, atol: as in `ode_log_likelihood`.

    Returns:
      nll_fn(params, key, x, labels=None), with a single key or keys (N,), dequantised and scaled x
      (N, H, W, C), and the images' labels (N,) if the network is told labels →
        `nll`: bits/dim with the residual, (N,);
        `nll_without_residual`: bits/dim without it, (N,);
        `nfe`: score evaluations of one solve, (N,);
        `latent`: latents of the solve for `nll`, (N, H, W, C).
      With `truncated_normal=True`, x is `Preprocessing.to_x0_without_noise`, and the result is
        `nll_truncated_normal`: bits/dim of the levels, for one draw of the noise, (N,).
      The noise is drawn, unless it is given as `probe`, `z_eps` and `z_residual`, of x's shape.
    """
    solver: dict[str, Any] = {"num_steps": num_steps, "rtol": rtol, "atol": atol}
    offset, width = preprocessing.bits_offset, preprocessing.cell_width

    def nll_fn(
        params: Any,
        key: Array,
        x: Array,
        labels: Array | None = None,
        probe: Array | None = None,
        z_eps: Array | None = None,
        z_residual: Array | None = None,
        truncated_normal: bool = False,
    ) -> dict[str, Array]:
        score_fn, dims = make_score(make_score_fn, params, labels), int(np.prod(x.shape[1:]))
        split = jax.vmap(lambda key: jax.random.split(key, 3), out_axes=1)
        probe_keys, eps_keys, residual_keys = split(_keys_per_image(key, len(x)))
        rademacher = functools.partial(jax.random.rademacher, dtype=x.dtype)
        probe = _draw(rademacher, probe_keys, x) if probe is None else probe
        if truncated_normal:
            x_eps, log_q = _draw_in_cells(sde, eps, width, eps_keys, x)
            logp, _, _ = ode_log_likelihood(sde, score_fn, x_eps, probe, eps=eps, **solver)
            return {"nll_truncated_normal": to_bits_per_dim(log_q - logp, dims, 0.0)}
        z_eps = _draw(jax.random.normal, eps_keys, x) if z_eps is None else z_eps
        if z_residual is None:
            z_residual = _draw(jax.random.normal, residual_keys, x)
        x_eps = losses.perturb(sde, x, fill_time(eps, x), z_eps)
        logp_x0, _, nfe = ode_log_likelihood(sde, score_fn, x, probe, eps=eps, **solver)
        logp_x_eps, latent, _ = ode_log_likelihood(sde, score_fn, x_eps, probe, eps=eps, **solver)
        residual = losses.reconstruction_loss(score_fn, sde, x, eps, z_residual)
        return {
            "nll": to_bits_per_dim(residual - logp_x_eps, dims, offset),
            "nll_without_residual": to_bits_per_dim(-logp_x0, dims, offset),
            "nfe": nfe,
            "latent": latent,
        }

    return jax.jit(nll_fn, static_argnames="truncated_normal")


def get_nll_fn(
    config: ConfigDict, sde: SDE, make_score_fn: MakeScoreFn, num_levels: int = 256
) -> Callable[..., dict[str, Array]]:
    """`make_nll_fn` with the arguments that a config names."""
    return make_nll_fn(
        sde,
        make_score_fn,
        get_preprocessing(data_spec(config), num_levels),
        config.training.truncation_time,
        num_steps=config.eval.nll_steps,
        rtol=config.eval.rtol,
        atol=config.eval.atol,
    )


def make_nelbo_fn(
    sde: SDE,
    make_score_fn: MakeScoreFn,
    preprocessing: Preprocessing,
    eps: float,
    draws: int,
) -> Callable[..., dict[str, Array]]:
    """A compiled function that computes the NELBO of a batch.

    Args:
      sde, make_score_fn, preprocessing, eps: as in `make_nll_fn`.
      draws: number of times for each image.

    Returns:
      nelbo_fn(params, key, x, labels=None), with the arguments of `get_nll_fn`'s function →
        `nelbo`: bits/dim with the residual, (N,);
        `nelbo_without_residual`: bits/dim without it, (N,).
      With `lossless=True`, x is levels scaled without dequantisation, and the result is
        `nelbo_lossless`: bits/dim of the levels, with their decoder, (N,).
      With `truncated_normal=True`, x is `Preprocessing.to_x0_without_noise`, and the result is
        `nelbo_truncated_normal`: bits/dim of the levels, without a decoder, (N,).
      The values are means over `draws` importance-sampled, stratified times.
    """
    offset, grid = preprocessing.bits_offset, preprocessing.level_grid
    width = preprocessing.cell_width

    def nelbo_fn(
        params: Any,
        key: Array,
        x: Array,
        labels: Array | None = None,
        lossless: bool = False,
        truncated_normal: bool = False,
    ) -> dict[str, Array]:
        score_fn, dims = make_score(make_score_fn, params, labels), int(np.prod(x.shape[1:]))
        split = jax.vmap(lambda key: jax.random.split(key, 4), out_axes=1)
        u_keys, z_keys, prior_keys, residual_keys = split(_keys_per_image(key, len(x)))
        offsets = jax.vmap(jax.random.uniform)(u_keys)
        if truncated_normal:
            x_eps, log_q = _draw_in_cells(sde, eps, width, residual_keys, x)

        def draw(i: Array, total: Array) -> Array:
            keys = jax.vmap(lambda key: jax.random.fold_in(key, i))(z_keys)
            z, u = _draw(jax.random.normal, keys, x), (i + offsets) / draws
            if truncated_normal:
                return total + nelbo_of_x_eps(sde, score_fn, x_eps, eps, u, z)
            t, inverse_density = losses.draw_times(sde, u, eps, True)
            return total + diffusion_term(sde, score_fn, x, t, z, inverse_density)

        diffusion = jax.lax.fori_loop(0, draws, draw, jnp.zeros(len(x))) / draws
        z_prior = _draw(jax.random.normal, prior_keys, x)
        if truncated_normal:
            a, b = sde.transition(eps, sde.T)
            drift = sde.log_mean_coeff(sde.T) - sde.log_mean_coeff(eps)
            bound = -sde.prior_logp(a * x_eps + b * z_prior) + diffusion - dims * drift
            return {"nelbo_truncated_normal": to_bits_per_dim(bound + log_q, dims, 0.0)}
        prior = -sde.prior_logp(losses.perturb(sde, x, fill_time(sde.T, x), z_prior))
        bound = prior + diffusion + nelbo_constants(sde, eps, dims)
        z_residual = _draw(jax.random.normal, residual_keys, x)
        if lossless:
            decoder = losses.discrete_decoder_loss(score_fn, sde, x, eps, z_residual, *grid)
            log_std = dims * (jnp.log(sde.std(eps)) + 0.5 * np.log(2 * np.pi))
            encoder = -log_std - 0.5 * losses.sum_image(z_residual**2)  # log p_0ε(x_ε | x_0)
            return {"nelbo_lossless": to_bits_per_dim(bound + encoder + decoder, dims, 0.0)}
        residual = losses.reconstruction_loss(score_fn, sde, x, eps, z_residual)
        return {
            "nelbo": to_bits_per_dim(bound + residual, dims, offset),
            "nelbo_without_residual": to_bits_per_dim(bound, dims, offset),
        }

    return jax.jit(nelbo_fn, static_argnames=("lossless", "truncated_normal"))


def get_nelbo_fn(
    config: ConfigDict, sde: SDE, make_score_fn: MakeScoreFn, num_levels: int = 256
) -> Callable[..., dict[str, Array]]:
    """`make_nelbo_fn` with the arguments that a config names."""
    preprocessing = get_preprocessing(data_spec(config), num_levels)
    eps, draws = config.training.truncation_time, config.eval.nelbo_draws
    return make_nelbo_fn(sde, make_score_fn, preprocessing, eps, draws)
