"""Soft truncation: the prior on the truncation, the times, the weightings and the objective.

The objective for one truncation τ (arXiv 2106.05527, eq. 4) is

    L(θ; λ, τ) = ½ ∫_τ^T λ(t) E‖s_θ(x_t, t) - ∇ log p_0t(x_t | x_0)‖² dt.

Soft truncation draws one τ for the mini-batch of each step. Every random number is a function of
the seed, the step and the image's index in the global batch, so a run gives the same result, up to
rounding, on any number of devices and after an interruption.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from ml_collections import ConfigDict

from configs.data import data_spec
from configs.shapes import image_shape
from data import pixels
from data.pixels import Preprocessing
from errors import UserError
from sde_lib import SDE, expand, get_sde, one_minus_exp, safe_log


class Prior(Protocol):
    """The interface of a prior on the truncation τ."""

    def icdf(self, u: ArrayLike) -> Array:
        """The inverse of `cdf`: the τ with P(τ' ≤ τ) = u, elementwise on `u` in [0, 1]."""

    def cdf(self, t: ArrayLike) -> Array:
        """P(τ ≤ t), elementwise."""


@dataclasses.dataclass(frozen=True)
class TruncationPrior:
    """P_k(τ) ∝ τ^-k on [eps, T] (arXiv 2106.05527, §4.2).

    The relative error of `icdf` in float32 is at most 1e-5 for every k, also as k → 1. The error of
    `cdf` and the relative error of `pdf` are at most 1e-6 + 2e-7 k, as t's rounding counts k-fold.

    Attributes:
      k: exponent, at least 0; 0 is the uniform distribution, inf the fixed truncation τ = eps.
      eps: smallest truncation.
      T: largest truncation.
    """

    k: float
    eps: float
    T: float = 1.0

    def __post_init__(self) -> None:
        if not self.k >= 0:
            raise ValueError(f"the prior's k is {self.k}; it must be at least 0")
        if not 0 < self.eps < self.T:
            raise ValueError(f"the prior's eps is {self.eps}; it must be in (0, {self.T})")

    @property
    def _k_minus_1(self) -> float:
        return self.k - 1

    @property
    def _log_range(self) -> float:
        return math.log(self.T / self.eps)

    def icdf(self, u: ArrayLike) -> Array:
        """The τ with P(τ' ≤ τ) = u, elementwise on `u` in [0, 1]."""
        u = jnp.asarray(u)
        m, log_range = self._k_minus_1, self._log_range
        if math.isinf(self.k):
            return jnp.full_like(u, self.eps)
        if m == 0:
            log_ratio = u * log_range
        elif abs(m) * log_range < 0.5:
            # 1 - u(1 - (ε/T)^m) is close to 1 here; log1p is accurate as k → 1.
            log_ratio = -jnp.log1p(u * math.expm1(-m * log_range)) / m
        else:
            # The same as a sum of positive terms, which is accurate as u → 1.
            log_ratio = -jnp.log((1 - u) + u * math.exp(-m * log_range)) / m
        return jnp.clip(self.eps * jnp.exp(log_ratio), self.eps, self.T)

    def cdf(self, t: ArrayLike) -> Array:
        """P(τ ≤ t), elementwise."""
        t = jnp.asarray(t)
        if math.isinf(self.k):
            return jnp.where(t >= self.eps, 1.0, 0.0)
        log_ratio, whole = safe_log(jnp.clip(t, self.eps, self.T) / self.eps), self._log_range
        if self._k_minus_1 == 0:
            return log_ratio / whole
        m = abs(self._k_minus_1)
        share = one_minus_exp(m * log_ratio) / -math.expm1(-m * whole)
        return share if self.k > 1 else share * jnp.exp(m * (log_ratio - whole))

    def pdf(self, t: ArrayLike) -> Array:
        """Density at t, elementwise; 0 outside [eps, T]. For k = inf: inf at eps, 0 elsewhere."""
        t = jnp.asarray(t)
        if math.isinf(self.k):
            return jnp.where(t == self.eps, jnp.inf, 0.0)
        m, log_range = self._k_minus_1, self._log_range
        normalizer = log_range if m == 0 else -math.expm1(-m * log_range) / m
        inside = (t >= self.eps) & (t <= self.T)
        ratio = jnp.where(inside, t, self.eps) / self.eps
        return jnp.where(inside, ratio ** (-self.k) / (self.eps * normalizer), 0.0)


@dataclasses.dataclass(frozen=True)
class WeightingPrior:
    """The prior on τ whose soft truncation weighs the noise's error by an increasing w(γ).

    In γ = log σ²/α² the objective is ½ ∫ w(γ) E‖ε̂ - z‖² dγ, and soft truncation with λ = g² has
    w(γ(t)) = P(τ ≤ t). So the CDF is w(γ(t))/w(γ(T)), with an atom of w(γ(ε))/w(γ(T)) at τ = ε.

    Attributes:
      sde: the SDE.
      eps: smallest truncation.
      weight: w(γ), elementwise, increasing and positive.
      inverse_weight: its inverse; None: by bisection.
    """

    sde: SDE
    eps: float
    weight: Callable[[Array], Array]
    inverse_weight: Callable[[Array], Array] | None = None

    def cdf(self, t: ArrayLike) -> Array:
        """P(τ ≤ t), elementwise."""
        t = jnp.asarray(t)
        gamma = self.sde.gamma(jnp.clip(t, self.eps, self.sde.T))
        return jnp.where(t < self.eps, 0.0, self.weight(gamma) / self._top)

    def icdf(self, u: ArrayLike) -> Array:
        """The smallest τ with P(τ' ≤ τ) ≥ u, elementwise on `u` in [0, 1]."""
        (low, high), w = self._ends, jnp.asarray(u) * self._top
        atom = self.weight(low)
        if self.inverse_weight is not None:
            gamma = self.inverse_weight(jnp.maximum(w, atom))
        else:
            gamma = self._bisect(w)
        tau = self.sde.inverse_gamma(jnp.clip(gamma, low, high))
        return jnp.where(w <= atom, self.eps, jnp.clip(tau, self.eps, self.sde.T))

    @property
    def _ends(self) -> tuple[Array, Array]:
        return self.sde.gamma(self.eps), self.sde.gamma(self.sde.T)

    @property
    def _top(self) -> Array:
        return self.weight(self._ends[1])

    def _bisect(self, w: Array) -> Array:
        def halve(_: Array, ends: tuple[Array, Array]) -> tuple[Array, Array]:
            low, high = ends
            middle = 0.5 * (low + high)
            below = self.weight(middle) < w
            return jnp.where(below, middle, low), jnp.where(below, high, middle)

        low, high = (jnp.full(w.shape, end) for end in self._ends)
        return jax.lax.fori_loop(0, 40, halve, (low, high))[1]


def _sigmoid_prior(config: ConfigDict) -> Prior:
    """w = sigmoid(γ + b), as of arXiv 2303.00848 with its λ = -γ."""
    bias = config.training.sigmoid_bias

    def weight(gamma: Array) -> Array:
        return jax.nn.sigmoid(gamma + bias)

    def inverse(w: Array) -> Array:
        return jnp.log(w) - jnp.log1p(-w) - bias

    return WeightingPrior(get_sde(config), config.training.truncation_time, weight, inverse)


def _velocity_prior(config: ConfigDict) -> Prior:
    """w = e^{γ/2}, that of flow matching (arXiv 2303.00848)."""

    def weight(gamma: Array) -> Array:
        return jnp.exp(0.5 * gamma)

    def inverse(w: Array) -> Array:
        return 2 * jnp.log(w)

    return WeightingPrior(get_sde(config), config.training.truncation_time, weight, inverse)


# The priors on τ that `training.prior` can name.
PRIORS: dict[str, Callable[[ConfigDict], Prior]] = {
    "power": lambda config: TruncationPrior(config.training.k, config.training.truncation_time),
    "sigmoid": _sigmoid_prior,
    "velocity": _velocity_prior,
}


def check_prior(prior: Prior, sde: SDE, eps: float, name: str) -> None:
    """Check what a prior on the truncation promises, at 2,000 times and 2,000 probabilities.

    Raises:
      UserError: its CDF does not increase to 1, or its icdf is not the inverse; in one line.
    """

    def wrong(what: str) -> UserError:
        return UserError(f"training.prior={name}: {what}")

    for method in ("cdf", "icdf"):
        if not callable(getattr(prior, method, None)):
            raise wrong(f"it has no {method}; a prior needs icdf(u) and cdf(t)")
    times = np.asarray(sde.inverse_gamma(jnp.linspace(sde.gamma(eps), sde.gamma(sde.T), 2000)))
    times = np.clip(times, eps, sde.T)
    cdf = np.asarray(prior.cdf(times), float)
    if not np.isfinite(cdf).all() or cdf.min() < -1e-6 or abs(cdf[-1] - 1) > 1e-5:
        raise wrong(f"its cdf must rise from 0 or more to 1 at T; it goes to {cdf[-1]:.6g}")
    falls = np.flatnonzero(np.diff(cdf) < -1e-6)
    if len(falls):
        first, last = times[falls[0]], times[falls[-1] + 1]
        raise wrong(
            f"its cdf falls between t = {first:.3g} and {last:.3g}, so it is the CDF of no prior; "
            "as a training.weighting it can have any shape"
        )
    u = np.linspace(0, 1, 2001)[1:-1].astype(np.float32)
    tau = np.asarray(prior.icdf(u), float)
    if not np.isfinite(tau).all() or tau.min() < eps * (1 - 1e-5) or tau.max() > sde.T * (1 + 1e-5):
        raise wrong(f"its icdf goes from {tau.min():.3g} to {tau.max():.3g}, out of [{eps:g}, 1]")
    # At a jump of the cdf icdf(u) is the smallest τ with cdf(τ) ≥ u.
    below, at = (np.asarray(prior.cdf(tau * factor), float) for factor in (1 - 1e-4, 1))
    off = np.flatnonzero((at < u - 1e-3) | ((below > u + 1e-3) & (tau > eps * (1 + 1e-4))))
    if len(off):
        i = off[0]
        raise wrong(f"cdf(icdf({u[i]:.4g})) is {at[i]:.4g}; icdf must be the inverse of cdf")


def get_prior(config: ConfigDict) -> Prior:
    """The prior on the truncation that a config names."""
    return PRIORS[config.training.prior](config)


def draw_times(
    sde: SDE, u: Array, tau: ArrayLike, importance_sampling: bool
) -> tuple[Array, Array]:
    """Times on [τ, T] from uniform random numbers, and the reciprocals of their densities.

    Args:
      sde: the SDE.
      u: uniforms in [0, 1], shape (N,).
      tau: truncation, scalar or (N,).
      importance_sampling: draw t ∝ g²/σ² (the density of the importance-sampled likelihood
        weighting) instead of uniformly.

    Returns:
      (t, 1/density), each (N,): `mean(f(t) / density)` is unbiased for ∫_τ^T f(t) dt.
    """
    if importance_sampling:
        t = sde.importance_time(u, tau)
        return t, sde.importance_normalizer(tau) * (sde.std(t) / sde.diffusion(t)) ** 2
    tau = jnp.asarray(tau)
    return tau + u * (sde.T - tau), jnp.broadcast_to(sde.T - tau, u.shape)


def sum_image(x: Array) -> Array:
    """Sum over all axes but the first, in float32: (N, ...) → (N,)."""
    return jnp.sum(x.astype(jnp.float32), axis=tuple(range(1, x.ndim)))


Weighting = Callable[[SDE, Array], Array]  # (sde, t (N,)) → λ(t) (N,)
ScoreFn = Callable[..., Array]  # (x (N, ...), t (N,), dropout keys (N,) or None) → score (N, ...)

# The λ(t) that `training.weighting` can name; if it is empty, `training.likelihood_weighting`
# chooses one of the two.
WEIGHTINGS: dict[str, Weighting] = {
    "likelihood": lambda sde, t: sde.diffusion(t) ** 2,
    "variance": lambda sde, t: sde.std(t) ** 2,
}


def get_weighting(config: ConfigDict) -> Weighting:
    """The weighting that a config names, a function (sde, t (N,)) → λ(t) (N,)."""
    training = config.training
    chosen = "likelihood" if training.likelihood_weighting else "variance"
    return WEIGHTINGS[training.weighting or chosen]


def perturb(sde: SDE, x0: Array, t: Array, z: Array) -> Array:
    """x_t = α x_0 + σ z for x0 and z (N, ...), t (N,)."""
    return expand(sde.mean_coeff(t), x0) * x0 + expand(sde.std(t), x0) * z


def weighted_error(sde: SDE, score: Array, t: Array, z: Array, weight: Array) -> Array:
    """½ weight ‖score - ∇ log p_0t(x_t | x_0)‖² of each image, (N,).

    Args:
      sde: the SDE.
      score: at x_t = α x_0 + σ z and t, (N, ...).
      t: times, (N,).
      z: the noise, of the score's shape.
      weight: λ(t) over the density that t was drawn with, (N,).
    """
    std = sde.std(t)
    # ∇ log p_0t = -z/σ; both terms are multiplied by σ, which may be too small to divide by.
    scaled_score = expand(std, score) * score
    return 0.5 * (weight / std**2) * sum_image((scaled_score + z) ** 2)


def score_matching_loss(
    score_fn: Callable[[Array, Array], Array],
    sde: SDE,
    x0: Array,
    t: Array,
    z: Array,
    weight: Array,
) -> Array:
    """½ weight ‖s(x_t, t) - ∇ log p_0t(x_t | x_0)‖² for each image (denoising score matching).

    Args:
      score_fn: (x (N, ...), t (N,)) → score (N, ...).
      sde: the SDE.
      x0: scaled data, (N, ...).
      t: times, (N,).
      z: standard normal noise, the shape of x0.
      weight: λ(t) over the density that t was drawn with, (N,).

    Returns:
      (N,) in float32, summed over the dimensions of an image.
    """
    return weighted_error(sde, score_fn(perturb(sde, x0, t, z), t), t, z, weight)


def reconstruction_loss(
    score_fn: Callable[[Array, Array], Array], sde: SDE, x0: Array, eps: ArrayLike, z: Array
) -> Array:
    """The residual: log p_0ε(x_ε | x_0) - log p(x_0 | x_ε) for x_ε = α x_0 + σ z, in nats.

    The decoder p(x_0 | x_ε) is normal with mean `sde.denoise(x_ε)` and standard deviation σ/α.

    Args:
      score_fn, sde, x0: as in `score_matching_loss`.
      eps: the time ε.
      z: standard normal noise, the shape of x0.

    Returns:
      (N,) in float32.
    """
    dims = math.prod(x0.shape[1:])
    error, alpha = _decoding_error(score_fn, sde, x0, eps, z)
    # Both are normal; the standard deviations σ and σ/α contribute D log α by their normalisers.
    return 0.5 * (sum_image(error**2) - sum_image(z**2)) - dims * jnp.log(alpha)


def discrete_decoder_loss(
    score_fn: Callable[[Array, Array], Array],
    sde: SDE,
    x0: Array,
    eps: ArrayLike,
    z: Array,
    lowest: float,
    width: float,
) -> Array:
    """-log P(x_0 | x_ε), the lossless decoder of levels (arXiv 2006.11239, eq. 13), in nats.

    P is the probability of each level's interval under the decoder of `reconstruction_loss`. The
    intervals of the lowest and the highest level are unbounded.

    Args:
      score_fn, sde, eps, z: as in `reconstruction_loss`.
      x0: levels, scaled but not dequantised, (N, ...).
      lowest: the scaled lowest level; the scaled highest level is 1.
      width: the distance between scaled levels.

    Returns:
      (N,) in float32.
    """
    error, alpha = _decoding_error(score_fn, sde, x0, eps, z)
    half = 0.5 * width * alpha / sde.std(eps)
    below = jnp.where(x0 < lowest + 0.5 * width, -jnp.inf, error - half)
    above = jnp.where(x0 > 1 - 0.5 * width, jnp.inf, error + half)
    return -sum_image(_log_normal_mass(below, above))


def _decoding_error(
    score_fn: Callable[[Array, Array], Array], sde: SDE, x0: Array, eps: ArrayLike, z: Array
) -> tuple[Array, Array]:
    """(x_0 - E[x_0 | x_ε]) in units of the decoder's standard deviation, and α(ε)."""
    t = jnp.full(len(x0), eps, jnp.float32)
    x_eps = perturb(sde, x0, t, z)
    std, alpha = sde.std(eps), sde.mean_coeff(eps)
    return (x0 - sde.denoise(x_eps, t, score_fn(x_eps, t))) * alpha / std, alpha


def _log_normal_mass(below: Array, above: Array) -> Array:
    """log(Φ(above) - Φ(below)) without under- or overflow; the bounds may be infinite."""
    # Mirror the interval to the left of 0, where Φ is accurate.
    mirror = below > 0
    low, high = jnp.where(mirror, -above, below), jnp.where(mirror, -below, above)
    high = jnp.minimum(high, 40.0)  # Φ is 1 there; at infinity it has no derivative
    narrow = high - low < 0.01
    middle = jnp.where(narrow, 0.5 * (low + high), 0.0)
    width = jnp.where(narrow, high - low, 1.0)
    density = -0.5 * middle**2 - 0.5 * math.log(2 * math.pi) + jnp.log(width)
    tail = jax.scipy.special.log_ndtr(jnp.where(narrow, 1.0, high))
    cut = jax.scipy.special.log_ndtr(jnp.where(narrow | jnp.isinf(low), 0.0, low))
    whole = narrow | jnp.isinf(low)
    mass = tail + jnp.where(whole, 0.0, jnp.log1p(-jnp.exp(jnp.where(whole, -1.0, cut - tail))))
    return jnp.where(narrow, density, mass)


def step_key(seed: int, step: ArrayLike) -> Array:
    """The key of one training step."""
    return jax.random.fold_in(jax.random.key(seed), step)


def drop_labels(key: Array, index: Array, classes: Array, rate: float, none: int) -> Array:
    """Labels of which each is replaced by `none` with a probability.

    Args:
      key: the key of the step.
      index: the images' indices in the global batch, (N,).
      classes: (N,).
      rate: the probability.
      none: the number that stands for no label.
    """
    key = jax.random.fold_in(key, 2)  # an objective splits the step's key in two
    dropped = jax.vmap(lambda i: jax.random.bernoulli(jax.random.fold_in(key, i), rate))(index)
    return jnp.where(dropped, none, classes)


def _split_image_key(image_key: Array, i: Array) -> Array:
    """Five keys of an image: for its data, time, noise, dropout, and noise at the truncation."""
    return jax.random.split(jax.random.fold_in(image_key, i), 5)


@dataclasses.dataclass(frozen=True)
class Objective:
    """Soft truncation's estimate of ½ ∫_τ^T λ(t) E‖s_θ(x_t, t) - ∇ log p_0t(x_t | x_0)‖² dt.

    τ ~ `prior` is drawn anew for each mini-batch (arXiv 2106.05527, §4). It is a function of the
    step's key; all other random numbers are functions of that key and the image's index.

    Attributes:
      sde: the SDE.
      weighting: λ(t).
      eps: ε, the smallest time.
      prior: the prior on τ; None: τ = ε.
      weigh_by_prior: weigh by P(τ ≤ t) instead of drawing τ, with the same expectation.
      importance_sampling: draw t ~ g²/σ² on [τ, T] instead of uniformly.
      preprocessing: from levels to x_0.
      variance_half: use λ = σ² and uniform t for the images with odd index.
      variance_factor: a factor of these images' losses.
      balanced: scale these images' losses to the size of the others' first, over all devices.
      reconstruction: add the residual at τ.
      stratified: the size N of the global batch, whose times come from u_i = (u_0 + i/N) mod 1
        with one u_0 (arXiv 2107.00630, app. I.1); 0: from independent u_i.
      scale: a factor of the loss: 1 or 1 / (number of dimensions).
    """

    sde: SDE
    weighting: Weighting
    eps: float
    prior: Prior | None
    weigh_by_prior: bool
    importance_sampling: bool
    preprocessing: Preprocessing
    variance_half: bool
    variance_factor: float
    balanced: bool
    reconstruction: bool
    stratified: int
    scale: float

    def __call__(
        self, score_fn: ScoreFn, key: Array, images: Array, index: Array, train: bool
    ) -> tuple[Array, Array]:
        """The loss of each image (N,), and τ.

        Args:
          score_fn: (x (N, H, W, C), t (N,), dropout keys (N,) or None) → score (N, H, W, C).
          key: the key of the step.
          images, index: levels, uint8 (N, H, W, C), and their indices in the global batch, (N,).
          train: flip images at random, apply dropout, and be in a pmap with axis name "batch".
        """
        tau_key, image_key = jax.random.split(key)
        tau = self.draw_truncation(tau_key)  # one for the whole mini-batch: soft truncation

        def draw(i: Array) -> tuple[Array, Array, Array, Array, Array]:
            data_key, t_key, z_key, dropout_key, z_tau_key = _split_image_key(image_key, i)
            z, z_tau = (jax.random.normal(k, images.shape[1:]) for k in (z_key, z_tau_key))
            return data_key, jax.random.uniform(t_key), z, dropout_key, z_tau

        data_keys, u, z, dropout_keys, z_tau = jax.vmap(draw)(index)
        u = self.stratify(u, image_key, index)
        x0 = self.preprocessing.to_x0(images, data_keys, flip=train)
        t, weight = self.draw_times(u, index, tau)  # on [τ, T]; λ(t) over the density of t
        x_t = perturb(self.sde, x0, t, z)
        score = score_fn(x_t, t, dropout_keys if train else None)
        losses = weighted_error(self.sde, score, t, z, weight)
        if self.variance_half:
            losses = losses * self._half_factors(losses, index, train)
        if self.reconstruction:
            losses += self._residual(score_fn, x0, tau, z_tau, dropout_keys if train else None)
        return losses * self.scale, tau

    def draw_truncation(self, key: Array) -> Array:
        """The truncation of one step, a scalar: drawn from the prior, or ε."""
        if self.prior is None or self.weigh_by_prior:
            return jnp.asarray(self.eps, jnp.float32)
        return self.prior.icdf(jax.random.uniform(key))

    def stratify(self, u: Array, image_key: Array, index: Array) -> Array:
        """Uniforms of images for their times, (N,): `u`, or evenly spread over the global batch."""
        if not self.stratified:
            return u
        first = jax.random.uniform(image_key)
        return (first + index / self.stratified) % 1.0

    def draw_times(self, u: Array, index: Array, tau: Array) -> tuple[Array, Array]:
        """Times t of images on [τ, T], and λ(t) over the density of t; (N,) each."""
        t, inverse_density = draw_times(self.sde, u, tau, self.importance_sampling)
        weight = self.weighting(self.sde, t) * inverse_density
        if self.variance_half:
            other_t, other_inverse = draw_times(self.sde, u, tau, importance_sampling=False)
            other_weight = WEIGHTINGS["variance"](self.sde, other_t) * other_inverse
            first = index % 2 == 0
            t = jnp.where(first, t, other_t)
            weight = jnp.where(first, weight, other_weight)
        if self.weigh_by_prior and self.prior is not None:
            weight = weight * self.prior.cdf(t)
        return t, weight

    def times_of_step(self, seed: int, step: int, batch_size: int) -> tuple[Array, Array]:
        """The truncation and the times (batch_size,) of the step with number `step`, from 0."""
        tau_key, image_key = jax.random.split(step_key(seed, step))
        tau, index = self.draw_truncation(tau_key), jnp.arange(batch_size)
        u = jax.vmap(lambda i: jax.random.uniform(_split_image_key(image_key, i)[1]))(index)
        u = self.stratify(u, image_key, index)
        return tau, self.draw_times(u, index, tau)[0]

    def _half_factors(self, losses: Array, index: Array, train: bool) -> Array:
        ratio, first = jnp.ones(()), index % 2 == 0
        if self.balanced:
            ratio = _mean_pair_loss_ratio(losses, first, "batch" if train else None)
        return jnp.where(first, 2, 2 * self.variance_factor * ratio)

    def _residual(
        self, score_fn: ScoreFn, x0: Array, tau: Array, z: Array, dropout_keys: Array | None
    ) -> Array:
        def score_at(x: Array, t: Array) -> Array:
            return score_fn(x, t, dropout_keys)

        if self.preprocessing.dequantization == "lossless":
            lowest, width = self.preprocessing.level_grid
            return discrete_decoder_loss(score_at, self.sde, x0, tau, z, lowest, width)
        return reconstruction_loss(score_at, self.sde, x0, tau, z)


def get_objective(config: ConfigDict, sde: SDE, num_levels: int = 0) -> Objective:
    """The objective of a config; `num_levels` replaces the data set's number of levels."""
    training, dims = config.training, math.prod(image_shape(config))
    return Objective(
        sde=sde,
        weighting=get_weighting(config),
        eps=training.truncation_time,
        prior=None if training.truncation == "fixed" else get_prior(config),
        weigh_by_prior=training.truncation == "equivalent_weight",
        importance_sampling=training.importance_sampling,
        preprocessing=pixels.get_preprocessing(data_spec(config), num_levels),
        variance_half=training.mixed,
        variance_factor=training.ddpm_weight,
        balanced=training.balanced,
        reconstruction=training.reconstruction_loss,
        stratified=training.batch_size if training.stratified_times else 0,
        scale=1.0 / dims if training.reduce_mean else 1.0,
    )


def _mean_pair_loss_ratio(losses: Array, first: Array, axis_name: str | None) -> Array:
    """The mean, over all devices, of each first loss over the next one; it has no gradient."""
    ratios = jnp.where(first, losses / jnp.roll(losses, -1), 0)
    mean = jnp.sum(ratios) / jnp.sum(first)
    return jax.lax.stop_gradient(jax.lax.pmean(mean, axis_name) if axis_name else mean)
