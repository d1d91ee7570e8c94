"""Group normalisation with SiLU and dropout, as Pallas kernels for NVIDIA GPUs.

`normalization.norm_act` is one kernel here and its gradient another; each reads the features from
memory and writes the result once, where XLA makes several passes over memory. The numbers of
pixels and channels must be divisible by those of a tile, which are powers of 2.

JAX 0.11 deprecates Pallas' Triton backend. If it is missing or fails, XLA is used instead. Without
a GPU the backend is not imported; tests run the kernels in Pallas' interpreter.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from models import normalization
from models.normalization import EPSILON, Options, keeps

log = logging.getLogger("soft_truncation")

_WARP = 1024  # values of a tile for each warp


def _layout(x: Array) -> tuple[int, int]:
    """(channels, pixels) of a tile of x (N, H, W, C), both powers of 2; channels are contiguous.

    Fewer channels waste memory accesses (measured on an H100); with more, a small batch has too few
    programs for all of the GPU's multiprocessors.
    """
    pixels, channels = x.shape[1] * x.shape[2], x.shape[3]
    return min(64, channels & -channels), min(pixels & -pixels, 128 if pixels > 256 else 64)


def fits(options: Options, x: Array) -> bool:
    """Whether the kernels support x (N, H, W, C): a tile must consist of whole groups."""
    width, rows = _layout(x)
    size = x.shape[3] // options.groups
    return rows >= 16 and width >= 32 and width % size == 0


def pays(x: Array) -> bool:
    """Whether enough programs share x (N, H, W, C), or each has little to do.

    A program has all pixels of an image and of `_layout` channels. With few images of many pixels,
    such as 8 of 256×256, most multiprocessors would be idle; XLA splits the pixels, too.
    """
    pixels, programs = x.shape[1] * x.shape[2], len(x) * x.shape[3] // _layout(x)[0]
    return pixels <= 32 * 32 or programs >= getattr(jax.devices()[0], "core_count", 132) / 2


def _triton() -> Any:
    from jax.experimental.pallas import triton

    return triton


@functools.cache
def available() -> bool:
    """Whether the kernels can be lowered for this machine's GPU; if not, logs the reason once."""
    x = jax.ShapeDtypeStruct((1, 8, 8, 32), jnp.bfloat16)
    vector = jax.ShapeDtypeStruct((32,), jnp.float32)
    try:
        jax.jit(functools.partial(fused, Options(8, True))).trace(x, vector, vector).lower()
    except Exception as error:  # a deprecated backend may fail in any way
        log.warning(
            "group normalisation is left to XLA: its Pallas kernels do not work here (%s)",
            str(error).split("\n")[0],
        )
        return False
    return True


class _Part:
    """The part of an image that one program works on: all pixels of some groups, tile by tile."""

    def __init__(self, options: Options, x_ref: Any, width: int, rows: int) -> None:
        _, self.pixels, channels = x_ref.shape
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


def _forward_kernel(
    options: Options, layout: tuple[int, int], names: tuple[str, ...], *refs: Any
) -> None:
    ref = dict(zip(names, refs, strict=True))
    part = _Part(options, ref["x"], *layout)
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


def _backward_kernel(
    options: Options, layout: tuple[int, int], names: tuple[str, ...], *refs: Any
) -> None:
    ref = dict(zip(names, refs, strict=True))
    part = _Part(options, ref["x"], *layout)
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


def _call(
    kernel: Any, options: Options, inputs: dict[str, Any], outputs: dict[str, Any]
) -> dict[str, Array]:
    """Run a kernel over all images; inputs that are None are left out."""
    inputs = {name: value for name, value in inputs.items() if value is not None}
    x = inputs["x"]
    n, h, w, channels = x.shape
    layout = _layout(x)
    on_gpu = jax.default_backend() == "gpu"
    warps = max(1, layout[0] * layout[1] // _WARP)
    flat = {k: v.reshape(n, h * w, channels) if v.ndim == 4 else v for k, v in inputs.items()}
    results = pl.pallas_call(
        functools.partial(kernel, options, layout, (*flat, *outputs)),
        grid=(n, channels // layout[0]),
        out_shape=tuple(
            jax.ShapeDtypeStruct((n, h * w, channels) if len(shape) == 4 else shape, dtype)
            for shape, dtype in outputs.values()
        ),
        compiler_params=_triton().CompilerParams(num_warps=warps) if on_gpu else None,
        interpret=not on_gpu,
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
    keys: Array | None = None,
) -> Array:
    """`norm_act` as a kernel, and its gradient as another. Forward-mode derivatives do not work."""
    return _fused_forward(options, x, scale, bias, shift, keys)[0]


def _fused_forward(options: Options, *given: Any) -> tuple[Array, Any]:
    inputs = dict(zip(("x", "scale", "bias", "shift", "keys"), given, strict=True))
    x = inputs["x"]
    per_image = ((len(x), x.shape[-1]), jnp.float32)
    outputs = {"y": (x.shape, x.dtype), "mean": per_image, "factor": per_image}
    results = _call(_forward_kernel, options, inputs, outputs)
    return results.pop("y"), inputs | results


def _fused_backward(options: Options, saved: Any, dy: Array) -> tuple[Array | None, ...]:
    x, shift = saved["x"], saved["shift"]
    per_image = ((len(x), x.shape[-1]), jnp.float32)
    outputs: dict[str, Any] = {"dx": (x.shape, x.dtype), "dscale": per_image, "dbias": per_image}
    if shift is not None:
        outputs["dshift"] = per_image
    d = _call(_backward_kernel, options, saved | {"dy": dy}, outputs)
    dscale, dbias = (
        d["d" + name].sum(axis=0).astype(saved[name].dtype) for name in ("scale", "bias")
    )
    return d["dx"], dscale, dbias, None if shift is None else d["dshift"].astype(shift.dtype), None


fused.defvjp(_fused_forward, _fused_backward)


def norm_act(
    options: Options,
    x: Array,
    scale: Array,
    bias: Array,
    shift: Array | None = None,
    keys: Array | None = None,
    train: bool = False,
) -> Array:
    """`normalization.norm_act`, by a kernel in training on a GPU if the kernel works there.

    Evaluation does not use the kernels: it needs forward-mode derivatives, and XLA to distribute
    the computation over the devices. In training, pmap gives each device its part.
    """
    on_gpu = train and jax.default_backend() == "gpu"
    if on_gpu and fits(options, x) and pays(x) and available():
        return fused(options, x, scale, bias, shift, keys)
    return normalization.norm_act(options, x, scale, bias, shift, keys)
