"""The score function of a network: the one place where a network and an SDE meet."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from sde_lib import SDE, expand


def preconditioning(sde: SDE, t: Array, sigma_data: float) -> tuple[Array, Array, Array]:
    """Coefficients (c_in, a, b) of the velocity parametrisation's score a x + b F(c_in x, t).

    EDM's preconditioning (arXiv 2206.00364, §5) for x_t = α x_0 + σ z and data of standard
    deviation σ_d: the denoised image is D(x, t) = c_skip x + c_out F(c_in x, t) with

        c_in = 1/√(α² σ_d² + σ²),  c_skip = α σ_d² c_in²,  c_out = σ σ_d c_in.

    The score is (α D - x)/σ², which the coefficients give without a difference of nearly equal
    numbers: a = -c_in² and b = α σ_d c_in/σ. F = 0 is exact for data N(0, σ_d² I). On VP with
    σ_d = 1, -F is the velocity of arXiv 2202.00512: D = α x + σ F; on VE this is EDM's network.
    """
    alpha, std = sde.mean_coeff(t), sde.std(t)
    c_in = jax.lax.rsqrt((alpha * sigma_data) ** 2 + std**2)
    return c_in, -(c_in**2), alpha * sigma_data * c_in / std


@dataclasses.dataclass(frozen=True)
class ScoreModel:
    """A network and what makes its output the score s_θ(x, t).

    A model itself is a function (params, labels, guidance) → score function, as samplers and
    likelihoods take it; `for_training` is the form that training takes. But for the first two, its
    attributes are fields of `config.model` and `config.training`.

    Attributes:
      sde: the SDE.
      network: `.apply({"params": p}, x, time_cond, …)`. If it `sees_sigma`, its time is σ(t) for VE
        and RVE, and it divides its output by σ(t) itself. If it has a `c_noise`, its time there is
        c_noise(σ(t)).
      parametrization: velocity, if the output is F of `preconditioning`; or noise, of which the
        score is -output/σ(t). For VE and RVE (`sde.exploding`) "noise" is the score itself.
      sigma_data: σ_d of the velocity parametrisation.
      scale_by_sigma: for VE and RVE the output is divided by σ(t).
      num_classes: the label that stands for none.
      truncation_time: ε, the time of the last of VE's and RVE's noise levels.
      unbounded_parametrization: the network's time is `sde.unbounded_time`, with the constant
        `stabilizing_constant`.
    """

    sde: SDE
    network: nn.Module
    parametrization: str = "noise"
    sigma_data: float = 1.0
    scale_by_sigma: bool = False
    num_classes: int = 0
    truncation_time: float = 1e-5
    unbounded_parametrization: bool = False
    stabilizing_constant: float = 1e-3

    def __call__(
        self, params: Any, labels: Array | None = None, guidance: float = 0.0
    ) -> Callable[[Array, Array], Array]:
        """The score function (x (N, H, W, C), t (N,)) → (N, H, W, C) float32.

        Args:
          params: the network's parameters.
          labels: classes (N,) int32, `num_classes` for no label; None: no label for all images.
          guidance: w of classifier-free guidance (arXiv 2207.12598), the noise's
            ε̂(x, c) + w (ε̂(x, c) - ε̂(x)), and so the score's. Both are computed as one batch of
            twice the size. Without labels it changes nothing.
        """
        if labels is None or not guidance:
            return self._score_fn(params, labels)
        both = jnp.concatenate([labels, jnp.full_like(labels, self.num_classes)])
        score_of_both = self._score_fn(params, both)

        def guided(x: Array, t: Array) -> Array:
            x, t = jnp.concatenate([x, x]), jnp.concatenate([t, t])
            with_label, without = jnp.split(score_of_both(x, t), 2)
            return with_label + guidance * (with_label - without)

        return guided

    def for_training(self, params: Any, labels: Array | None = None) -> Callable[..., Array]:
        """The same with dropout: (x, t, dropout keys (N,)); one key serves a batch, too."""
        return self._score_fn(params, labels, train=True)

    def _score_fn(
        self, params: Any, labels: Array | None, train: bool = False
    ) -> Callable[..., Array]:
        told = {} if labels is None else {"labels": labels}

        def score_fn(x: Array, t: Array, dropout_keys: Array | None = None) -> Array:
            if dropout_keys is not None and dropout_keys.ndim == 0:
                dropout_keys = jax.random.split(dropout_keys, x.shape[0])
            options: dict[str, Any] = {"train": train, "dropout_keys": dropout_keys, **told}
            time_cond = self.time_cond(t)

            def network(x: Array) -> Array:
                out = self.network.apply({"params": params}, x, time_cond, **options)
                return jnp.asarray(out, jnp.float32)

            return self._to_score(network, x, t)

        return score_fn

    def _to_score(self, network: Callable[[Array], Array], x: Array, t: Array) -> Array:
        if self.parametrization == "velocity":
            c_in, a, b = (expand(c, x) for c in preconditioning(self.sde, t, self.sigma_data))
            return a * x + b * network(c_in * x)
        if not self.sde.exploding:
            return -network(x) / expand(self.sde.std(t), x)
        divides = self.scale_by_sigma and not self._sees_sigma
        return network(x) / expand(self.sde.std(t), x) if divides else network(x)

    def time_cond(self, t: Array) -> Array:
        """The network's time for t (N,): scaled to 0 … 999, or σ(t), or a function of σ(t)."""
        sde = self.sde
        if not sde.exploding:
            unbounded = self.unbounded_parametrization
            return 999 * (sde.unbounded_time(t, self.stabilizing_constant) if unbounded else t)
        if self._sees_sigma:
            return sde.std(t)
        if hasattr(self.network, "c_noise"):
            return self.network.c_noise(sde.std(t))
        # The index in 1,000 noise levels, from the largest down, equally spaced in log σ and so
        # in γ.
        top, bottom = sde.gamma(sde.T), sde.gamma(self.truncation_time)
        return 999 * (top - sde.gamma(t)) / (top - bottom)

    @property
    def _sees_sigma(self) -> bool:
        return getattr(self.network, "sees_sigma", False)


@dataclasses.dataclass(frozen=True)
class TwoExperts:
    """Two models with one SDE (arXiv 2511.19434): the score of one below a time, else the other's.

    A function as `ScoreModel` is, whose parameters are {"below": those of one model, "above": those
    of the other, "t": the time}. Both networks are evaluated at all times.
    """

    below: Callable[..., Callable[[Array, Array], Array]]
    above: Callable[..., Callable[[Array, Array], Array]]

    def __call__(
        self, params: Any, labels: Array | None = None, guidance: float = 0.0
    ) -> Callable[[Array, Array], Array]:
        """The score function, as that of `ScoreModel`."""
        below = self.below(params["below"], labels, guidance)
        above = self.above(params["above"], labels, guidance)
        return lambda x, t: jnp.where(expand(t < params["t"], x), below(x, t), above(x, t))
