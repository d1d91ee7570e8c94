"""Group normalisation with SiLU and dropout, as kernels for NVIDIA GPUs.

`normalization.norm_act` is one kernel here and its gradient another; each reads the features from
memory and writes the result once, where XLA makes several passes over memory. The numbers of
pixels and channels must be divisible by those of a tile, which are powers of 2.

`norm_pallas` has the kernels, for Pallas' Triton backend, which JAX 0.11 deprecates and a later one
will remove. Where they do not work XLA is used instead. On a CPU, tests run them in an interpreter.
"""

import functools
import logging
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from models import normalization
from models.normalization import Options

log = logging.getLogger("soft_truncation")


class Tile(NamedTuple):
    """The channels and pixels that a program reads at once, powers of 2, and its warps."""

    width: int
    rows: int

    @property
    def warps(self) -> int:
        """The number of warps of a program: each has 1,024 values of a tile."""
        return max(1, self.width * self.rows // 1024)


def _tile(x: Array) -> Tile:
    """The tile of x (N, H, W, C), whose channels are contiguous.

    Fewer channels waste memory accesses (measured on an H100); with more, a small batch has too few
    programs for all of the GPU's multiprocessors.
    """
    pixels, channels = x.shape[1] * x.shape[2], x.shape[3]
    rows = min(pixels & -pixels, 128 if pixels > 256 else 64)
    return Tile(min(64, channels & -channels), rows)


def fits(options: Options, x: Array) -> bool:
    """Whether the kernels support x (N, H, W, C): a tile must consist of whole groups."""
    width, rows = _tile(x)
    size = x.shape[3] // options.groups
    return rows >= 16 and width >= 32 and width % size == 0


def pays(x: Array) -> bool:
    """Whether enough programs share x (N, H, W, C), or each has little to do.

    A program has all pixels of an image and of a tile's channels. With few images of many pixels,
    such as 8 of 256×256, most multiprocessors would be idle; XLA splits the pixels, too.
    """
    pixels, programs = x.shape[1] * x.shape[2], len(x) * x.shape[3] // _tile(x).width
    return pixels <= 32 * 32 or programs >= getattr(jax.devices()[0], "core_count", 132) / 2


DEPRECATED = "The Pallas Triton backend is deprecated"


def _lower() -> None:
    """Lower a small kernel for this machine's GPU; any exception if it can't be."""
    x = jax.ShapeDtypeStruct((1, 8, 8, 32), jnp.bfloat16)
    vector = jax.ShapeDtypeStruct((32,), jnp.float32)

    def run(*given: Array) -> Any:
        return _forward(Options(8, True), *given, None, None)

    jax.jit(run).trace(x, vector, vector).lower()


@functools.cache
def work() -> bool:
    """Whether the kernels work here. Logs it once if not, or if a later JAX will drop them."""
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            _lower()
    except Exception as error:  # a backend that is deprecated or missing may fail in any way
        reason = next(iter(str(error).splitlines()), repr(error))
        log.warning("group normalisation is left to XLA: its kernels do not work here (%s)", reason)
        return False
    if any(str(warning.message).startswith(DEPRECATED) for warning in caught):
        log.info(
            "the normalisation kernels use Pallas' Triton backend, which a later JAX will drop; "
            "then XLA takes its place"
        )
        # JAX would say so again for each kernel that it compiles.
        warnings.filterwarnings("ignore", DEPRECATED, DeprecationWarning)
    return True


def _call(
    direction: str, options: Options, inputs: dict[str, Any], outputs: dict[str, Any]
) -> dict[str, Array]:
    """Run a kernel over all images; inputs that are None are left out."""
    from models import norm_pallas  # a later JAX may lack what it imports

    n, h, w, channels = inputs["x"].shape

    def flat(shape: tuple[int, ...]) -> tuple[int, ...]:
        return (n, h * w, channels) if len(shape) == 4 else shape

    results = norm_pallas.call(
        direction,
        options,
        _tile(inputs["x"]),
        {name: x.reshape(flat(x.shape)) for name, x in inputs.items() if x is not None},
        {name: jax.ShapeDtypeStruct(flat(x.shape), x.dtype) for name, x in outputs.items()},
    )
    return {name: results[name].reshape(x.shape) for name, x in outputs.items()}


def _forward(options: Options, *given: Any) -> tuple[Array, Any]:
    inputs = dict(zip(("x", "scale", "bias", "shift", "keys"), given, strict=True))
    x = inputs["x"]
    per_image = jax.ShapeDtypeStruct((len(x), x.shape[-1]), jnp.float32)
    outputs = {"y": x, "mean": per_image, "factor": per_image}
    results = _call("forward", options, inputs, outputs)
    return results.pop("y"), inputs | results


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
    return _forward(options, x, scale, bias, shift, keys)[0]


def _backward(options: Options, saved: Any, dy: Array) -> tuple[Array | None, ...]:
    x, shift = saved["x"], saved["shift"]
    per_image = jax.ShapeDtypeStruct((len(x), x.shape[-1]), jnp.float32)
    outputs: dict[str, Any] = {"dx": x, "dscale": per_image, "dbias": per_image}
    if shift is not None:
        outputs["dshift"] = per_image
    d = _call("backward", options, saved | {"dy": dy}, outputs)
    dscale, dbias = (
        d["d" + name].sum(axis=0).astype(saved[name].dtype) for name in ("scale", "bias")
    )
    return d["dx"], dscale, dbias, None if shift is None else d["dshift"].astype(shift.dtype), None


fused.defvjp(_forward, _backward)


def norm_act(
    options: Options,
    x: Array,
    scale: Array,
    bias: Array,
    shift: Array | None = None,
    keys: Array | None = None,
    train: bool = False,
) -> Array:
    """`normalization.norm_act`, by a kernel in training on a GPU if the kernels work there.

    Evaluation does not use the kernels: it needs forward-mode derivatives, and XLA to distribute
    the computation over the devices. In training, pmap gives each device its part.
    """
    on_gpu = train and jax.default_backend() == "gpu"
    if on_gpu and fits(options, x) and pays(x) and work():
        return fused(options, x, scale, bias, shift, keys)
    return normalization.norm_act(options, x, scale, bias, shift, keys)
