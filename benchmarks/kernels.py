"""The normalisation kernels on a GPU: errors against float64, and their time compared with XLA's.

python -m benchmarks.kernels             # on a GPU
python -m benchmarks.kernels --small     # without a GPU, in Pallas' interpreter

Errors are ‖kernel - float64‖/‖float64‖, of y and of the gradients to x, scale, bias and shift, for
bfloat16 and float32 features; bfloat16's own rounding is 2e-3. The time is that of one pass forward
and one back, by the kernels and by XLA; `rule` says which of them training takes.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from benchmarks.measure import Table, get_parser, seconds_a_call, take_turn
from models import norm_kernels, normalization
from models.normalization import Options

# (images, pixels a side, channels): CIFAR-10's DDPM++ at batch 128, and 8 images of 256² and 128².
SHAPES = [
    (128, 32, 128),
    (128, 32, 256),
    (128, 32, 384),
    (128, 16, 256),
    (128, 16, 512),
    (128, 8, 256),
    (128, 4, 512),
    (8, 256, 128),
    (8, 128, 128),
    (8, 128, 256),
    (32, 128, 128),
]
SMALL = [(2, 8, 64), (2, 16, 32)]
NAMES = ("y", "dx", "dscale", "dbias", "dshift")


def make_inputs(shape: tuple[int, int, int], dtype: Any) -> list[Array]:
    """Random x, scale, bias, shift and dy for one of SHAPES."""
    n, size, channels = shape
    keys = jax.random.split(jax.random.key(sum(shape)), 5)
    x, dy = (jax.random.normal(key, (n, size, size, channels), dtype) for key in keys[:2])
    scale, bias = (1 + 0.5 * jax.random.normal(key, (channels,)) for key in keys[2:4])
    return [x, scale, bias, jax.random.normal(keys[4], (n, channels)), dy]


def run(function: Callable[..., Array], options: Options, *inputs: Array) -> tuple[Array, ...]:
    """y and the gradients of sum(y · dy); the inputs are x, scale, bias, shift and dy."""
    *given, dy = inputs
    y, pull = jax.vjp(lambda *a: function(options, *a), *given)
    return y, *pull(dy)


def reference(options: Options, inputs: list[Array]) -> list[np.ndarray]:
    """`run` of XLA's form in float64, on the CPU."""
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        wide = [jnp.asarray(np.asarray(x), jnp.float64) for x in inputs]
        return [np.asarray(x) for x in run(normalization.norm_act, options, *wide)]


def main() -> None:
    """Check and measure all shapes, and print the table."""
    parser = get_parser(__doc__)
    parser.add_argument("--small", action="store_true", help="a few small shapes")
    flags = parser.parse_args()
    if not norm_kernels.work():
        raise SystemExit("there are no kernels to measure")
    print(f"JAX {jax.__version__}, {jax.devices()[0].device_kind}")
    measured = []
    for shape in SMALL if flags.small else SHAPES:
        n, size, channels = shape
        options = Options(min(channels // 4, 32), True)
        for dtype in (jnp.bfloat16, jnp.float32):
            make = functools.partial(make_inputs, shape, dtype)
            x, *_ = shapes = jax.eval_shape(make)
            if not norm_kernels.fits(options, x):
                print(f"{shape}: the kernels don't support it")
                continue
            kernel = jax.jit(functools.partial(run, norm_kernels.fused, options))
            xla = jax.jit(functools.partial(run, normalization.norm_act, options))
            few = [part[:2] if part.ndim > 1 else part for part in make()]
            errors = [
                float(np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b))
                for a, b in zip(kernel(*few), reference(options, few), strict=True)
            ]
            if max(errors) > (1e-2 if dtype == jnp.bfloat16 else 1e-4):
                raise SystemExit(f"the kernels' errors are too large: {shape}, {errors}")
            calls = [call.lower(*shapes).compile() for call in (kernel, xla)]
            cells = (f"{n}×{size}²×{channels}", jnp.dtype(dtype).name, *errors)
            measured.append((cells, make, calls, "kernel" if norm_kernels.pays(x) else "XLA"))
    take_turn()
    table = Table("shape", "dtype", *NAMES, "kernel µs", "XLA µs", "rule")
    for cells, make, calls, rule in measured:
        inputs = make()
        seconds = [seconds_a_call(functools.partial(call, *inputs), 0.3) for call in calls]
        table.add(*cells, *(s * 1e6 for s in seconds), rule)
    table.show()


if __name__ == "__main__":
    main()
