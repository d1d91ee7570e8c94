"""The kernels of `norm_kernels` in Triton, called through jax-triton: those of `norm_pallas` again.

They have the same tiles and sum in the same order. Tests run them in Triton's interpreter on a CPU;
compiled for an H100 they have the same memory accesses and barriers, but they have not been timed.
Triton does not accept annotations here but its own.
"""

import inspect

import jax
import jax.numpy as jnp
import jax_triton
import triton
import triton.language as tl
from jax import Array

from models.norm_kernels import Tile
from models.normalization import EPSILON, Options

_EPSILON = tl.constexpr(EPSILON)
# jax-triton 0.4 renamed the argument.
_PARAMETERS = inspect.signature(jax_triton.triton_call).parameters
_SHAPES = "out_type" if "out_type" in _PARAMETERS else "out_shape"


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def _drop(value, keys, pixel, channel, rate: tl.constexpr, least: tl.constexpr):
    """Dropout by the hash of `normalization.keeps`; keys points to an image's two words."""
    first, second = tl.load(keys), tl.load(keys + 1)
    rows = _mix(_mix(pixel.to(tl.uint32) + first) + first)
    columns = _mix(_mix(channel.to(tl.uint32) + second) + second)
    h = (rows[:, None] ^ columns[None, :]) * 0x9E3779B1
    h = (h ^ (h >> 15)) * 0x85EBCA77
    return tl.where(h >= least, value * (1 / (1 - rate)), 0.0)


@triton.jit
def _sigmoid(x, fast: tl.constexpr):
    if fast:  # one instruction, exact to 2^-11
        tanh: tl.constexpr = "tanh.approx.f32 $0, $1;"
        return 0.5 + 0.5 * tl.inline_asm_elementwise(tanh, "=f,f", [0.5 * x], tl.float32, True, 1)
    return tl.sigmoid(x)


@triton.jit
def _group_mean(sums, width: tl.constexpr, size: tl.constexpr, pixels: tl.constexpr):
    """Sums over the pixels of each channel, (width,) → the mean over its group of `size`."""
    group = tl.arange(0, width) // size
    same = group[:, None] == group[None, :]
    return tl.sum(tl.where(same, sums[None, :], 0.0), axis=1) / (pixels * size)


@triton.jit
def _forward(
    x,
    scale,
    bias,
    shift,
    keys,
    y,
    mean,
    factor,
    pixels: tl.constexpr,
    channels: tl.constexpr,
    size: tl.constexpr,
    width: tl.constexpr,
    rows: tl.constexpr,
    silu: tl.constexpr,
    fast: tl.constexpr,
    shifted: tl.constexpr,
    rate: tl.constexpr,
    least: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)  # offsets of images may exceed 2^31
    channel, row = tl.program_id(1) * width + tl.arange(0, width), tl.arange(0, rows)
    of_image = image * channels + channel
    tile = row[:, None] * channels + channel[None, :]
    x += image * pixels * channels
    y += image * pixels * channels
    move = tl.load(shift + of_image).to(tl.float32) if shifted else tl.zeros((width,), tl.float32)

    # Each position of the tile has its own sum; a sum over positions synchronises all warps.
    total, squares = tl.zeros((rows, width), tl.float32), tl.zeros((rows, width), tl.float32)
    for pixel in range(0, pixels, rows):
        value = tl.load(x + pixel * channels + tile).to(tl.float32) + move[None, :]
        total += value
        squares += value * value
    average = _group_mean(tl.sum(total, axis=0), width, size, pixels)
    square = _group_mean(tl.sum(squares, axis=0), width, size, pixels)
    slope = tl.rsqrt(tl.maximum(square - average * average, 0.0) + _EPSILON)
    tl.store(mean + of_image, average)
    tl.store(factor + of_image, slope)
    slope *= tl.load(scale + channel).to(tl.float32)
    offset = (move - average) * slope + tl.load(bias + channel).to(tl.float32)

    for pixel in range(0, pixels, rows):
        value = tl.load(x + pixel * channels + tile).to(tl.float32)
        value = value * slope[None, :] + offset[None, :]
        if silu:
            value *= _sigmoid(value, fast)
        if rate > 0:
            value = _drop(value, keys + 2 * image, pixel + row, channel, rate, least)
        tl.store(y + pixel * channels + tile, value.to(y.dtype.element_ty))


@triton.jit
def _normal_and_gradient(
    x,
    dy,
    factor,
    offset,
    scale,
    bias,
    keys,
    pixel,
    channel,
    silu: tl.constexpr,
    fast: tl.constexpr,
    rate: tl.constexpr,
    least: tl.constexpr,
):
    """(x̂, the gradient with respect to SiLU's input) of the tiles x and dy."""
    normal = x.to(tl.float32) * factor[None, :] + offset[None, :]
    gradient = dy.to(tl.float32)
    if rate > 0:
        gradient = _drop(gradient, keys, pixel, channel, rate, least)
    if silu:
        y = normal * scale[None, :] + bias[None, :]
        gate = _sigmoid(y, fast)
        gradient *= gate * (1 + y * (1 - gate))
    return normal, gradient


@triton.jit
def _backward(
    x,
    scale,
    bias,
    shift,
    keys,
    mean,
    factor,
    dy,
    dx,
    dscale,
    dbias,
    dshift,
    pixels: tl.constexpr,
    channels: tl.constexpr,
    size: tl.constexpr,
    width: tl.constexpr,
    rows: tl.constexpr,
    silu: tl.constexpr,
    fast: tl.constexpr,
    shifted: tl.constexpr,
    rate: tl.constexpr,
    least: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    channel, row = tl.program_id(1) * width + tl.arange(0, width), tl.arange(0, rows)
    of_image = image * channels + channel
    tile = row[:, None] * channels + channel[None, :]
    x += image * pixels * channels
    dy += image * pixels * channels
    dx += image * pixels * channels
    keys += 2 * image
    slope, weight = tl.load(factor + of_image), tl.load(scale + channel).to(tl.float32)
    base = tl.load(bias + channel).to(tl.float32)
    offset = -tl.load(mean + of_image) * slope
    if shifted:
        offset += tl.load(shift + of_image).to(tl.float32) * slope

    sum_dy, sum_product = tl.zeros((rows, width), tl.float32), tl.zeros((rows, width), tl.float32)
    sum_normal = tl.zeros((rows, width), tl.float32)
    for pixel in range(0, pixels, rows):
        where = pixel * channels + tile
        normal, gradient = _normal_and_gradient(
            tl.load(x + where), tl.load(dy + where), slope, offset, weight, base,
            keys, pixel + row, channel, silu, fast, rate, least,
        )  # fmt: skip
        sum_dy += gradient
        sum_product += gradient * normal
        sum_normal += normal
    of_bias, of_scale = tl.sum(sum_dy, axis=0), tl.sum(sum_product, axis=0)
    average = _group_mean(weight * of_bias, width, size, pixels)
    product = _group_mean(weight * of_scale, width, size, pixels)

    for pixel in range(0, pixels, rows):
        where = pixel * channels + tile
        normal, gradient = _normal_and_gradient(
            tl.load(x + where), tl.load(dy + where), slope, offset, weight, base,
            keys, pixel + row, channel, silu, fast, rate, least,
        )  # fmt: skip
        value = gradient * weight[None, :] - average[None, :] - normal * product[None, :]
        tl.store(dx + where, (value * slope[None, :]).to(dx.dtype.element_ty))
    tl.store(dbias + of_image, of_bias)
    tl.store(dscale + of_image, of_scale)
    if shifted:
        value = weight * of_bias - pixels * average - product * tl.sum(sum_normal, axis=0)
        tl.store(dshift + of_image, slope * value)


def call(
    direction: str,
    options: Options,
    tile: Tile,
    inputs: dict[str, Array],
    outputs: dict[str, jax.ShapeDtypeStruct],
) -> dict[str, Array]:
    """`norm_pallas.call`, by these kernels."""
    kernel = {"forward": _forward, "backward": _backward}[direction]
    images, pixels, channels = inputs["x"].shape
    rate = options.rate if "keys" in inputs else 0.0
    # Triton has no optional pointers: scale stands for inputs, and dshift is left unwritten.
    if direction == "backward":
        outputs = {"dshift": outputs["dscale"]} | outputs
    pointers = kernel.arg_names[: kernel.arg_names.index("pixels")]
    results = jax_triton.triton_call(
        *(inputs.get(name, inputs["scale"]) for name in pointers if name not in outputs),
        **{_SHAPES: tuple(outputs[name] for name in pointers if name in outputs)},
        kernel=kernel,
        name=f"norm_{direction}",
        grid=(images, channels // tile.width),
        num_warps=tile.warps,
        pixels=pixels,
        channels=channels,
        size=channels // options.groups,
        width=tile.width,
        rows=tile.rows,
        silu=options.silu,
        fast=inputs["x"].dtype == jnp.bfloat16,
        shifted="shift" in inputs,
        rate=rate,
        least=round(rate * 2**32),
    )
    return dict(zip((name for name in pointers if name in outputs), results, strict=True))
