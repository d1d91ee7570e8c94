"""Soft truncation: the prior on the truncation, the times, the weightings and the objective.

The objective for one truncation τ (arXiv 2106.05527, eq. 4) is

    L(θ; λ, τ) = ½ ∫_τ^T λ(t) E‖s_θ(x_t, t) - ∇ log p_0t(x_t | x_0)‖² dt.

Soft truncation draws one τ for the mini-batch of each step. Every random number is a function of
the seed, the step and the image's index in the global batch, so a run gives the same result, up to
rounding, on any number of devices and after an interruption.
"""

import abc
import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from configs.errors import UserError
from data.pixels import Preprocessing
from sde_lib import SDE, expand, one_minus_exp, safe_log


class Prior(Protocol):
    """The interface of a prior on the truncation τ."""

    def icdf(self, u: ArrayLike) -> Array:
        """The inverse of `cdf`: the τ with P(τ' ≤ τ) = u, elementwise on `u` in [0, 1]."""

    def cdf(self, t: ArrayLike) -> Array:
        """P(τ ≤ t), elementwise."""


@dataclasses.dataclass(frozen=True)
class TruncationPrior:
    """The power prior P_k(τ) ∝ τ^-k on [eps, T] (arXiv 2106.05527, §4.2).

    In float32 the relative error of `icdf` is at most 1e-5 for every k, also as k → 1. The error of
    `cdf` and the relative error of `pdf` are at most 1e-6 + 2e-7 k, since t's rounding error is
    multiplied by k.

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
    """The prior on τ with which soft truncation weights the noise's error by an increasing w(γ).

    In γ = log σ²/α² the objective is ½ ∫ w(γ) E‖ε̂ - z‖² dγ, and soft truncation with λ = g² has
    w(γ(t)) = P(τ ≤ t). So the CDF is w(γ(t))/w(γ(T)), with an atom of w(γ(ε))/w(γ(T)) at τ = ε.

    Attributes:
      sde: the SDE.
      eps: smallest truncation.
      weight: w(γ), elementwise, increasing and positive.
      inverse_weight: the inverse of `weight`; None: it is found by bisection.
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


def power_prior(k: float, truncation_time: float) -> TruncationPrior:
    """P(τ) ∝ τ^-k from the truncation time to 1."""
    return TruncationPrior(k, truncation_time)


def sigmoid_prior(sde: SDE, truncation_time: float, sigmoid_bias: float) -> WeightingPrior:
    """The prior for w = sigmoid(γ + b), as in arXiv 2303.00848, whose λ is -γ."""

    def weight(gamma: Array) -> Array:
        return jax.nn.sigmoid(gamma + sigmoid_bias)

    def inverse(w: Array) -> Array:
        return jnp.log(w) - jnp.log1p(-w) - sigmoid_bias

    return WeightingPrior(sde, truncation_time, weight, inverse)


def velocity_prior(sde: SDE, truncation_time: float) -> WeightingPrior:
    """The prior for w = e^{γ/2}, the weighting of flow matching (arXiv 2303.00848)."""

    def weight(gamma: Array) -> Array:
        return jnp.exp(0.5 * gamma)

    def inverse(w: Array) -> Array:
        return 2 * jnp.log(w)

    return WeightingPrior(sde, truncation_time, weight, inverse)


# The priors on τ that `training.prior` can name: functions whose parameters are named after fields
# of a config, or `sde` (configs.fields.call).
PRIORS: dict[str, Callable[..., Prior]] = {
    "power": power_prior,
    "sigmoid": sigmoid_prior,
    "velocity": velocity_prior,
}


def check_prior(prior: Prior, sde: SDE, eps: float, name: str) -> None:
    """Check the CDF of a prior on τ and its inverse, at 2,000 times and 2,000 probabilities.

    Raises:
      UserError: its CDF does not increase to 1, or its icdf is not the inverse of it.
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
      weight: λ(t) divided by the density of t, (N,).
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
      weight: λ(t) divided by the density of t, (N,).

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
    """Replace each label by `none` with the probability `rate`.

    Args:
      key: the key of the step.
      index: the images' indices in the global batch, (N,).
      classes: the labels, (N,).
      rate: the probability.
      none: the number that stands for no label.
    """
    key = jax.random.fold_in(key, 2)  # an objective splits the step's key in two
    dropped = jax.vmap(lambda i: jax.random.bernoulli(jax.random.fold_in(key, i), rate))(index)
    return jnp.where(dropped, none, classes)


class ImageKeys(NamedTuple):
    """Keys of images, (N,) each."""

    data: Array  # for flips and dequantisation
    time: Array
    noise: Array
    dropout: Array
    residual: Array  # for the noise of the reconstruction term


def split_step_key(key: Array, index: Array) -> tuple[Array, Array, ImageKeys]:
    """The keys of a training step: for its truncation, for its batch, and for each image.

    Args:
      key: the key of the step (`step_key`).
      index: the images' indices in the global batch, (N,).
    """
    tau_key, batch_key = jax.random.split(key)
    split = jax.vmap(lambda i: jax.random.split(jax.random.fold_in(batch_key, i), 5), out_axes=1)
    return tau_key, batch_key, ImageKeys(*split(index))


@dataclasses.dataclass(frozen=True)
class Draws:
    """What the loss of a mini-batch of images is computed from, in addition to the network."""

    index: Array  # the images' indices in the global batch, (N,)
    keys: ImageKeys
    train: bool
    tau: Array  # the truncation, a scalar
    x0: Array  # scaled data, (N, H, W, C)
    z: Array  # noise, of x0's shape
    t: Array  # times, (N,)
    weight: Array  # λ(t) over the density that t was drawn with, (N,)

    @property
    def dropout_keys(self) -> Array | None:
        """(N,), or None without dropout."""
        return self.keys.dropout if self.train else None


class Objective(abc.ABC):
    """The interface of an objective: the loss of the images of a training step."""

    @abc.abstractmethod
    def __call__(
        self, score_fn: ScoreFn, key: Array, images: Array, index: Array, train: bool
    ) -> tuple[Array, Array]:
        """The loss of each image (N,), and the step's truncation τ, a scalar.

        Args:
          score_fn: (x (N, H, W, C), t (N,), dropout keys (N,) or None) → score (N, H, W, C).
          key: the key of the step.
          images: levels, (N, H, W, C).
          index: the images' indices in the global batch, (N,).
          train: whether to flip images at random and to apply dropout.
        """

    def for_test(self, batch_size: int) -> "Objective":
        """The objective that is computed on test images, in batches of `batch_size`."""
        del batch_size
        return self


class DrawnObjective(Objective):
    """An objective that first draws all random numbers, and then computes losses from them."""

    @abc.abstractmethod
    def draw(self, key: Array, images: Array, index: Array, train: bool) -> Draws:
        """Draw what the losses are computed from; arguments as in `__call__`."""

    @abc.abstractmethod
    def losses(self, score_fn: ScoreFn, draws: Draws) -> Array:
        """The loss of each image, (N,)."""

    def __call__(
        self, score_fn: ScoreFn, key: Array, images: Array, index: Array, train: bool
    ) -> tuple[Array, Array]:
        draws = self.draw(key, images, index, train)
        return self.losses(score_fn, draws), draws.tau


@dataclasses.dataclass(frozen=True)
class AtTimes(DrawnObjective):
    """The weighted error of the score at one time for each image, all in [τ, T].

    Attributes:
      sde: the SDE.
      preprocessing: from levels to x_0.
      reduce_mean: whether the loss of an image is divided by its number of dimensions.
    """

    sde: SDE
    preprocessing: Preprocessing
    reduce_mean: bool

    @abc.abstractmethod
    def draw_truncation(self, key: Array) -> Array:
        """The truncation of one step, a scalar."""

    @abc.abstractmethod
    def draw_times(
        self, batch_key: Array, keys: Array, index: Array, tau: Array
    ) -> tuple[Array, Array]:
        """Times t of images on [τ, T], and λ(t) divided by the density of t; (N,) each."""

    def draw(self, key: Array, images: Array, index: Array, train: bool) -> Draws:
        tau_key, batch_key, keys = split_step_key(key, index)
        tau = self.draw_truncation(tau_key)  # one for the whole mini-batch: soft truncation
        x0 = self.preprocessing.to_x0(images, keys.data, flip=train)
        z = normal(keys.noise, x0)
        t, weight = self.draw_times(batch_key, keys.time, index, tau)
        return Draws(index, keys, train, tau, x0, z, t, weight)

    def losses(self, score_fn: ScoreFn, draws: Draws) -> Array:
        x_t = perturb(self.sde, draws.x0, draws.t, draws.z)
        score = score_fn(x_t, draws.t, draws.dropout_keys)
        error = weighted_error(self.sde, score, draws.t, draws.z, draws.weight)
        return error * _scale(draws.x0, self.reduce_mean)


@dataclasses.dataclass(frozen=True)
class ScoreMatching(AtTimes):
    """Soft truncation's estimate of ½ ∫_τ^T λ(t) E‖s_θ(x_t, t) - ∇ log p_0t(x_t | x_0)‖² dt.

    τ ~ `prior` is drawn anew for each mini-batch (arXiv 2106.05527, §4). It is a function of the
    step's key; all other random numbers are functions of that key and the image's index.

    Attributes:
      sde, preprocessing, reduce_mean: as in `AtTimes`.
      eps: ε, the smallest time.
      prior: the prior on τ; None: τ = ε.
      weigh_by_prior: weight by P(τ ≤ t) instead of drawing τ, which has the same expectation.
      weighting: λ(t).
      importance_sampling: draw t ~ g²/σ² on [τ, T] instead of uniformly.
      stratified: the size N of the global batch, whose times come from u_i = (u_0 + i/N) mod 1
        with one u_0 (arXiv 2107.00630, app. I.1); 0: from independent u_i.
    """

    eps: float
    prior: Prior | None
    weigh_by_prior: bool
    weighting: Weighting
    importance_sampling: bool
    stratified: int

    def draw_truncation(self, key: Array) -> Array:
        if self.prior is None or self.weigh_by_prior:
            return jnp.asarray(self.eps, jnp.float32)
        return self.prior.icdf(jax.random.uniform(key))

    def draw_times(
        self, batch_key: Array, keys: Array, index: Array, tau: Array
    ) -> tuple[Array, Array]:
        if self.stratified:
            u = (jax.random.uniform(batch_key) + index / self.stratified) % 1.0
        else:
            u = jax.vmap(jax.random.uniform)(keys)
        t, inverse_density = draw_times(self.sde, u, tau, self.importance_sampling)
        weight = self.weighting(self.sde, t) * inverse_density
        if self.weigh_by_prior and self.prior is not None:
            weight = weight * self.prior.cdf(t)
        return t, weight

    def for_test(self, batch_size: int) -> "ScoreMatching":
        """With the equivalent weight, which has the same expectation and less variance."""
        stratified = batch_size if self.stratified else 0
        return dataclasses.replace(self, weigh_by_prior=True, stratified=stratified)


@dataclasses.dataclass(frozen=True)
class EDM(AtTimes):
    """EDM's loss (arXiv 2206.00364, §5 and table 1), with or without soft truncation.

    For r = σ/α and the network's D = E[x_0 | x_t] it is E[λ(r) ‖D - x_0‖²] with normal ln r and
    λ = (r² + σ_d²)/(r σ_d)². Times are in [τ, T], and the loss is multiplied by the probability of
    that, so that every τ has a part of the same integral.

    Attributes:
      sde, preprocessing, reduce_mean: as in `AtTimes`.
      prior: the prior on τ; None: τ = ε.
      truncation_time: ε, the smallest time.
      sigma_data: σ_d.
      p_mean, p_std: the mean and the standard deviation of ln r.
    """

    prior: Prior | None
    truncation_time: float
    sigma_data: float
    p_mean: float = -1.2
    p_std: float = 1.2

    def draw_truncation(self, key: Array) -> Array:
        if self.prior is None:
            return jnp.asarray(self.truncation_time, jnp.float32)
        return self.prior.icdf(jax.random.uniform(key))

    def draw_times(
        self, batch_key: Array, keys: Array, index: Array, tau: Array
    ) -> tuple[Array, Array]:
        return self.times(jax.vmap(jax.random.uniform)(keys), tau)

    def times(self, u: Array, tau: Array) -> tuple[Array, Array]:
        """What `draw_times` returns, from uniforms (N,)."""
        ends = [(0.5 * self.sde.gamma(t) - self.p_mean) / self.p_std for t in (tau, self.sde.T)]
        low, high = map(jax.scipy.special.ndtr, ends)
        quantile = jnp.clip(jax.scipy.special.ndtri(low + u * (high - low)), *ends)
        t = self.sde.inverse_gamma(2 * (self.p_mean + self.p_std * quantile))
        t = jnp.clip(t, tau, self.sde.T)
        # ‖D - x_0‖² = r² σ² ‖s + z/σ‖², of which `weighted_error` takes one half.
        square = jnp.exp(self.sde.gamma(t)) + self.sigma_data**2
        weight = 2 * (high - low) * square * (self.sde.std(t) / self.sigma_data) ** 2
        return t, weight


@dataclasses.dataclass(frozen=True)
class Mixed(DrawnObjective):
    """One objective for the images with even index, and another for the rest.

    The mean loss of a batch is the mean of the first objective plus `factor` times that of the
    second.

    Attributes:
      first, second: the objectives, which have the same data and noise, but different times.
      factor: the factor of the second objective.
      balanced: whether to scale the second objective's losses to the size of the first one's first.
      axis_name: the name of the mapped axis of devices over which the ratio of these sizes is
        averaged; None: the ratio is that of the images given.
    """

    first: ScoreMatching
    second: ScoreMatching
    factor: float
    balanced: bool = False
    axis_name: str | None = None

    def draw(self, key: Array, images: Array, index: Array, train: bool) -> Draws:
        first, second = (o.draw(key, images, index, train) for o in (self.first, self.second))
        even = index % 2 == 0
        t = jnp.where(even, first.t, second.t)
        weight = jnp.where(even, first.weight, second.weight)
        return dataclasses.replace(first, t=t, weight=weight)

    def losses(self, score_fn: ScoreFn, draws: Draws) -> Array:
        losses, even = self.first.losses(score_fn, draws), draws.index % 2 == 0
        ratio = mean_pair_ratio(losses, even, self.axis_name) if self.balanced else jnp.ones(())
        return losses * jnp.where(even, 2, 2 * self.factor * ratio)

    def for_test(self, batch_size: int) -> "Mixed":
        """Without `balanced`: an equivalent weight can't express how its ratio depends on τ."""
        first, second = (o.for_test(batch_size) for o in (self.first, self.second))
        return dataclasses.replace(self, first=first, second=second, balanced=False)


@dataclasses.dataclass(frozen=True)
class WithReconstruction(DrawnObjective):
    """An objective with the residual at τ, the reconstruction term of the bound.

    Attributes:
      objective: the other terms.
      sde, preprocessing, reduce_mean: as in `ScoreMatching`.
    """

    objective: DrawnObjective
    sde: SDE
    preprocessing: Preprocessing
    reduce_mean: bool

    def draw(self, key: Array, images: Array, index: Array, train: bool) -> Draws:
        return self.objective.draw(key, images, index, train)

    def losses(self, score_fn: ScoreFn, draws: Draws) -> Array:
        def score_at(x: Array, t: Array) -> Array:
            return score_fn(x, t, draws.dropout_keys)

        x0, z = draws.x0, normal(draws.keys.residual, draws.x0)
        if self.preprocessing.dequantization == "lossless":
            lowest, width = self.preprocessing.level_grid
            residual = discrete_decoder_loss(score_at, self.sde, x0, draws.tau, z, lowest, width)
        else:
            residual = reconstruction_loss(score_at, self.sde, x0, draws.tau, z)
        return self.objective.losses(score_fn, draws) + residual * _scale(x0, self.reduce_mean)

    def for_test(self, batch_size: int) -> Objective:
        """Without the residual: an equivalent weight can't express how it depends on τ."""
        return self.objective.for_test(batch_size)


def normal(keys: Array, x0: Array) -> Array:
    """Standard normal noise of x0's shape, (N, ...), with a key for each image."""
    return jax.vmap(lambda key: jax.random.normal(key, x0.shape[1:]))(keys)


def _scale(x0: Array, reduce_mean: bool) -> float:
    """The factor of an image's loss: 1, or 1 / (number of dimensions)."""
    return 1.0 / math.prod(x0.shape[1:]) if reduce_mean else 1.0


def mean_pair_ratio(losses: Array, even: Array, axis_name: str | None) -> Array:
    """The mean ratio of each even image's loss to the next image's, a scalar without gradient.

    Args:
      losses: (N,).
      even: whether the image's index is even, (N,).
      axis_name: the name of the mapped axis of devices to average over, too; None: there is none.
    """
    ratios = jnp.where(even, losses / jnp.roll(losses, -1), 0)
    mean = jnp.sum(ratios) / jnp.sum(even)
    return jax.lax.stop_gradient(jax.lax.pmean(mean, axis_name) if axis_name else mean)


def score_matching(
    sde: SDE,
    preprocessing: Preprocessing,
    prior: Prior | None,
    weighting: Weighting,
    axis_name: str | None,
    *,
    truncation: str,
    truncation_time: float,
    importance_sampling: bool,
    stratified_times: bool,
    batch_size: int,
    reduce_mean: bool,
    mixed: bool,
    ddpm_weight: float,
    balanced: bool,
    reconstruction_loss: bool,
) -> Objective:
    """The built-in objective, soft truncation and its variants.

    Args:
      sde, preprocessing, weighting: as in `ScoreMatching`.
      prior: the prior on τ; None for the fixed truncation.
      axis_name: as in `Mixed`.
      truncation: if it is equivalent_weight, weight by the prior instead of drawing from it.
      truncation_time, importance_sampling, stratified_times, batch_size, reduce_mean, mixed,
      ddpm_weight, balanced, reconstruction_loss: the fields of `config.training`.
    """
    plain = ScoreMatching(
        sde=sde,
        preprocessing=preprocessing,
        eps=truncation_time,
        prior=prior,
        weigh_by_prior=truncation == "equivalent_weight",
        weighting=weighting,
        importance_sampling=importance_sampling,
        stratified=batch_size if stratified_times else 0,
        reduce_mean=reduce_mean,
    )
    objective: DrawnObjective = plain
    if mixed:
        variance = WEIGHTINGS["variance"]
        second = dataclasses.replace(plain, weighting=variance, importance_sampling=False)
        objective = Mixed(plain, second, ddpm_weight, balanced, axis_name)
    if reconstruction_loss:
        objective = WithReconstruction(objective, sde, preprocessing, reduce_mean)
    return objective


# The objectives that `training.objective` can name: classes and functions whose parameters are
# named after fields of a config (configs.fields.call), or sde, preprocessing, prior, weighting or
# axis_name, as above.
OBJECTIVES: dict[str, Callable[..., Objective]] = {"score_matching": score_matching, "edm": EDM}
BUILT_IN = frozenset(OBJECTIVES)  # a config file registers its own later
