"""Group normalisation (arXiv 1803.08494) with SiLU and dropout, in as few passes as possible.

Only two sums and one elementwise function, forward and backward, go over the pixels; everything
else has the shape (N, C). The gradient is explicit because XLA would otherwise store the normalised
values and the sigmoid for it; on a CPU it is faster to compute these again.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.custom_derivatives import SymbolicZero, linear_call

EPSILON = 1e-6


class Options(NamedTuple):
    """The number of groups, whether SiLU follows, and the rate of the dropout after that."""

    groups: int
    silu: bool
    rate: float = 0.0


def _mix(x: Array) -> Array:
    """A bijective hash of 32-bit words: the finaliser of MurmurHash3."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))


def keeps(key: Sequence[Array], pixel: Array, channel: Array, rate: float) -> Array:
    """The values that dropout keeps, by a hash that is several times faster than Threefry.

    Args:
      key: two words, (…) uint32.
      pixel, channel: indices of the values, uint32; the four arrays are broadcast.
      rate: the probability of being dropped.

    Returns:
      (…) bool.
    """
    rows, columns = (
        _mix(_mix(place + word) + word) for place, word in zip((pixel, channel), key, strict=True)
    )
    h = (rows ^ columns) * np.uint32(0x9E3779B1)
    h = (h ^ (h >> np.uint32(15))) * np.uint32(0x85EBCA77)
    return h >= np.uint32(round(rate * 2**32))


def _sum(x: Array) -> Array:
    """Sum over the pixels: (N, H, W, C) → (N, C)."""
    x = x.reshape(x.shape[0], -1, x.shape[-1])
    if jax.default_backend() == "cpu":  # XLA vectorises additions there, but not sums
        while x.shape[1] % 4 == 0:
            first, second, third, fourth = jnp.split(x, 4, axis=1)
            x = (first + second) + (third + fourth)
    return jnp.sum(x, axis=1)


def _spread(value: Array) -> Array:
    """(N, C) → (N, 1, 1, C)."""
    return value[:, None, None, :]


@jax.custom_jvp
def _moments(x: Array) -> tuple[Array, Array]:
    """Sums of x and of its square over the pixels: (N, H, W, C) → (N, C) each."""
    return _sum(x), _sum(x * x)


@_moments.defjvp
def _moments_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Any, Any]:
    def push(x: Array, dx: Array) -> tuple[Array, Array]:
        return _sum(dx), _sum(2 * x * dx)

    def pull(x: Array, gradients: tuple[Array, Array]) -> Array:
        of_sum, of_square = gradients
        return _spread(of_sum) + 2 * x * _spread(of_square)

    return _moments(*primals), linear_call(push, pull, *primals, *tangents)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def _affine(x: Array, factor: Array, shift: Array, silu: bool) -> Array:
    """x · factor + shift, or its SiLU: (N, H, W, C) and (N, C) twice → (N, H, W, C)."""
    y = x * _spread(factor) + _spread(shift)
    return nn.silu(y) if silu else y


@functools.partial(_affine.defjvp, symbolic_zeros=True)
def _affine_jvp(
    silu: bool, primals: tuple[Array, Array, Array], tangents: tuple[Any, Any, Any]
) -> tuple[Array, Array]:
    # Only what varies is an argument of the linear function; x may be a constant.
    varies = [not isinstance(tangent, SymbolicZero) for tangent in tangents]

    def slope(x: Array, factor: Array, shift: Array) -> Array | float:
        if not silu:
            return 1.0
        y = x * _spread(factor) + _spread(shift)
        # In this form XLA does not reuse the sigmoid of the forward pass, which it would store.
        sigmoid = 0.5 + 0.5 * jnp.tanh(0.5 * y)
        return sigmoid * (1 + y * (1 - sigmoid))

    def push(primals: Any, tangents: Any) -> Array:
        x, factor, _ = primals
        given = iter(tangents)
        dx, dfactor, dshift = (
            next(given) if varied else jnp.zeros_like(primal)
            for varied, primal in zip(varies, primals, strict=True)
        )
        return slope(*primals) * (dx * _spread(factor) + x * _spread(dfactor) + _spread(dshift))

    def pull(primals: Any, gradient: Array) -> tuple[Array, ...]:
        x, factor, _ = primals
        gradient = gradient * slope(*primals)
        every = gradient * _spread(factor), _sum(gradient * x), _sum(gradient)
        return tuple(itertools.compress(every, varies))

    tangents = tuple(itertools.compress(tangents, varies))
    return _affine(*primals, silu), linear_call(push, pull, primals, tangents)


def norm_act(
    options: Options,
    x: Array,
    scale: Array,
    bias: Array,
    shift: Array | None = None,
    keys: Array | None = None,
) -> Array:
    """Group normalisation of x + shift, followed by SiLU and dropout.

    Args:
      options: the number of groups, whether SiLU follows, and the dropout rate.
      x: features, (N, H, W, C).
      scale, bias: applied to the normalised features, (C,).
      shift: added to each image's features first, (N, C).
      keys: for dropout, two words for each image, (N, 2) uint32; None: nothing is dropped.

    Returns:
      (N, H, W, C) with x's dtype; the computation is in float32, or in x's dtype if that is wider.
    """
    _, h, w, channels = x.shape
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    wide = wide if shift is None else wide + _spread(shift.astype(wide.dtype))

    def group_mean(total: Array) -> Array:
        size = channels // options.groups
        mean = total.reshape(len(x), options.groups, size).sum(-1) / (h * w * size)
        return jnp.repeat(mean, size, axis=-1)

    mean, square = (group_mean(total) for total in _moments(wide))
    factor = scale * jax.lax.rsqrt(jnp.maximum(square - mean**2, 0) + EPSILON)
    y = _affine(wide, factor, bias - mean * factor, options.silu)
    if keys is not None:
        pixel = jnp.arange(h * w, dtype=jnp.uint32).reshape(h, w, 1)
        channel = jnp.arange(channels, dtype=jnp.uint32)
        keep = keeps(list(keys.T[:, :, None, None, None]), pixel, channel, options.rate)
        y = jnp.where(keep, y / (1 - options.rate), 0)
    return y.astype(x.dtype)
