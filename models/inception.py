"""The Inception-v3 of FID: the TensorFlow graph of 2015-12-05 (arXiv 1512.00567).

It differs from other Inception-v3 networks in three ways: average pools leave the padding out of
the mean, the last block has a max pool instead, and images are resized as by TensorFlow 1, which
does not align pixel centres. The weights are those of the PyTorch port (`pt_inception-2015-12-05`).
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

SIZE = 299
_BN_EPS = 1e-3

# (x, name, features, kernel size, stride, padding) → x, convolved
_ConvFn = Callable[..., Array]
_mean_pool = functools.partial(
    nn.avg_pool, window_shape=(3, 3), padding=((1, 1), (1, 1)), count_include_pad=False
)
_halve = functools.partial(nn.max_pool, window_shape=(3, 3), strides=(2, 2))


def _block_35(conv: _ConvFn, x: Array, name: str, pooled: int) -> Array:
    five = conv(x, f"{name}.branch5x5_1", 48, 1)
    five = conv(five, f"{name}.branch5x5_2", 64, 5, padding=2)
    three = conv(x, f"{name}.branch3x3dbl_1", 64, 1)
    three = conv(three, f"{name}.branch3x3dbl_2", 96, 3, padding=1)
    three = conv(three, f"{name}.branch3x3dbl_3", 96, 3, padding=1)
    one = conv(x, f"{name}.branch1x1", 64, 1)
    pool = conv(_mean_pool(x), f"{name}.branch_pool", pooled, 1)
    return jnp.concatenate([one, five, three, pool], axis=-1)


def _down_to_17(conv: _ConvFn, x: Array, name: str) -> Array:
    once = conv(x, f"{name}.branch3x3", 384, 3, stride=2)
    twice = conv(x, f"{name}.branch3x3dbl_1", 64, 1)
    twice = conv(twice, f"{name}.branch3x3dbl_2", 96, 3, padding=1)
    twice = conv(twice, f"{name}.branch3x3dbl_3", 96, 3, stride=2)
    return jnp.concatenate([once, twice, _halve(x)], axis=-1)


_ROW, _COLUMN = (1, 7), (7, 1)


def _block_17(conv: _ConvFn, x: Array, name: str, inner: int) -> Array:
    once = conv(x, f"{name}.branch7x7_1", inner, 1)
    once = conv(once, f"{name}.branch7x7_2", inner, _ROW, padding=(0, 3))
    once = conv(once, f"{name}.branch7x7_3", 192, _COLUMN, padding=(3, 0))
    twice = conv(x, f"{name}.branch7x7dbl_1", inner, 1)
    twice = conv(twice, f"{name}.branch7x7dbl_2", inner, _COLUMN, padding=(3, 0))
    twice = conv(twice, f"{name}.branch7x7dbl_3", inner, _ROW, padding=(0, 3))
    twice = conv(twice, f"{name}.branch7x7dbl_4", inner, _COLUMN, padding=(3, 0))
    twice = conv(twice, f"{name}.branch7x7dbl_5", 192, _ROW, padding=(0, 3))
    one = conv(x, f"{name}.branch1x1", 192, 1)
    pool = conv(_mean_pool(x), f"{name}.branch_pool", 192, 1)
    return jnp.concatenate([one, once, twice, pool], axis=-1)


def _down_to_8(conv: _ConvFn, x: Array, name: str) -> Array:
    three = conv(x, f"{name}.branch3x3_1", 192, 1)
    three = conv(three, f"{name}.branch3x3_2", 320, 3, stride=2)
    seven = conv(x, f"{name}.branch7x7x3_1", 192, 1)
    seven = conv(seven, f"{name}.branch7x7x3_2", 192, _ROW, padding=(0, 3))
    seven = conv(seven, f"{name}.branch7x7x3_3", 192, _COLUMN, padding=(3, 0))
    seven = conv(seven, f"{name}.branch7x7x3_4", 192, 3, stride=2)
    return jnp.concatenate([three, seven, _halve(x)], axis=-1)


def _block_8(conv: _ConvFn, x: Array, name: str, pool: Callable[[Array], Array]) -> Array:
    def fork(x: Array, row: str, column: str) -> list[Array]:
        return [
            conv(x, f"{name}.{row}", 384, (1, 3), padding=(0, 1)),
            conv(x, f"{name}.{column}", 384, (3, 1), padding=(1, 0)),
        ]

    once = conv(x, f"{name}.branch3x3_1", 384, 1)
    twice = conv(x, f"{name}.branch3x3dbl_1", 448, 1)
    twice = conv(twice, f"{name}.branch3x3dbl_2", 384, 3, padding=1)
    parts = [
        conv(x, f"{name}.branch1x1", 320, 1),
        *fork(once, "branch3x3_2a", "branch3x3_2b"),
        *fork(twice, "branch3x3dbl_3a", "branch3x3dbl_3b"),
        conv(pool(x), f"{name}.branch_pool", 192, 1),
    ]
    return jnp.concatenate(parts, axis=-1)


class InceptionV3(nn.Module):
    """Inception-v3, with batch normalisation folded into the convolutions."""

    @nn.compact
    def __call__(self, x: Array) -> dict[str, Array]:
        """Features of images (N, 299, 299, 3) in [-1, 1), float32.

        Returns:
          `pool_3` (N, 2048), for FID and KID; `logits_unbiased` (N, 1008), without the last bias,
          for the Inception score; `logits` (N, 1008).
        """
        exact = jax.lax.Precision.HIGHEST  # or accelerators round inputs to 8 or 11 bits

        def conv(
            x: Array, name: str, features: int, size: Any, stride: int = 1, padding: Any = 0
        ) -> Array:
            kernel = (size, size) if isinstance(size, int) else size
            rows, columns = (padding, padding) if isinstance(padding, int) else padding
            layer = nn.Conv(
                features,
                kernel,
                strides=stride,
                padding=((rows, rows), (columns, columns)),
                precision=exact,
                name=name.replace(".", "_"),
            )
            return nn.relu(layer(x))

        x = conv(x, "Conv2d_1a_3x3", 32, 3, stride=2)
        x = conv(x, "Conv2d_2a_3x3", 32, 3)
        x = conv(x, "Conv2d_2b_3x3", 64, 3, padding=1)
        x = _halve(x)
        x = conv(x, "Conv2d_3b_1x1", 80, 1)
        x = conv(x, "Conv2d_4a_3x3", 192, 3)
        x = _halve(x)
        x = _block_35(conv, x, "Mixed_5b", 32)
        x = _block_35(conv, x, "Mixed_5c", 64)
        x = _block_35(conv, x, "Mixed_5d", 64)
        x = _down_to_17(conv, x, "Mixed_6a")
        x = _block_17(conv, x, "Mixed_6b", 128)
        x = _block_17(conv, x, "Mixed_6c", 160)
        x = _block_17(conv, x, "Mixed_6d", 160)
        x = _block_17(conv, x, "Mixed_6e", 192)
        x = _down_to_8(conv, x, "Mixed_7a")
        x = _block_8(conv, x, "Mixed_7b", _mean_pool)
        max_pool = functools.partial(
            nn.max_pool, window_shape=(3, 3), strides=(1, 1), padding=((1, 1), (1, 1))
        )
        x = _block_8(conv, x, "Mixed_7c", max_pool)
        pool = jnp.mean(x, axis=(1, 2))
        unbiased = nn.Dense(1008, use_bias=False, precision=exact, name="fc")(pool)
        bias = self.param("fc_bias", nn.initializers.zeros, (1008,))
        return {"pool_3": pool, "logits_unbiased": unbiased, "logits": unbiased + bias}


def resize(images: Array) -> Array:
    """Resize (N, H, W, C) float32 to 299 × 299 bilinearly, as TensorFlow 1's resize_bilinear.

    Pixel i of the result lies at i · H/299 of the source; there is no antialiasing.
    """
    for axis in (2, 1):
        size = images.shape[axis]
        position = np.arange(SIZE, dtype=np.float32) * np.float32(size / SIZE)
        low = position.astype(int)
        shape = [1] * images.ndim
        shape[axis] = SIZE
        fraction = (position - low).reshape(shape)
        below = jnp.take(images, low, axis=axis)
        above = jnp.take(images, np.minimum(low + 1, size - 1), axis=axis)
        images = below + (above - below) * fraction
    return images


def prepare(images: Array) -> Array:
    """Convert uint8 images of any size, (N, H, W, 1 or 3), to the network's input."""
    images = jnp.broadcast_to(images.astype(jnp.float32), (*images.shape[:3], 3))
    return (resize(images) - 128) / 128


def convert_state(state: dict[str, np.ndarray]) -> dict[str, Any]:
    """Convert the PyTorch port's state dict to the network's parameters.

    Raises:
      KeyError, ValueError, AttributeError: the tensors are not those of the port.
    """
    params: dict[str, Any] = {
        "fc": {"kernel": state["fc.weight"].T},
        "fc_bias": state["fc.bias"],
    }
    for key, weight in state.items():
        if key.endswith(".conv.weight"):
            layer = key.removesuffix(".conv.weight")
            norm = {name: state[f"{layer}.bn.{name}"].astype(np.float64) for name in _NORM}
            scale = norm["weight"] / np.sqrt(norm["running_var"] + _BN_EPS)
            kernel = weight.transpose(2, 3, 1, 0) * scale
            bias = norm["bias"] - norm["running_mean"] * scale
            params[layer.replace(".", "_")] = {
                "kernel": kernel.astype(np.float32),
                "bias": bias.astype(np.float32),
            }
    expected = jax.eval_shape(InceptionV3().init, jax.random.key(0), jnp.zeros((1, SIZE, SIZE, 3)))

    def shapes(tree: Any) -> Any:
        return {
            jax.tree_util.keystr(k): v.shape for k, v in jax.tree_util.tree_leaves_with_path(tree)
        }

    wrong = sorted(shapes(expected["params"]).items() ^ shapes(params).items())
    if wrong:
        raise ValueError(f"{wrong[0][0]} is not as the FID's Inception-v3 has it")
    return params


_NORM = ("weight", "bias", "running_mean", "running_var")
