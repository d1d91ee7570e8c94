"""EDM's form of DDPM++ and NCSN++ (arXiv 2206.00364, appendices C and F)."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from models import layers
from models.ncsnpp import NCSNpp


class EDM(NCSNpp):
    """`NCSNpp` as in EDM: told another function of the noise, and labels before the embedding.

    Its blocks are those of `NCSNpp`, whose attributes it has.

    Attributes:
      parametrization: that of `models.score.ScoreModel`, on which c_noise depends.
    """

    parametrization: str = "velocity"

    @property
    def sees_sigma(self) -> bool:
        """Its time is not σ(t), but `c_noise` of it."""
        return False

    def c_noise(self, sigma: Array) -> Array:
        """The network's time for the noise σ (N,) of VE and RVE, by EDM's table 1."""
        return jnp.log(sigma) / 4 if self.parametrization == "velocity" else jnp.log(sigma / 2)

    def _embed(self, time_cond: Array, labels: Array | None) -> Array:
        """Times and labels (N,) → their embedding (N, E)."""
        if self.embedding_type == "fourier":
            temb = layers.GaussianFourierProjection(self.nf, self.fourier_scale)(time_cond)
        else:
            temb = layers.timestep_embedding(time_cond, self.nf)
        if self.num_classes:
            chosen = jnp.full(len(temb), self.num_classes) if labels is None else labels
            told = math.sqrt(self.num_classes) * jax.nn.one_hot(chosen, self.num_classes)
            temb = temb + layers.Dense(temb.shape[-1], dtype=self.dtype, name="labels")(told)
        temb = layers.Dense(4 * self.nf, dtype=self.dtype)(temb)
        return layers.Dense(4 * self.nf, dtype=self.dtype)(nn.silu(temb))
