"""Group normalisation (arXiv 1803.08494) with what surrounds it in a residual block, in one pass.

A block adds the time embedding to its features, normalises them, applies SiLU and dropout. On an
NVIDIA GPU that is one kernel here, which reads the features once and writes the result once, and
one for the gradient; XLA makes several passes over the memory of each. Elsewhere, and for images
too large for a kernel, it is plain JAX.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

EPSILON = 1e-6
_BLOCK = 16_384  # values that a program of a kernel's grid holds in registers
_WARP = 2048  # of them, a warp's


class Options(NamedTuple):
    """What is done besides: the number of groups, whether SiLU follows, and dropout's rate."""

    groups: int
    silu: bool
    rate: float = 0.0


def plain(
    options: Options,
    x: Array,
    scale: Array,
    bias: Array,
    shift: Array | None = None,
    keep: Array | None = None,
) -> Array:
    """`norm_act` in plain JAX."""
    n, h, w, _ = x.shape
    wide = x.astype(jnp.float32)
    if shift is not None:
        wide += shift.astype(jnp.float32)[:, None, None, :]
    grouped = wide.reshape(n, h * w, options.groups, -1)
    mean = grouped.mean(axis=(1, 3), keepdims=True)
    variance = jnp.maximum((grouped**2).mean(axis=(1, 3), keepdims=True) - mean**2, 0)
    factor = jax.lax.rsqrt(variance + EPSILON) * scale.reshape(options.groups, -1)
    y = ((grouped - mean) * factor + bias.reshape(options.groups, -1)).reshape(x.shape)
    y = jax.nn.silu(y) if options.silu else y
    if keep is not None:
        y = jnp.where(keep, y / (1 - options.rate), 0)
    return y.astype(x.dtype)


def _width(pixels: int) -> int:
    return max(16, min(128, _BLOCK // pixels))


def _fits(options: Options, x: Array) -> bool:
    pixels, channels = x.shape[1] * x.shape[2], x.shape[3]
    return (
        pixels & (pixels - 1) == 0  # a block's sides are powers of 2
        and 16 <= pixels <= 1024
        and channels // options.groups <= _width(pixels)
    )


class _Block:
    """A program's part of an image: all pixels of as many whole groups as fit."""

    def __init__(self, x_ref: Any, options: Options) -> None:
        _, pixels, channels = x_ref.shape
        width, size = _width(pixels), channels // options.groups
        taken, lane = width // size * size, jnp.arange(width)
        image, start = pl.program_id(0), pl.program_id(1) * taken
        self.inside = (lane < taken) & (start + lane < channels)
        self.area = jnp.broadcast_to(self.inside[None, :], (pixels, width))
        self.pixels = (image, slice(None), pl.ds(start, width))
        self.per_image = (image, pl.ds(start, width))
        self.per_channel = (pl.ds(start, width),)
        self._same = (lane[:, None] // size == lane[None, :] // size) & self.inside[None, :]
        self._count = pixels * size

    def load(self, ref: Any, where: tuple[Any, ...]) -> Array:
        mask = self.area if where is self.pixels else self.inside
        return plgpu.load(ref.at[where], mask=mask, other=0).astype(jnp.float32)

    def store(self, ref: Any, where: tuple[Any, ...], value: Array) -> None:
        mask = self.area if where is self.pixels else self.inside
        plgpu.store(ref.at[where], value.astype(ref.dtype), mask=mask)

    def group_mean(self, sums: Array) -> Array:
        """Sums over the pixels of each channel → the mean over its group."""
        return jnp.sum(jnp.where(self._same, sums[None, :], 0.0), axis=1) / self._count

    def normalized(self, x_ref: Any, shift_ref: Any) -> tuple[Array, Array]:
        """(x̂, 1/σ of each channel)."""
        x = self.load(x_ref, self.pixels)
        if shift_ref is not None:
            x += self.load(shift_ref, self.per_image)[None, :]
        centered = jnp.where(self.area, x - self.group_mean(jnp.sum(x, axis=0))[None, :], 0.0)
        variance = self.group_mean(jnp.sum(centered * centered, axis=0))
        factor = jax.lax.rsqrt(variance + EPSILON)
        return centered * factor[None, :], factor


def _forward_kernel(options: Options, names: tuple[str, ...], *refs: Any) -> None:
    ref = dict(zip(names, refs, strict=True))
    block = _Block(ref["x"], options)
    normal, _ = block.normalized(ref["x"], ref.get("shift"))
    scale, bias = (block.load(ref[name], block.per_channel) for name in ("scale", "bias"))
    y = normal * scale[None, :] + bias[None, :]
    y = y * jax.nn.sigmoid(y) if options.silu else y
    if "keep" in ref:
        y *= block.load(ref["keep"], block.pixels) / (1 - options.rate)
    block.store(ref["y"], block.pixels, y)


def _backward_kernel(options: Options, names: tuple[str, ...], *refs: Any) -> None:
    ref = dict(zip(names, refs, strict=True))
    block = _Block(ref["x"], options)
    normal, factor = block.normalized(ref["x"], ref.get("shift"))
    scale, bias = (block.load(ref[name], block.per_channel) for name in ("scale", "bias"))
    dy = block.load(ref["dy"], block.pixels)
    if "keep" in ref:
        dy *= block.load(ref["keep"], block.pixels) / (1 - options.rate)
    if options.silu:
        y = normal * scale[None, :] + bias[None, :]
        gate = jax.nn.sigmoid(y)
        dy *= gate * (1 + y * (1 - gate))
    dbias, dscale = jnp.sum(dy, axis=0), jnp.sum(dy * normal, axis=0)
    mean, slope = block.group_mean(scale * dbias), block.group_mean(scale * dscale)
    dx = dy * scale[None, :] - mean[None, :] - normal * slope[None, :]
    dx *= factor[None, :]
    block.store(ref["dx"], block.pixels, dx)
    for name, value in (("dscale", dscale), ("dbias", dbias), ("dshift", jnp.sum(dx, axis=0))):
        if name in ref:
            block.store(ref[name], block.per_image, value)


def _call(
    kernel: Any, options: Options, inputs: dict[str, Any], outputs: dict[str, Any]
) -> dict[str, Array]:
    """Run a kernel over all images, with what is given of the inputs by name."""
    inputs = {name: value for name, value in inputs.items() if value is not None}
    x = inputs["x"]
    n, h, w, channels = x.shape
    width, size = _width(h * w), channels // options.groups
    flat = {k: v.reshape(n, h * w, channels) if v.ndim == 4 else v for k, v in inputs.items()}
    results = pl.pallas_call(
        functools.partial(kernel, options, (*flat, *outputs)),
        grid=(n, pl.cdiv(channels, width // size * size)),
        out_shape=tuple(
            jax.ShapeDtypeStruct((n, h * w, channels) if len(shape) == 4 else shape, dtype)
            for shape, dtype in outputs.values()
        ),
        compiler_params=plgpu.CompilerParams(num_warps=min(8, max(1, h * w * width // _WARP))),
        interpret=jax.default_backend() != "gpu",
    )(*flat.values())
    return {
        name: result.reshape(shape)
        for (name, (shape, _)), result in zip(outputs.items(), results, strict=True)
    }


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def fused(
    options: Options,
    x: Array,
    scale: Array,
    bias: Array,
    shift: Array | None = None,
    keep: Array | None = None,
) -> Array:
    """`norm_act` as a kernel, whose gradient is one too. There is no forward mode."""
    inputs = {"x": x, "scale": scale, "bias": bias, "shift": shift, "keep": keep}
    return _call(_forward_kernel, options, inputs, {"y": (x.shape, x.dtype)})["y"]


def _fused_forward(options: Options, *inputs: Any) -> tuple[Array, Any]:
    return fused(options, *inputs), inputs


def _fused_backward(options: Options, inputs: Any, dy: Array) -> tuple[Array | None, ...]:
    x, scale, bias, shift, keep = inputs
    per_image = ((len(x), x.shape[-1]), jnp.float32)
    outputs: dict[str, Any] = {"dx": (x.shape, x.dtype), "dscale": per_image, "dbias": per_image}
    if shift is not None:
        outputs["dshift"] = per_image
    given = {"x": x, "scale": scale, "bias": bias, "shift": shift, "keep": keep, "dy": dy}
    d = _call(_backward_kernel, options, given, outputs)
    dscale, dbias = d["dscale"].sum(axis=0), d["dbias"].sum(axis=0)
    dshift = None if shift is None else d["dshift"].astype(shift.dtype)
    return d["dx"], dscale.astype(scale.dtype), dbias.astype(bias.dtype), dshift, None


fused.defvjp(_fused_forward, _fused_backward)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _fused_inference(options: Options, *inputs: Any) -> Array:
    return fused(options, *inputs)


@_fused_inference.defjvp
def _(options: Options, primals: Any, tangents: Any) -> tuple[Array, Array]:
    return jax.jvp(functools.partial(plain, options), primals, tangents)


def norm_act(
    x: Array,
    scale: Array,
    bias: Array,
    shift: Array | None = None,
    keep: Array | None = None,
    *,
    options: Options,
    train: bool,
) -> Array:
    """Group normalisation of x + shift, then SiLU and dropout as `options` say.

    Args:
      x: features, (N, H, W, C).
      scale, bias: of the normalised features, (C,).
      shift: added to each image's features first, (N, C).
      keep: where dropout leaves the result, (N, H, W, C) bool.
      options: the rest.
      train: on a GPU its gradient is a kernel, and it has no forward mode; else it has both modes.

    Returns:
      (N, H, W, C), of x's dtype; all computation is in float32.
    """
    if jax.default_backend() != "gpu" or not _fits(options, x):
        return plain(options, x, scale, bias, shift, keep)
    function = fused if train else _fused_inference
    return function(options, x, scale, bias, shift, keep)
