"""Speed of the features for FID: images per second through Inception-v3.

python -m benchmarks.inception           # 32×32 and 299×299 pixels

This is the extractor of `--mode eval` with random weights: uint8 images on the host are resized to
299×299 on the device, and features and logits are copied back. The share is relative to the speed
of one large matrix product in full float32, the network's precision. Memory is the process's peak
on the device so far.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import (
    Table,
    get_parser,
    gflop_a_call,
    peak_gib,
    product_rate,
    seconds_a_call,
    timed,
)
from metrics.inception import inception_extractor
from models import inception


def random_params(model: inception.InceptionV3, x: Any) -> Any:
    """Random parameters that preserve the scale of the activations."""
    rng = np.random.default_rng(0)

    def draw(shape: Any) -> np.ndarray:
        noise = rng.standard_normal(shape.shape, np.float32)
        return noise * np.float32(math.sqrt(2 / math.prod(shape.shape[:-1])))

    return jax.tree.map(draw, jax.eval_shape(model.init, jax.random.key(0), x)["params"])


def main() -> None:
    """Measure all sizes, and print the table."""
    parser, on_cpu = get_parser(__doc__), jax.default_backend() == "cpu"
    parser.add_argument("--images", type=int, default=64 if on_cpu else 2048)
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 299])
    flags = parser.parse_args()
    model, one = inception.InceptionV3(), jnp.zeros((1, inception.SIZE, inception.SIZE, 3))
    params = random_params(model, one)
    rate = product_rate("float32", jax.lax.Precision.HIGHEST)
    gflop = gflop_a_call(lambda x: model.apply({"params": params}, x), one)
    extractor = inception_extractor(params, "random", 256)
    columns = ("images/s", "ms an image", "TFLOP/s", "share", "peak GiB", "first call s")
    table = Table("pixels", *columns)
    for size in flags.sizes:
        shape = (flags.images, size, size, 3)
        images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        first = timed(functools.partial(extractor.fn, images[:1]))
        each = seconds_a_call(functools.partial(extractor.fn, images)) / flags.images
        speed = gflop / each / 1e3
        cells = (speed, f"{speed / rate:.0%}", peak_gib(), f"{first:.0f}")
        table.add(f"{size}×{size}", 1 / each, 1e3 * each, *cells)
    table.show()


if __name__ == "__main__":
    main()
