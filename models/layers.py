"""Layers of the score networks, NHWC. The architecture is score_sde's DDPM++ (arXiv 2011.13456)."""

import math
import zlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

Dtype = Any


def variance_scaling(scale: float = 1.0) -> nn.initializers.Initializer:
    """Uniform fan-average initialisation; 0 becomes 1e-10, so that it can still learn."""
    return nn.initializers.variance_scaling(scale or 1e-10, "fan_avg", "uniform")


def timestep_embedding(labels: Array, dim: int, max_positions: float = 10_000.0) -> Array:
    """Sinusoidal embedding (arXiv 1706.03762) of `labels` (N,): (N, dim) float32, dim even."""
    half = dim // 2
    frequencies = jnp.exp(-math.log(max_positions) / (half - 1) * jnp.arange(half))
    angles = labels.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def upsample(x: Array) -> Array:
    """Twice the size, nearest neighbour: (N, H, W, C) → (N, 2H, 2W, C)."""
    return x.repeat(2, axis=1).repeat(2, axis=2)


def downsample(x: Array) -> Array:
    """Half the size, mean of each 2×2 block: (N, H, W, C) → (N, H/2, W/2, C)."""
    n, h, w, c = x.shape
    return x.reshape(n, h // 2, 2, w // 2, 2, c).mean(axis=(2, 4))


class Conv(nn.Conv):
    """Convolution with "same" padding and this architecture's initialisation."""

    kernel_size: tuple[int, int] = (3, 3)
    padding: str = "SAME"
    kernel_init: nn.initializers.Initializer = variance_scaling()


def group_norm(x: Array, dtype: Dtype) -> Array:
    """Group normalisation with min(C/4, 32) groups; its statistics are float32."""
    return nn.GroupNorm(num_groups=min(x.shape[-1] // 4, 32), epsilon=1e-6, dtype=dtype)(x)


class Dropout(nn.Module):
    """Dropout whose mask is a function of each image's own key, so that sharding can't change it.

    Every layer folds its own path into the keys.
    """

    rate: float

    @nn.compact
    def __call__(self, x: Array, keys: Array | None) -> Array:
        """Drop from `x` (N, ...) with `keys` (N,); None: x unchanged."""
        if keys is None or self.rate == 0:
            return x
        layer = zlib.crc32("/".join(self.path).encode())
        keys = jax.vmap(lambda key: jax.random.fold_in(key, layer))(keys)
        keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - self.rate, x.shape[1:]))(keys)
        return jnp.where(keep, x / (1 - self.rate), 0).astype(x.dtype)


class AttnBlock(nn.Module):
    """Single-head self-attention over the pixels, with a residual connection."""

    skip_rescale: bool
    init_scale: float
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """(N, H, W, C) → the same."""
        n, h, w, c = x.shape
        y = group_norm(x, self.dtype).reshape(n, h * w, c)
        dense = lambda scale: nn.Dense(  # noqa: E731
            c, kernel_init=variance_scaling(scale), dtype=self.dtype
        )
        query, key, value = (dense(0.1)(y)[:, :, None, :] for _ in range(3))
        y = jax.nn.dot_product_attention(query, key, value)[:, :, 0, :]
        x = x + dense(self.init_scale)(y).reshape(x.shape)
        return x / math.sqrt(2) if self.skip_rescale else x


class ResBlock(nn.Module):
    """BigGAN's residual block (arXiv 1809.11096) with a time embedding, optionally resampling.

    Attributes:
      features: channels of the output.
      resample: None, or `upsample` or `downsample`.
    """

    features: int
    dropout: float
    skip_rescale: bool
    init_scale: float
    resample: Any = None
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, temb: Array, dropout_keys: Array | None) -> Array:
        """(N, H, W, C), with time embedding (N, E) and a key an image (None: no dropout)."""
        y = nn.silu(group_norm(x, self.dtype))
        if self.resample is not None:
            x, y = self.resample(x), self.resample(y)
        y = Conv(self.features, dtype=self.dtype)(y)
        y += nn.Dense(self.features, kernel_init=variance_scaling(), dtype=self.dtype)(
            nn.silu(temb)
        )[:, None, None, :]
        y = nn.silu(group_norm(y, self.dtype))
        y = Dropout(self.dropout)(y, dropout_keys)
        y = Conv(self.features, kernel_init=variance_scaling(self.init_scale), dtype=self.dtype)(y)
        if x.shape[-1] != self.features or self.resample is not None:
            x = Conv(self.features, kernel_size=(1, 1), dtype=self.dtype)(x)
        return (x + y) / math.sqrt(2) if self.skip_rescale else x + y
