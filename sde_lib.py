"""SDEs with linear drift, dx = f(t) x dt + g(t) dw, for which x_t = α(t) x_0 + σ(t) z.

All formulas that depend on the SDE are in this file. Functions of time are elementwise, keep the
shape of `t`, and are accurate in float32 on [1e-5, 1] (for times from γ, see `SDE.inverse_gamma`).
"""

import abc
import dataclasses
import math
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from ml_collections import ConfigDict

from configs import fields


class SDE(abc.ABC):
    """The interface of an SDE.

    Attributes:
      T: the largest time.
      exploding: whether α = 1 and σ grows beyond the scale of the data. If so, the network is
        conditioned on σ(t) or log σ(t) and predicts the score s; otherwise it is conditioned on t
        and predicts the noise, -σ(t) s.
    """

    T: ClassVar[float] = 1.0
    exploding: ClassVar[bool] = False

    @property
    def smallest_time(self) -> float:
        """The time below which x_t has no meaning."""
        return 0.0

    @abc.abstractmethod
    def log_mean_coeff(self, t: ArrayLike) -> Array:
        """log α(t) = ∫₀ᵗ f(s) ds."""

    @abc.abstractmethod
    def std(self, t: ArrayLike) -> Array:
        """σ(t), the standard deviation of x_t given x_0."""

    @abc.abstractmethod
    def drift_coeff(self, t: ArrayLike) -> Array:
        """f(t), the factor of x in the drift."""

    @abc.abstractmethod
    def diffusion(self, t: ArrayLike) -> Array:
        """g(t)."""

    @abc.abstractmethod
    def gamma(self, t: ArrayLike) -> Array:
        """γ(t) = log σ²/α² = -log SNR (arXiv 2107.00630), increasing; its derivative is g²/σ²."""

    @abc.abstractmethod
    def inverse_gamma(self, gamma: ArrayLike) -> Array:
        """The t with γ(t) = gamma.

        In float32 it is exact to 4e-6 in γ, and so to 2e-6 in σ. Relative to t that is 2e-6 for VP
        and sub-VP, but up to 3e-3 for VE near t = 1e-5 and 2e-3 for RVE, where σ hardly changes.
        """

    @abc.abstractmethod
    def transition(self, s: ArrayLike, t: ArrayLike) -> tuple[Array, Array]:
        """The exact coefficients (a, b) of x_t = a x_s + b z for s < t."""

    @abc.abstractmethod
    def prior_std(self) -> float:
        """Standard deviation of the prior p_T, a centred normal distribution."""

    def mean_coeff(self, t: ArrayLike) -> Array:
        """α(t), the factor of x_0 in x_t."""
        return jnp.exp(self.log_mean_coeff(t))

    def importance_normalizer(self, tau: ArrayLike) -> Array:
        """Z_τ = ∫_τ^T g²/σ² dt, the normaliser of the importance distribution of time."""
        return self.gamma(self.T) - self.gamma(tau)

    def importance_time(self, u: ArrayLike, tau: ArrayLike) -> Array:
        """Times with density ∝ g²/σ² on [τ, T], from uniform `u` in [0, 1] (arXiv 2106.05527, §3).

        Args:
          u: uniforms of any shape.
          tau: truncation, broadcast against `u`.

        Returns:
          t = γ⁻¹(γ(τ) + u Z_τ), of the broadcast shape.
        """
        gamma = self.gamma(tau) + jnp.asarray(u) * self.importance_normalizer(tau)
        return jnp.clip(self.inverse_gamma(gamma), jnp.asarray(tau), self.T)

    def solver_time(self, t: ArrayLike) -> Array:
        """An increasing function of t, in which an adaptive solver takes steps of similar size."""
        return jnp.asarray(t)

    def time_of_solver(self, c: ArrayLike) -> Array:
        """The t with solver_time(t) = c."""
        return jnp.asarray(c)

    def time_grid(self, eps: float, num: int) -> Array:
        """`num` times from T down to eps, equally spaced in `solver_time`."""
        return self.time_of_solver(
            jnp.linspace(self.solver_time(self.T), self.solver_time(eps), num)
        )

    def _stabilized_gamma(self, t: ArrayLike, stabilizing_constant: float) -> Array:
        """γ_c(t) = log (σ² + c)/α²."""
        return safe_log(self.std(t) ** 2 + stabilizing_constant) - 2 * self.log_mean_coeff(t)

    def unbounded_time(self, t: ArrayLike, stabilizing_constant: float) -> Array:
        """γ_c(t) = log (σ² + c)/α², scaled to 0 at t = 1e-5 and 1 at T.

        The network's time in the unbounded parametrisation (arXiv 2106.05527, appendix). It
        stretches small times, where the score grows fast; the constant c bounds it as t → 0.
        """

        def gamma(t: ArrayLike) -> Array:
            return self._stabilized_gamma(t, stabilizing_constant)

        start = gamma(1e-5)
        return (gamma(t) - start) / (gamma(self.T) - start)

    def denoise(self, x: Array, t: ArrayLike, score: Array) -> Array:
        """Tweedie's formula, E[x_0 | x_t = x] = (x + σ² s)/α; t is a scalar or (N,)."""
        alpha, std = expand(self.mean_coeff(t), x), expand(self.std(t), x)
        return (x + std**2 * score) / alpha

    def prior_logp(self, z: Array) -> Array:
        """log p_T of each row of `z` (N, ...), in nats, shape (N,)."""
        dims = np.prod(z.shape[1:])
        scale = self.prior_std()
        sq = jnp.sum(z**2, axis=tuple(range(1, z.ndim)))
        return -0.5 * (dims * np.log(2 * np.pi * scale**2) + sq / scale**2)


def expand(value: ArrayLike, x: Array) -> Array:
    """Reshape a scalar or (N,) so that it broadcasts against x (N, ...)."""
    value = jnp.asarray(value)
    return value.reshape(value.shape + (1,) * (x.ndim - 1)) if value.ndim else value


# XLA's CPU compiler hands reductions and what they are computed from to YNNPACK, which takes two
# `expm1`, two `log1p` or two `log` of different arguments in one such fusion for the same value
# (jaxlib 0.10.2 and 0.12.0.1; tests/test_compiled.py). What follows can be fused with anything:
# `tanh` is not merged, and a `where` ends the fusion.


def one_minus_exp(b: ArrayLike) -> Array:
    """1 - e^-b for b ≥ 0, elementwise; the relative error in float32 is at most 4e-7."""
    half = jnp.tanh(0.5 * jnp.asarray(b))
    return 2 * half / (1 + half)


def safe_log(x: ArrayLike) -> Array:
    """log x, elementwise, which XLA can compile together with other logarithms."""
    x = jnp.asarray(x)
    return jnp.where(x == 0, -jnp.inf, jnp.log(x))


@dataclasses.dataclass(frozen=True)
class _LinearBeta(SDE):
    """The common part of VP and sub-VP: f = -β(t)/2 with β linear in t.

    Attributes:
      beta_min: β(0).
      beta_max: β(1).
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def beta(self, t: ArrayLike) -> Array:
        """β(t) = β₀ + t (β₁ - β₀)."""
        return self.beta_min + jnp.asarray(t) * (self.beta_max - self.beta_min)

    def integral_beta(self, t: ArrayLike) -> Array:
        """B(t) = ∫₀ᵗ β(s) ds."""
        t = jnp.asarray(t)
        return t * (self.beta_min + 0.5 * t * (self.beta_max - self.beta_min))

    def invert_integral_beta(self, b: ArrayLike) -> Array:
        """The t with B(t) = b, by the form of the quadratic's root that has no cancellation."""
        b = jnp.asarray(b)
        slope = self.beta_max - self.beta_min
        return 2 * b / (self.beta_min + jnp.sqrt(self.beta_min**2 + 2 * slope * b))

    def log_mean_coeff(self, t: ArrayLike) -> Array:
        return -0.5 * self.integral_beta(t)

    def drift_coeff(self, t: ArrayLike) -> Array:
        return -0.5 * self.beta(t)

    def prior_std(self) -> float:
        return 1.0

    def _integral_between(self, s: ArrayLike, t: ArrayLike) -> Array:
        # B(t) - B(s), without cancellation.
        s, t = jnp.asarray(s), jnp.asarray(t)
        return (t - s) * (self.beta_min + 0.5 * (t + s) * (self.beta_max - self.beta_min))

    def _stabilized_gamma(self, t: ArrayLike, stabilizing_constant: float) -> Array:
        # VP's formula; the official release uses it for sub-VP too.
        b = self.integral_beta(t)
        return safe_log(stabilizing_constant + one_minus_exp(b)) + b


@dataclasses.dataclass(frozen=True)
class VPSDE(_LinearBeta):
    """Variance-preserving SDE (arXiv 2011.13456, eq. 11): g² = β, σ² = 1 - e^-B."""

    def std(self, t: ArrayLike) -> Array:
        return jnp.sqrt(one_minus_exp(self.integral_beta(t)))

    def diffusion(self, t: ArrayLike) -> Array:
        return jnp.sqrt(self.beta(t))

    def gamma(self, t: ArrayLike) -> Array:
        b = self.integral_beta(t)
        return safe_log(one_minus_exp(b)) + b

    def inverse_gamma(self, gamma: ArrayLike) -> Array:
        return self.invert_integral_beta(jax.nn.softplus(jnp.asarray(gamma)))

    def transition(self, s: ArrayLike, t: ArrayLike) -> tuple[Array, Array]:
        delta = self._integral_between(s, t)
        return jnp.exp(-0.5 * delta), jnp.sqrt(one_minus_exp(delta))


@dataclasses.dataclass(frozen=True)
class SubVPSDE(_LinearBeta):
    """Sub-VP SDE (arXiv 2011.13456, eq. 12): g² = β (1 - e^-2B), σ = 1 - e^-B."""

    def std(self, t: ArrayLike) -> Array:
        return one_minus_exp(self.integral_beta(t))

    def diffusion(self, t: ArrayLike) -> Array:
        return jnp.sqrt(self.beta(t) * one_minus_exp(2 * self.integral_beta(t)))

    def gamma(self, t: ArrayLike) -> Array:
        # σ/α = 2 sinh(B/2).
        b = self.integral_beta(t)
        return 2 * safe_log(one_minus_exp(b)) + b

    def inverse_gamma(self, gamma: ArrayLike) -> Array:
        half = 0.5 * jnp.exp(0.5 * jnp.asarray(gamma))
        return self.invert_integral_beta(2 * jnp.arcsinh(half))

    def transition(self, s: ArrayLike, t: ArrayLike) -> tuple[Array, Array]:
        delta = self._integral_between(s, t)
        # σ_t² - a² σ_s², factored to avoid cancellation.
        variance = one_minus_exp(delta) * one_minus_exp(delta + 2 * self.integral_beta(s))
        return jnp.exp(-0.5 * delta), jnp.sqrt(variance)


@dataclasses.dataclass(frozen=True)
class _VarianceExploding(SDE):
    """The common part of VE and RVE: f = 0, and σ grows from σ_min to σ_max.

    Attributes:
      sigma_min: the smallest σ.
      sigma_max: σ(1).
    """

    exploding = True

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    @abc.abstractmethod
    def _log_sigma_fraction(self, t: Array) -> tuple[Array, Array]:
        """(c, 1 - c) for c(t) = log(σ/σ_min)/log(σ_max/σ_min), each without cancellation."""

    @abc.abstractmethod
    def _log_sigma_fraction_between(self, s: Array, t: Array) -> Array:
        """c(t) - c(s), without cancellation."""

    @property
    def _log_range(self) -> float:
        return math.log(self.sigma_max / self.sigma_min)

    def log_mean_coeff(self, t: ArrayLike) -> Array:
        return jnp.zeros_like(jnp.asarray(t))

    def std(self, t: ArrayLike) -> Array:
        # Computed from the nearer end, where the exponent and so its error are small.
        fraction, remaining = self._log_sigma_fraction(jnp.asarray(t))
        low = self.sigma_min * jnp.exp(self._log_range * fraction)
        return jnp.where(
            fraction < remaining, low, self.sigma_max * jnp.exp(-self._log_range * remaining)
        )

    def drift_coeff(self, t: ArrayLike) -> Array:
        return jnp.zeros_like(jnp.asarray(t))

    def gamma(self, t: ArrayLike) -> Array:
        fraction, remaining = self._log_sigma_fraction(jnp.asarray(t))
        low = 2 * math.log(self.sigma_min) + 2 * self._log_range * fraction
        high = 2 * math.log(self.sigma_max) - 2 * self._log_range * remaining
        return jnp.where(fraction < remaining, low, high)

    def transition(self, s: ArrayLike, t: ArrayLike) -> tuple[Array, Array]:
        difference = self._log_sigma_fraction_between(jnp.asarray(s), jnp.asarray(t))
        noise = jnp.sqrt(one_minus_exp(2 * self._log_range * difference))
        return jnp.ones_like(difference), self.std(t) * noise

    def prior_std(self) -> float:
        return self.sigma_max


@dataclasses.dataclass(frozen=True)
class VESDE(_VarianceExploding):
    """Variance-exploding SDE (arXiv 2011.13456, eq. 9): log σ is linear in t."""

    def _log_sigma_fraction(self, t: Array) -> tuple[Array, Array]:
        return t, 1 - t

    def _log_sigma_fraction_between(self, s: Array, t: Array) -> Array:
        return t - s

    def diffusion(self, t: ArrayLike) -> Array:
        return self.std(t) * math.sqrt(2 * self._log_range)

    def inverse_gamma(self, gamma: ArrayLike) -> Array:
        return (0.5 * jnp.asarray(gamma) - math.log(self.sigma_min)) / self._log_range

    def importance_time(self, u: ArrayLike, tau: ArrayLike) -> Array:
        # g²/σ² is constant, so importance sampling is uniform sampling.
        tau = jnp.asarray(tau)
        return tau + jnp.asarray(u) * (self.T - tau)


@dataclasses.dataclass(frozen=True)
class RVESDE(_VarianceExploding):
    """Reciprocal VE SDE (arXiv 2106.05527, §5): log σ is linear in 1/t, and σ(eps) = σ_min.

    Attributes:
      eps: the time of σ_min.
    """

    eps: float = 1e-5

    @property
    def smallest_time(self) -> float:
        return self.eps

    def _log_sigma_fraction(self, t: Array) -> tuple[Array, Array]:
        span = t * (1 - self.eps)
        return (t - self.eps) / span, self.eps * (1 - t) / span

    def _log_sigma_fraction_between(self, s: Array, t: Array) -> Array:
        return self.eps / (1 - self.eps) * (t - s) / (s * t)

    def diffusion(self, t: ArrayLike) -> Array:
        rate = math.sqrt(2 * self._log_range * self.eps / (1 - self.eps))
        return self.std(t) * rate / jnp.asarray(t)

    def inverse_gamma(self, gamma: ArrayLike) -> Array:
        left = (math.log(self.sigma_max) - 0.5 * jnp.asarray(gamma)) / self._log_range
        return self.eps / (left * (1 - self.eps) + self.eps)

    def importance_time(self, u: ArrayLike, tau: ArrayLike) -> Array:
        # 1/t is uniform between 1/T and 1/τ.
        u, tau = jnp.asarray(u), jnp.asarray(tau)
        return jnp.clip(tau / ((1 - u) + u * tau), tau, self.T)

    def solver_time(self, t: ArrayLike) -> Array:
        return -1 / jnp.asarray(t)

    def time_of_solver(self, c: ArrayLike) -> Array:
        return -1 / jnp.asarray(c)


def reciprocal_vesde(sigma_min: float, sigma_max: float, truncation_time: float) -> RVESDE:
    """The reciprocal VE SDE with σ_min at the truncation time."""
    return RVESDE(sigma_min, sigma_max, eps=truncation_time)


# The SDEs that `training.sde` can name: classes and functions whose parameters are named after
# fields of a config. A config file can register more (docs/extending.md).
SDES: dict[str, Callable[..., SDE]] = {
    "vpsde": VPSDE,
    "subvpsde": SubVPSDE,
    "vesde": VESDE,
    "reciprocal_vesde": reciprocal_vesde,
}


def get_sde(config: ConfigDict) -> SDE:
    """The SDE that `config.training.sde` names."""
    return fields.call(SDES[config.training.sde], config, "training", "model")
