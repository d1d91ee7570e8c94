"""Speed of the features for FID: images per second through Inception-v3.

python -m benchmarks.inception           # 32×32 and 299×299 pixels
python -m benchmarks.inception --peer    # also in PyTorch, if torchvision is installed

Ours is the extractor of `--mode eval` with random weights: uint8 images on the host are resized to
299×299 on the device, and features and logits are copied back. The share is relative to the speed
of one large matrix product in full float32, the network's precision. PyTorch's network is that of
torch-fidelity if it is installed, else that of torchvision; on GPUs it is also measured in TF32,
the default of convolutions there. Memory is the process's peak on the device so far.
"""

import argparse
import functools
import math
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import (
    Table,
    gflop_a_call,
    need,
    peak_gib,
    peer_rows,
    product_rate,
    seconds_a_call,
)
from metrics.features import Extractor
from metrics.inception import inception_extractor
from models import inception
from runtime import environment


def random_params(model: inception.InceptionV3, x: Any) -> Any:
    """Random parameters that preserve the scale of the activations."""
    rng = np.random.default_rng(0)

    def draw(shape: Any) -> np.ndarray:
        noise = rng.standard_normal(shape.shape, np.float32)
        return noise * np.float32(math.sqrt(2 / math.prod(shape.shape[:-1])))

    return jax.tree.map(draw, jax.eval_shape(model.init, jax.random.key(0), x)["params"])


def ours(extractor: Extractor, sizes: list[int], count: int) -> Iterator[dict[str, Any]]:
    """A row for each size of images."""
    for size in sizes:
        images = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)
        start = time.perf_counter()
        extractor.fn(images[:1])
        first = time.perf_counter() - start
        seconds = seconds_a_call(functools.partial(extractor.fn, images))
        peak = peak_gib()
        yield {"": "ours, float32", "size": size, "first": first, "seconds": seconds, "peak": peak}


def main() -> None:
    """Measure all sizes, and print the table."""
    environment.prepare()
    environment.keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    on_cpu = jax.default_backend() == "cpu"
    parser.add_argument("--images", type=int, default=64 if on_cpu else 2048)
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 299])
    parser.add_argument("--peer", action="store_true", help="also measure PyTorch")
    flags = parser.parse_args()
    if flags.peer:
        need("torch", "torchvision")
    model, one = inception.InceptionV3(), jnp.zeros((1, inception.SIZE, inception.SIZE, 3))
    params = random_params(model, one)
    rate = product_rate("float32", jax.lax.Precision.HIGHEST)
    gflop = gflop_a_call(lambda x: model.apply({"params": params}, x), one)
    extractor = inception_extractor(params, "random", 256)
    rows = ours(extractor, flags.sizes, flags.images)
    columns = ("images/s", "ms an image", "TFLOP/s", "share", "peak GiB", "first call s")
    table = Table("", "pixels", *columns)
    job = {"sizes": flags.sizes, "images": flags.images, "batch": 16 if on_cpu else 128}
    for row in [*rows, *(peer_rows(job) if flags.peer else ())]:
        each = row["seconds"] / flags.images
        speed = gflop / each / 1e3
        cells = (f"{speed / rate:.0%}", row["peak"], f"{row['first']:.0f}")
        table.add(row[""], f"{row['size']}×{row['size']}", 1 / each, 1e3 * each, speed, *cells)
    table.show()


if __name__ == "__main__":
    main()
