"""Layers of the score networks (arXiv 2011.13456), in NHWC layout."""

import functools
import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import linear_call

from models import norm_kernels, normalization

Dtype = Any

# Rematerialisation policy: keep the results of convolutions, and compute everything else again.
SAVE_CONVOLUTIONS = jax.checkpoint_policies.save_only_these_names("convolution")


def variance_scaling(scale: float = 1.0) -> nn.initializers.Initializer:
    """Uniform fan-average initialisation; a scale of 0 is replaced by 1e-10."""
    return nn.initializers.variance_scaling(scale or 1e-10, "fan_avg", "uniform")


def timestep_embedding(times: Array, dim: int, max_positions: float = 10_000.0) -> Array:
    """Sinusoidal embedding (arXiv 1706.03762) of `times` (N,): (N, dim) float32, dim even."""
    half = dim // 2
    frequencies = jnp.exp(-math.log(max_positions) / (half - 1) * jnp.arange(half))
    angles = times.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


class GaussianFourierProjection(nn.Module):
    """Random Fourier features (arXiv 2006.10739) of a scalar; the frequencies are not trained."""

    features: int
    scale: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """(N,) → (N, 2 × features), float32."""
        frequencies = self.param("W", nn.initializers.normal(self.scale), (self.features,))
        angles = 2 * math.pi * x.astype(jnp.float32)[:, None] * jax.lax.stop_gradient(frequencies)
        return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def fourier_features(x: Array) -> Array:
    """Append sines and cosines of 128πx and 256πx (arXiv 2107.00630): (…, C) → (…, 5C)."""
    waves = [f(scale * math.pi * x) for scale in (128, 256) for f in (jnp.sin, jnp.cos)]
    return jnp.concatenate([x, *waves], axis=-1)


def _filter_axis(
    x: Array, taps: Sequence[float], axis: int, padding: tuple[int, int], up: int, down: int
) -> Array:
    """Insert zeros, pad, convolve with `taps` and keep every `down`-th value, along one axis.

    `up - 1` zeros are inserted after each value. The convolution is a sum of slices, which is
    faster than a grouped convolution on every device.
    """
    size, count = x.shape[axis], len(taps)
    out_size = (size * up + sum(padding) - count) // down + 1
    # Value j is a sum over taps k of u[j * down + k - padding[0]]; u is x with zeros inserted.
    widths = [(0, 0)] * x.ndim
    margin = count + max(padding)
    widths[axis] = (margin, margin)
    padded = jnp.pad(x, widths)
    phases = []
    for phase in range(up):
        rows = -(-(out_size - phase) // up)
        total = jnp.zeros((), x.dtype)
        for k, tap in enumerate(reversed(taps)):
            offset = phase * down + k - padding[0]
            if offset % up == 0:
                start = margin + offset // up
                total += tap * jax.lax.slice_in_dim(
                    padded, start, start + (rows - 1) * down + 1, down, axis
                )
        phases.append(total)
    stacked = jnp.stack(phases, axis=axis + 1)
    return stacked.reshape(*x.shape[:axis], out_size, *x.shape[axis + 1 :])


def fir_filter(
    x: Array, kernel: Sequence[float], padding: tuple[int, int], up: int = 1, down: int = 1
) -> Array:
    """Upsample by zero insertion, apply a separable FIR filter, and downsample (N, H, W, C).

    The taps are scaled to have the sum `up` along each axis, which preserves the mean. At least one
    of `up` and `down` is 1.
    """
    taps = [up * tap / sum(kernel) for tap in kernel]
    x = _filter_axis(x, taps, 1, padding, up, down)
    return _filter_axis(x, taps, 2, padding, up, down)


def upsample(x: Array, fir_kernel: Sequence[float] = ()) -> Array:
    """Double the size by nearest neighbour or an FIR filter: (N, H, W, C) → (N, 2H, 2W, C)."""
    if fir_kernel:
        rest = len(fir_kernel) - 2
        return fir_filter(x, fir_kernel, ((rest + 1) // 2 + 1, rest // 2), up=2)
    return x.repeat(2, axis=1).repeat(2, axis=2)


def downsample(x: Array, fir_kernel: Sequence[float] = ()) -> Array:
    """Halve the size by 2×2 means or an FIR filter: (N, H, W, C) → (N, H/2, W/2, C)."""
    if fir_kernel:
        rest = len(fir_kernel) - 2
        return fir_filter(x, fir_kernel, ((rest + 1) // 2, rest // 2), down=2)
    n, h, w, c = x.shape
    return x.reshape(n, h // 2, 2, w // 2, 2, c).mean(axis=(2, 4))


def fold(x: Array, size: int) -> Array:
    """Make each size×size pixels one position: (N, H, W, C) → (N, H/size, W/size, C size²)."""
    if size == 1:
        return x
    n, h, w, c = x.shape
    x = x.reshape(n, h // size, size, w // size, size, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(n, h // size, w // size, size * size * c)


def unfold(x: Array, size: int) -> Array:
    """Undo `fold`: (N, H, W, C size²) → (N, H size, W size, C)."""
    if size == 1:
        return x
    n, h, w, c = x.shape
    x = x.reshape(n, h, w, size, size, c // size**2).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(n, h * size, w * size, c // size**2)


def add_bias(y: Array, bias: Array) -> Array:
    """y + bias in y's dtype: (…, C) and (C,) → (…, C).

    The bias's gradient is a sum over all pixels of a batch, taken in the bias's own dtype: in
    bfloat16 it would stop to grow, and of 128 images of 32² can be a third of what it should be.
    """

    def spread(_: Any, bias: Array) -> Array:
        return jnp.broadcast_to(bias.astype(y.dtype), y.shape)

    def gather(_: Any, dy: Array) -> Array:
        return dy.astype(bias.dtype).sum(range(dy.ndim - 1))

    return y + linear_call(spread, gather, (), bias)


class Dense(nn.Module):
    """A dense layer with this architecture's initialisation, and `add_bias`, unlike Flax's."""

    features: int
    kernel_init: nn.initializers.Initializer = variance_scaling()
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """(…, C) → (…, features)."""
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return add_bias(jnp.tensordot(x.astype(self.dtype), kernel.astype(self.dtype), 1), bias)


class Conv(nn.Module):
    """Convolution with "same" padding and this architecture's initialisation.

    Attributes:
      gain: a factor of the result; it is applied to the kernel, which costs nothing.
      precision: of the products, as of `jax.lax.conv`; None: the default of the device.
    """

    features: int
    kernel_size: tuple[int, int] = (3, 3)
    strides: tuple[int, int] = (1, 1)
    dilation: int = 1
    padding: Any = "SAME"
    use_bias: bool = True
    kernel_init: nn.initializers.Initializer = variance_scaling()
    gain: float = 1.0
    dtype: Dtype = jnp.float32
    precision: Any = None

    @nn.compact
    def __call__(self, x: Array, apart: bool = False) -> Any:
        """(N, H, W, C) → (N, H', W', features); with `apart`, the pair of that and the bias."""
        shape = (*self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape)
        x, kernel = x.astype(self.dtype), (self.gain * kernel).astype(self.dtype)
        if shape[:2] == (1, 1) and self.strides == (1, 1) and jax.default_backend() == "cpu":
            # There XLA's convolution takes twice a matrix product's time for the gradient.
            flat = x.reshape(-1, x.shape[-1])
            y = jnp.matmul(flat, kernel[0, 0], precision=self.precision)
            y = y.reshape(*x.shape[:-1], self.features)
        else:
            y = jax.lax.conv_general_dilated(
                x,
                kernel,
                self.strides,
                self.padding,
                rhs_dilation=(self.dilation, self.dilation),
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                precision=self.precision,
            )
        y = checkpoint_name(y, "convolution")
        if not self.use_bias:
            return y
        bias = self.gain * self.param("bias", nn.initializers.zeros, (self.features,))
        return (y, bias) if apart else add_bias(y, bias)


class ResampleConv(nn.Module):
    """Doubles (`up`) or halves the size, with a 3×3 convolution."""

    features: int
    up: bool
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """(N, H, W, C) → (N, 2H, 2W, features) or (N, H/2, W/2, features)."""
        if self.up:
            return Conv(self.features, dtype=self.dtype)(upsample(x))
        padding = ((0, 1), (0, 1))
        return Conv(self.features, strides=(2, 2), padding=padding, dtype=self.dtype)(x)


class FIRConv(nn.Module):
    """Doubles (`up`) or halves the size, with a 3×3 convolution and an FIR filter."""

    features: int
    up: bool
    fir_kernel: tuple[float, ...]
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """(N, H, W, C) → (N, 2H, 2W, features) or (N, H/2, W/2, features)."""
        kernel = self.param("kernel", variance_scaling(), (3, 3, x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        dims = ("NHWC", "HWIO", "NHWC")
        if self.up:
            rest = len(self.fir_kernel) - 4  # the transposed convolution adds 2
            x = jax.lax.conv_general_dilated(
                x, kernel, (1, 1), [(2, 2)] * 2, lhs_dilation=(2, 2), dimension_numbers=dims
            )
            # Zeros were inserted, so the filter's taps must sum to 2 along each axis.
            x = 4 * fir_filter(x, self.fir_kernel, ((rest + 1) // 2 + 1, rest // 2 + 1))
        else:
            rest = len(self.fir_kernel)
            x = fir_filter(x, self.fir_kernel, ((rest + 1) // 2, rest // 2))
            x = jax.lax.conv_general_dilated(x, kernel, (2, 2), "VALID", dimension_numbers=dims)
        return add_bias(x, bias)


class Combine(nn.Module):
    """Applies a 1×1 convolution to a skip from the pyramid and joins it to the features."""

    method: str
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, skip: Array, h: Array) -> Array:
        """(N, H, W, C') and (N, H, W, C) → (N, H, W, C), or 2C for "cat"."""
        skip = Conv(h.shape[-1], kernel_size=(1, 1), dtype=self.dtype)(skip)
        return jnp.concatenate([skip, h], axis=-1) if self.method == "cat" else skip + h


class GroupNorm(nn.Module):
    """Group normalisation with min(C/4, 32) groups and float32 statistics, SiLU and dropout.

    Attributes:
      silu: whether SiLU follows.
      rate: the rate of the dropout after it.
    """

    silu: bool = True
    rate: float = 0.0
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Array,
        shift: Array | None = None,
        keys: Array | None = None,
        train: bool = False,
    ) -> Array:
        """(N, H, W, C) → the same shape; `shift` (N, C) is added first; `keys` are for dropout."""
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        options = normalization.Options(min(channels // 4, 32), self.silu, self.rate)
        return norm_kernels.norm_act(
            options, x.astype(self.dtype), scale, bias, shift, keys, train=train
        )


class DropoutKeys(nn.Module):
    """Derives the keys of one dropout layer by folding its module path into each image's key."""

    rate: float

    @nn.compact
    def __call__(self, keys: Array | None) -> Array | None:
        """Keys (N,) → two words for each image, (N, 2) uint32; None if nothing is dropped."""
        if keys is None or self.rate == 0:
            return None
        layer = zlib.crc32("/".join(self.path).encode())
        return jax.random.key_data(jax.vmap(lambda key: jax.random.fold_in(key, layer))(keys))


def _reduce_rows(join: Callable[[Array, Array], Array], x: Array) -> Array:
    """Join all values of each row, (…, P) → (…, 1), by halves, which XLA vectorises on a CPU."""
    while x.shape[-1] % 2 == 0:
        x = join(*jnp.split(x, 2, axis=-1))
    return functools.reduce(join, jnp.split(x, x.shape[-1], axis=-1))


def attend(query: Array, key: Array, value: Array) -> Array:
    """Attention of one head (arXiv 1706.03762): three times (N, P, C) → (N, P, C).

    The softmax is in float32, or in the arguments' dtype if that is wider.
    """
    if jax.default_backend() != "cpu":
        heads = (x[:, :, None, :] for x in (query, key, value))
        return jax.nn.dot_product_attention(*heads)[:, :, 0, :]
    # The same in fewer passes over the scores: what divides them is divided from the result.
    dtype, wide = query.dtype, jnp.promote_types(query.dtype, jnp.float32)
    query, key, value = (x.astype(wide) for x in (query, key, value))
    scores = jnp.einsum("npc,nkc->npk", query, key)
    largest = _reduce_rows(jnp.maximum, jax.lax.stop_gradient(scores))
    weights = jnp.exp((scores - largest) / math.sqrt(query.shape[-1]))
    y = jnp.einsum("npk,nkc->npc", weights, value)
    return (y / _reduce_rows(jnp.add, weights)).astype(dtype)


class AttnBlock(nn.Module):
    """Single-head self-attention over the pixels, with a residual connection."""

    skip_rescale: bool
    init_scale: float
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        """(N, H, W, C) → the same."""
        n, h, w, c = x.shape
        y = GroupNorm(silu=False, dtype=self.dtype)(x, train=train).reshape(-1, c)

        def dense(scale: Any) -> Any:
            return Dense(c, kernel_init=variance_scaling(scale), dtype=self.dtype)

        y = attend(*(dense(0.1)(y).reshape(n, h * w, c) for _ in range(3)))
        x = x + dense(self.init_scale)(y.reshape(-1, c)).reshape(x.shape)
        return x / math.sqrt(2) if self.skip_rescale else x


class ResBlock(nn.Module):
    """A residual block with a time embedding: BigGAN's (arXiv 1809.11096) or DDPM's.

    Attributes:
      features: channels of the output.
      resblock_type: "biggan", whose shortcut is a convolution and which can resample, or "ddpm",
        whose shortcut is a dense layer and which can't resample.
      resample: None, `upsample` or `downsample`.
    """

    features: int
    dropout: float
    skip_rescale: bool
    init_scale: float
    resblock_type: str = "biggan"
    resample: Callable[[Array], Array] | None = None
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Array, temb: Array, dropout_keys: Array | None, train: bool = False
    ) -> Array:
        """(N, H, W, C), embedding (N, E), dropout keys (N,) or None → (N, H', W', features)."""
        y = GroupNorm(dtype=self.dtype)(x, train=train)
        if self.resample is not None:
            x, y = self.resample(x), self.resample(y)
        y, bias = Conv(self.features, dtype=self.dtype)(y, apart=True)
        dense = Dense(self.features, dtype=self.dtype)
        shift = dense(nn.silu(temb)).astype(jnp.float32) + bias
        keys = DropoutKeys(self.dropout)(dropout_keys)
        y = GroupNorm(rate=self.dropout, dtype=self.dtype)(y, shift, keys, train=train)
        gain = 1 / math.sqrt(2) if self.skip_rescale else 1.0
        conv = functools.partial(Conv, self.features, gain=gain, dtype=self.dtype)
        y = conv(kernel_init=variance_scaling(self.init_scale))(y)
        if x.shape[-1] == self.features and self.resample is None:
            return gain * x + y
        if self.resblock_type == "biggan":
            return conv(kernel_size=(1, 1))(x) + y
        init = variance_scaling(0.1)
        return gain * Dense(self.features, kernel_init=init, dtype=self.dtype)(x) + y
