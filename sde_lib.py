"""SDEs with linear drift, dx = f(t) x dt + g(t) dw, for which x_t = α(t) x_0 + σ(t) z.

Every formula about an SDE is here and nowhere else. All functions of time are elementwise, keep
the shape of `t`, and are accurate in float32 on [1e-5, 1].
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from ml_collections import ConfigDict


@dataclasses.dataclass(frozen=True)
class VPSDE:
    """Variance-preserving SDE (arXiv 2011.13456, eq. 11): f = -β(t)/2, g² = β(t), β linear in t.

    Attributes:
      beta_min: β(0).
      beta_max: β(1).
      T: largest time.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    T: float = 1.0

    def beta(self, t: ArrayLike) -> Array:
        """β(t) = β₀ + t (β₁ - β₀)."""
        return self.beta_min + jnp.asarray(t) * (self.beta_max - self.beta_min)

    def integral_beta(self, t: ArrayLike) -> Array:
        """B(t) = ∫₀ᵗ β(s) ds."""
        t = jnp.asarray(t)
        return t * (self.beta_min + 0.5 * t * (self.beta_max - self.beta_min))

    def invert_integral_beta(self, b: ArrayLike) -> Array:
        """The t with B(t) = b, from the root of the quadratic that does not cancel."""
        b = jnp.asarray(b)
        slope = self.beta_max - self.beta_min
        return 2 * b / (self.beta_min + jnp.sqrt(self.beta_min**2 + 2 * slope * b))

    def mean_coeff(self, t: ArrayLike) -> Array:
        """α(t), the factor of x_0 in x_t."""
        return jnp.exp(-0.5 * self.integral_beta(t))

    def log_mean_coeff(self, t: ArrayLike) -> Array:
        """log α(t) = ∫₀ᵗ f(s) ds."""
        return -0.5 * self.integral_beta(t)

    def std(self, t: ArrayLike) -> Array:
        """σ(t), the standard deviation of x_t given x_0."""
        return jnp.sqrt(-jnp.expm1(-self.integral_beta(t)))

    def drift_coeff(self, t: ArrayLike) -> Array:
        """f(t), the factor of x in the drift."""
        return -0.5 * self.beta(t)

    def diffusion(self, t: ArrayLike) -> Array:
        """g(t)."""
        return jnp.sqrt(self.beta(t))

    def _cumulative(self, t: ArrayLike) -> Array:
        # F(t) = log(e^B - 1), an antiderivative of g²/σ². For large B, log(e^B - 1) as
        # B + log(1 - e^-B) neither overflows nor cancels; for small B, expm1 keeps the digits.
        b = self.integral_beta(t)
        small = b < 1
        below = jnp.log(jnp.expm1(jnp.where(small, b, 1.0)))
        above = b + jnp.log1p(-jnp.exp(-jnp.where(small, 1.0, b)))
        return jnp.where(small, below, above)

    def importance_normalizer(self, tau: ArrayLike) -> Array:
        """Z_τ = ∫_τ^T g²/σ² dt, the normaliser of the importance distribution of time."""
        return self._cumulative(self.T) - self._cumulative(tau)

    def importance_time(self, u: ArrayLike, tau: ArrayLike) -> Array:
        """Times with density ∝ g²/σ² on [τ, T], from uniform `u` in [0, 1] (arXiv 2106.05527, §3).

        Args:
          u: uniforms of any shape.
          tau: truncation, broadcast against `u`.

        Returns:
          t = F⁻¹(F(τ) + u Z_τ), of the broadcast shape.
        """
        y = self._cumulative(tau) + jnp.asarray(u) * self.importance_normalizer(tau)
        t = self.invert_integral_beta(jax.nn.softplus(y))
        return jnp.clip(t, jnp.asarray(tau), self.T)

    def discretize(self, t: ArrayLike, dt: ArrayLike) -> tuple[Array, Array]:
        """One forward step of length `dt` ending at `t`: x ← a x + G z.

        Returns:
          (a, G) = (sqrt(1 - β dt), sqrt(β dt)), DDPM's chain (arXiv 2006.11239).
        """
        step = self.beta(t) * dt
        return jnp.sqrt(1 - step), jnp.sqrt(step)

    def prior_std(self) -> float:
        """Standard deviation of the prior p_T, a centred normal distribution."""
        return 1.0

    def prior_logp(self, z: Array) -> Array:
        """log p_T of each row of `z` (N, ...), in nats, shape (N,)."""
        dims = np.prod(z.shape[1:])
        scale = self.prior_std()
        sq = jnp.sum(z**2, axis=tuple(range(1, z.ndim)))
        return -0.5 * (dims * np.log(2 * np.pi * scale**2) + sq / scale**2)


def get_sde(config: ConfigDict) -> VPSDE:
    """The SDE that `config.training.sde` names."""
    return VPSDE(beta_min=config.model.beta_min, beta_max=config.model.beta_max)
