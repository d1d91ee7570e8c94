"""NCSNv2 (arXiv 2006.09011): a RefineNet without a time embedding, for the VE SDEs."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from models import layers
from models.layers import Dtype

# Stages on the way down, for images of 64, 128 and 256 pixels: (channels as a multiple of nf,
# dilation). Each stage but the first halves the resolution by pooling, or is dilated instead.
STAGES = {
    "ncsnv2_64": ((1, 1), (2, 1), (2, 2), (2, 4)),
    "ncsnv2_128": ((1, 1), (2, 1), (2, 1), (4, 2), (4, 4)),
    "ncsnv2_256": ((1, 1), (2, 1), (2, 1), (2, 1), (4, 2), (4, 4)),
}


def _conv(features: int, dtype: Dtype, size: int = 3, dilation: int = 1, bias: bool = True) -> Any:
    return layers.Conv(
        features,
        (size, size),
        dilation=dilation,
        use_bias=bias,
        kernel_init=nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
        dtype=dtype,
    )


def _mean_pool(x: Array) -> Array:
    return nn.avg_pool(x, (2, 2), (2, 2))


class InstanceNormPlus(nn.Module):
    """Instance normalisation that adds normalised channel means (arXiv 1907.05600, B.1)."""

    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """(N, H, W, C) → the same."""
        x = x.astype(jnp.float32)

        def around_one(key: Any, shape: Any) -> Any:
            return 1 + 0.02 * jax.random.normal(key, shape)

        alpha, gamma = (self.param(n, around_one, x.shape[-1:]) for n in ("alpha", "gamma"))
        beta = self.param("beta", nn.initializers.zeros, x.shape[-1:])
        means = jnp.mean(x, axis=(1, 2), keepdims=True)
        spread = jnp.var(means, axis=-1, keepdims=True, ddof=1)
        shift = (means - jnp.mean(means, axis=-1, keepdims=True)) / jnp.sqrt(spread + 1e-5)
        normal = (x - means) / jnp.sqrt(jnp.var(x, axis=(1, 2), keepdims=True) + 1e-5)
        return (gamma * (normal + alpha * shift) + beta).astype(self.dtype)


class ResidualBlock(nn.Module):
    """Two convolutions with a shortcut; `down` halves the resolution, unless dilated."""

    features: int
    down: bool
    dilation: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """(N, H, W, C) → (N, H', W', features)."""
        pool = self.down and self.dilation == 1
        y = nn.elu(InstanceNormPlus(self.dtype)(x))
        first = x.shape[-1] if self.down else self.features
        y = _conv(first, self.dtype, dilation=self.dilation)(y)
        y = nn.elu(InstanceNormPlus(self.dtype)(y))
        y = _conv(self.features, self.dtype, dilation=self.dilation)(y)
        if self.down or x.shape[-1] != self.features:
            size = 3 if self.dilation > 1 else 1
            x = _conv(self.features, self.dtype, size, self.dilation)(x)
        return _mean_pool(x) + _mean_pool(y) if pool else x + y


def _residual_conv_unit(x: Array, blocks: int, dtype: Dtype) -> Array:
    for _ in range(blocks):
        y = x
        for _ in range(2):
            y = _conv(x.shape[-1], dtype, bias=False)(nn.elu(y))
        x = x + y
    return x


def _resize(x: Array, size: int) -> Array:
    """Resize bilinearly to size × size, with the centres of the corner pixels aligned."""
    if x.shape[1] == size:
        return x
    scale = jnp.full(2, (size - 1) / (x.shape[1] - 1))
    shape = (len(x), size, size, x.shape[-1])
    return jax.image.scale_and_translate(
        x, shape, (1, 2), scale, 0.5 - 0.5 * scale, "linear", antialias=False
    )


class RefineBlock(nn.Module):
    """Multi-resolution fusion and chained pooling (arXiv 1611.06612)."""

    features: int
    end: bool = False
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, inputs: Sequence[Array]) -> Array:
        """Features of one or two resolutions → (N, H, W, features) at the first resolution."""
        hs = [_residual_conv_unit(x, 2, self.dtype) for x in inputs]
        if len(hs) > 1:
            size = hs[0].shape[1]
            h = sum(_resize(_conv(self.features, self.dtype)(h), size) for h in hs)
        else:
            h = hs[0]
        h = path = nn.elu(h)
        for _ in range(2):
            path = nn.max_pool(path, (5, 5), padding="SAME")
            path = _conv(self.features, self.dtype, bias=False)(path)
            h = h + path
        return _residual_conv_unit(h, 3 if self.end else 1, self.dtype)


class NCSNv2(nn.Module):
    """The NCSNv2 network, with the number of stages for a given image size.

    Attributes:
      stages: one of STAGES.
      nf: number of channels at full resolution.
      centered: whether the data are in [-1, 1]; data in [0, 1] are scaled to [-1, 1] first.
      dtype: compute dtype; parameters are float32.
    """

    stages: tuple[tuple[int, int], ...]
    nf: int
    centered: bool = False
    dtype: Dtype = jnp.float32
    sees_sigma = True  # see models.score.ScoreModel

    @nn.compact
    def __call__(
        self, x: Array, time_cond: Array, train: bool = False, dropout_keys: Array | None = None
    ) -> Array:
        """The score of images (N, H, W, C) whose noise levels σ are `time_cond` (N,), float32.

        There is no dropout; `train` and `dropout_keys` are accepted as by the other networks.
        """
        del train, dropout_keys
        h = _conv(self.nf, self.dtype)(x if self.centered else 2 * x - 1)
        hs = []
        for i, (mult, dilation) in enumerate(self.stages):
            h = ResidualBlock(mult * self.nf, i > 0, dilation, self.dtype)(h)
            h = ResidualBlock(mult * self.nf, False, dilation, self.dtype)(h)
            hs.append(h)
        # Each refinement block has the width of the stage that receives its result.
        widths = [mult * self.nf for mult, _ in self.stages]
        h = RefineBlock(widths[-1], dtype=self.dtype)([hs[-1]])
        for i in range(len(self.stages) - 2, -1, -1):
            width = widths[max(i - 1, 0)]
            h = RefineBlock(width, end=i == 0, dtype=self.dtype)([hs[i], h])
        h = nn.elu(InstanceNormPlus(self.dtype)(h))
        h = _conv(x.shape[-1], self.dtype)(h).astype(jnp.float32)
        return h / time_cond[:, None, None, None]
