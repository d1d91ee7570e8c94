"""The kernels of `norm_kernels` in Pallas, for its Triton backend; without a GPU, interpreted.

JAX 0.11 and 0.12 have that backend, deprecated.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from models.norm_kernels import Tile
from models.normalization import EPSILON, Options, keeps


def _triton() -> Any:
    from jax.experimental.pallas import triton

    return triton


class _Part:
    """The part of an image that one program works on: all pixels of some groups, tile by tile."""

    def __init__(self, options: Options, x_ref: Any, tile: Tile) -> None:
        _, self.pixels, channels = x_ref.shape
        width, rows = tile.width, tile.rows
        lane, size = jnp.arange(width), channels // options.groups
        self._image, self._start = pl.program_id(0), pl.program_id(1) * width
        self._same = lane[:, None] // size == lane[None, :] // size
        self._count, self._rows, self._lane = self.pixels * size, rows, lane
        self._width = width

    def sums(self, terms: Callable[[Array], tuple[Array, ...]], count: int) -> list[Array]:
        """Sum the `count` arrays of `terms(tile index)` over all pixels; (width,) each."""

        def add(i: Array, totals: tuple[Array, ...]) -> tuple[Array, ...]:
            return tuple(total + term for total, term in zip(totals, terms(i), strict=True))

        # Each position of the tile has its own sum; a sum over positions synchronises all warps.
        zeros = (jnp.zeros((self._rows, self._width)),) * count
        totals = jax.lax.fori_loop(0, self.pixels // self._rows, add, zeros)
        return [jnp.sum(total, axis=0) for total in totals]

    def write(self, ref: Any, value: Callable[[Array], Array]) -> None:
        """Write `value(tile index)` to each tile of `ref`."""

        def store(i: Array, carry: Any) -> Any:
            ref[self._where(i)] = value(i).astype(ref.dtype)
            return carry

        jax.lax.fori_loop(0, self.pixels // self._rows, store, 0)

    def _where(self, tile: Array) -> tuple[Any, ...]:
        return (
            self._image,
            pl.ds(tile * self._rows, self._rows),
            pl.ds(self._start, self._width),
        )

    def tile(self, ref: Any, tile: Array) -> Array:
        """Read a tile: (rows, width) float32."""
        return ref[self._where(tile)].astype(jnp.float32)

    def vector(self, ref: Any) -> Array:
        """Read (width,) float32 of a vector (C,), or of this image's row of an array (N, C)."""
        where = (self._image,) * (len(ref.shape) - 1) + (pl.ds(self._start, self._width),)
        return ref[where].astype(jnp.float32)

    def store_vector(self, ref: Any, value: Array) -> None:
        where = (self._image, pl.ds(self._start, self._width))
        ref[where] = value.astype(ref.dtype)

    def group_mean(self, sums: Array) -> Array:
        """Sums over the pixels of each channel → the mean over its group."""
        return jnp.sum(jnp.where(self._same, sums[None, :], 0.0), axis=1) / self._count

    def drop(self, keys_ref: Any, tile: Array, value: Array, rate: float) -> Array:
        pixel = (tile * self._rows + jnp.arange(self._rows)).astype(jnp.uint32)
        channel = (self._start + self._lane).astype(jnp.uint32)
        keys = [keys_ref[self._image, i] for i in (0, 1)]
        return jnp.where(
            keeps(keys, pixel[:, None], channel[None, :], rate), value * (1 / (1 - rate)), 0.0
        )


def _sigmoid(x: Array, dtype: Any) -> Array:
    if dtype == jnp.bfloat16 and jax.default_backend() == "gpu":
        return 0.5 + 0.5 * _triton().approx_tanh(0.5 * x)  # one instruction, exact to 2^-11
    return jax.nn.sigmoid(x)


def _forward_kernel(options: Options, tile: Tile, names: tuple[str, ...], *refs: Any) -> None:
    ref = dict(zip(names, refs, strict=True))
    part = _Part(options, ref["x"], tile)
    shift = part.vector(ref["shift"]) if "shift" in ref else 0.0 * part.vector(ref["bias"])

    def moments(i: Array) -> tuple[Array, Array]:
        x = part.tile(ref["x"], i) + shift[None, :]
        return x, x * x

    mean, square = map(part.group_mean, part.sums(moments, 2))
    factor = jax.lax.rsqrt(jnp.maximum(square - mean * mean, 0.0) + EPSILON)
    part.store_vector(ref["mean"], mean)
    part.store_vector(ref["factor"], factor)
    slope = factor * part.vector(ref["scale"])
    offset = (shift - mean) * slope + part.vector(ref["bias"])

    def result(i: Array) -> Array:
        y = part.tile(ref["x"], i) * slope[None, :] + offset[None, :]
        y = y * _sigmoid(y, ref["x"].dtype) if options.silu else y
        return part.drop(ref["keys"], i, y, options.rate) if "keys" in ref else y

    part.write(ref["y"], result)


def _backward_kernel(options: Options, tile: Tile, names: tuple[str, ...], *refs: Any) -> None:
    ref = dict(zip(names, refs, strict=True))
    part = _Part(options, ref["x"], tile)
    factor, scale, bias = (part.vector(ref[name]) for name in ("factor", "scale", "bias"))
    offset = -part.vector(ref["mean"]) * factor
    if "shift" in ref:
        offset += part.vector(ref["shift"]) * factor

    def tiles(i: Array) -> tuple[Array, Array]:
        """(x̂, the gradient with respect to SiLU's input)."""
        normal = part.tile(ref["x"], i) * factor[None, :] + offset[None, :]
        dy = part.tile(ref["dy"], i)
        dy = part.drop(ref["keys"], i, dy, options.rate) if "keys" in ref else dy
        if options.silu:
            y = normal * scale[None, :] + bias[None, :]
            gate = _sigmoid(y, ref["x"].dtype)
            dy *= gate * (1 + y * (1 - gate))
        return normal, dy

    def moments(i: Array) -> tuple[Array, ...]:
        normal, dy = tiles(i)
        return dy, dy * normal, normal

    dbias, dscale, total = part.sums(moments, 3)
    mean, slope = part.group_mean(scale * dbias), part.group_mean(scale * dscale)

    def result(i: Array) -> Array:
        normal, dy = tiles(i)
        return (dy * scale[None, :] - mean[None, :] - normal * slope[None, :]) * factor[None, :]

    part.write(ref["dx"], result)
    part.store_vector(ref["dbias"], dbias)
    part.store_vector(ref["dscale"], dscale)
    if "dshift" in ref:
        dshift = factor * (scale * dbias - part.pixels * mean - slope * total)
        part.store_vector(ref["dshift"], dshift)


def call(
    direction: str,
    options: Options,
    tile: Tile,
    inputs: dict[str, Array],
    outputs: dict[str, jax.ShapeDtypeStruct],
) -> dict[str, Array]:
    """Run a kernel over all images.

    Args:
      direction: "forward" or "backward".
      options: those of `normalization.norm_act`.
      tile: the part of an image that a program reads at once.
      inputs: x (N, pixels, C), scale and bias (C,), perhaps shift (N, C) and keys (N, 2); backward
        also dy (N, pixels, C), mean and factor (N, C).
      outputs: y like x, mean and factor (N, C); backward dx like x, and the images' own gradients
        dscale, dbias and, with shift, dshift (N, C).
    """
    kernel = {"forward": _forward_kernel, "backward": _backward_kernel}[direction]
    on_gpu = jax.default_backend() == "gpu"
    images, _, channels = inputs["x"].shape
    results = pl.pallas_call(
        functools.partial(kernel, options, tile, (*inputs, *outputs)),
        grid=(images, channels // tile.width),
        out_shape=tuple(outputs.values()),
        compiler_params=_triton().CompilerParams(num_warps=tile.warps) if on_gpu else None,
        interpret=not on_gpu,
    )(*inputs.values())
    return dict(zip(outputs, results, strict=True))
