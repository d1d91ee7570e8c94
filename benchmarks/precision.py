"""What networks in float32, TF32 and bfloat16 see of small noise.

python -m benchmarks.precision --workdir RUN     # a trained run of float32

For the run's weights and test images without dequantisation, at small times: the share of the
noise's variance that is lost when x(t) is rounded to a type, and the loss ‖σ s_θ + z‖² a dimension
of the network in each type. "x(t) rounded" is a network whose first convolution computes in
bfloat16 like the others, which ours does not. TF32 is imitated on a CPU, by rounding what
convolutions multiply; on a GPU float32 means TF32, unless JAX_DEFAULT_MATMUL_PRECISION=float32.
"""

import contextlib
import pathlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import build
import datasets
from benchmarks.measure import Table, get_parser, load_run
from data.batches import in_order
from sde_lib import SDE, expand


def to_tf32(x: Array) -> Array:
    """Round float32 to TF32's bits."""
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=10)


def to_bfloat16(x: Array) -> Array:
    """Round float32 to bfloat16's bits."""
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def share_lost(sde: SDE, x0: Array, z: Array, t: float, rounded: Callable[[Array], Array]) -> float:
    """The share of the noise's variance that `rounded`(x(t)) does not explain."""
    mean, std = (float(f(jnp.float32(t))) for f in (sde.mean_coeff, sde.std))
    x_t = rounded(mean * x0 + std * z)
    noise = (np.asarray(x_t, np.float64) - mean * np.asarray(x0, np.float64)) / std
    drawn = np.asarray(z, np.float64)
    return 1 - float(np.mean(noise * drawn) ** 2 / (np.mean(noise**2) * np.mean(drawn**2)))


@contextlib.contextmanager
def tf32_products() -> Iterator[None]:
    """Convolutions round what they multiply to TF32, unless they ask for full precision."""
    exact = jax.lax.conv_general_dilated

    def convolution(x: Array, kernel: Array, *args: Any, **options: Any) -> Array:
        if options.get("precision") is None:
            x, kernel = to_tf32(x), to_tf32(kernel)
        return exact(x, kernel, *args, **options)

    with mock.patch.object(jax.lax, "conv_general_dilated", convolution):
        yield


def main() -> None:
    """Print the table of the noise that is lost and of the loss by time, in each type."""
    parser = get_parser(__doc__)
    parser.add_argument("--workdir", type=pathlib.Path, required=True, help="a run of float32")
    config, setup, params = load_run(parser.parse_args().workdir)
    test = datasets.get_dataset(config, "test")
    images = in_order(test, 256)["image"]
    x0 = jnp.asarray(setup.preprocessing.to_x0_without_noise(images))
    z = jax.random.normal(jax.random.key(0), x0.shape)
    # Of γ in equal steps from ε on: σ/α grows by √10 from one to the next.
    first = float(setup.sde.gamma(config.training.truncation_time))
    gammas = [first + n * np.log(10) for n in range(5)]
    times = [
        max(float(setup.sde.inverse_gamma(g)), config.training.truncation_time) for g in gammas
    ]

    def loss(dtype: str, t: float, rounded: Callable[[Array], Array]) -> float:
        of_type = config.copy_and_resolve_references()
        of_type.model.dtype = dtype
        score_fn = build.set_up(of_type).make_score_fn(params)
        at = jnp.full(len(x0), t, jnp.float32)

        @jax.jit
        def mean_loss(x0: Array, z: Array) -> Array:
            x_t = expand(setup.sde.mean_coeff(at), x0) * x0 + expand(setup.sde.std(at), x0) * z
            return jnp.mean((expand(setup.sde.std(at), x0) * score_fn(rounded(x_t), at) + z) ** 2)

        return float(mean_loss(x0, z))

    print(f"\n{len(x0)} test images of {test.num_levels} levels, not dequantised")
    columns = ("lost, bfloat16", "lost, TF32", "loss, float32", "TF32", "bfloat16", "x(t) rounded")
    table = Table("t", "σ", *columns)
    for t in times:
        lost = [share_lost(setup.sde, x0, z, t, f) for f in (to_bfloat16, to_tf32)]
        values = [loss("float32", t, jnp.asarray)]
        with tf32_products():
            values.append(loss("float32", t, jnp.asarray))
        values += [loss("bfloat16", t, f) for f in (jnp.asarray, to_bfloat16)]
        sigma = float(setup.sde.std(jnp.float32(t)))
        cells = [*(f"{x:.2%}" for x in lost), *(f"{x:.5f}" for x in values)]
        table.add(f"{t:.1e}", f"{sigma:.2g}", *cells)
    table.show()


if __name__ == "__main__":
    main()
