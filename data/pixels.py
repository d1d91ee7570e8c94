"""Pixels as levels, as the network's input and as users see them.

Pixels are levels 0 … num_levels - 1. There are 17 for scikit-learn's digits, `data.num_levels` for
arrays of whole numbers, and 256 for all other data sets. Arrays of floats have num_levels = 0;
their pixels range from 0 to 1 in the training images, and `Units` converts them back to the data's
own units. `Preprocessing` flips, dequantises and scales pixels on the device.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from configs.errors import UserError
from data.spec import DataSpec


def highest(num_levels: int) -> int:
    """The highest level, or 1 for floats."""
    return num_levels - 1 if num_levels else 1


def ends(scale: tuple[Any, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The low and high of `data.scale`, float64: () for all channels, or (C,)."""
    low, high = (np.asarray(end, np.float64) for end in scale)
    return low, high


@functools.partial(jax.vmap, in_axes=(0, 0))
def _flip(image: Array, key: Array) -> Array:
    return jnp.where(jax.random.bernoulli(key), image[:, ::-1], image)


def dequantize(images: ArrayLike, keys: Array, num_levels: int) -> Array:
    """(image + u) / num_levels in [0, 1) with uniform u: (N, H, W, C) and keys (N,), float32."""
    images = jnp.asarray(images, jnp.float32)
    uniform = jax.vmap(lambda key: jax.random.uniform(key, images.shape[1:]))(keys)
    return (images + uniform) / num_levels


def scale(x: Any, centered: bool) -> Any:
    """From [0, 1] to the model's range, which is [-1, 1] if `centered`."""
    return 2 * x - 1 if centered else x


def inverse_scale(x: Any, centered: bool) -> Any:
    """From the model's range to [0, 1]."""
    return (x + 1) / 2 if centered else x


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """The conversion of levels to the network's input x_0, and back.

    Attributes:
      num_levels: levels are 0 … num_levels - 1; 0: pixels are floats from 0 to 1.
      centered: whether the model's range is [-1, 1] instead of [0, 1].
      dequantization: none, uniform or lossless.
      random_flip: whether to mirror images at random in training.
      width: for floats, a difference of 1 in the data's own units; if channels differ, the
        geometric mean.
    """

    num_levels: int
    centered: bool
    dequantization: str
    random_flip: bool
    width: float = 1.0

    @property
    def dtype(self) -> Any:
        """The type of pixels: uint8, uint16 for more than 256 levels, or float32."""
        if not self.num_levels:
            return np.float32
        return np.uint8 if self.num_levels <= 256 else np.uint16

    def to_x0(self, images: Array, keys: Array, flip: bool) -> Array:
        """Convert levels to x_0: flip them at random if `flip`, dequantise and scale them.

        Args:
          images: levels, (N, H, W, C).
          keys: (N,), one key for each image.
          flip: whether `random_flip` applies.

        Returns:
          (N, H, W, C) float32.
        """
        flip_keys, noise_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
        if flip and self.random_flip:
            images = _flip(images, flip_keys)
        if self.dequantization == "uniform":
            x = dequantize(images, noise_keys, self.num_levels)
        else:
            x = images.astype(jnp.float32) / highest(self.num_levels)
        return scale(x, self.centered)

    def to_x0_without_noise(self, images: np.ndarray) -> np.ndarray:
        """Convert levels to x_0, with the mean of the dequantisation's noise in place of noise."""
        if self.dequantization == "uniform":
            x = (images.astype(np.float32) + 0.5) / self.num_levels
        else:
            x = images.astype(np.float32) / highest(self.num_levels)
        return scale(x, self.centered)

    def to_density_x0(self, images: np.ndarray, keys: Array) -> Array:
        """Convert pixels to values that have a density: levels uniformly dequantised, and scaled.

        Arguments and result are as for `to_x0`.
        """
        if not self.num_levels:
            return jnp.asarray(self.to_x0_without_noise(images))
        return scale(dequantize(images, keys, self.num_levels), self.centered)

    def to_levels(self, x: Array) -> Array:
        """Convert samples (N, H, W, C) to pixels, levels to the nearest; the inverse of `to_x0`."""
        x = inverse_scale(x, self.centered)
        if not self.num_levels:
            return x
        if self.dequantization == "uniform":
            levels = jnp.floor(x * self.num_levels)
        else:
            levels = jnp.round(x * (self.num_levels - 1))
        return jnp.clip(levels, 0, self.num_levels - 1).astype(self.dtype)

    @property
    def level_grid(self) -> tuple[float, float]:
        """(lowest level, distance between levels) in the model's range, without dequantisation."""
        lowest = -1.0 if self.centered else 0.0
        return lowest, (1 - lowest) / (self.num_levels - 1)

    @property
    def cell_width(self) -> float:
        """The distance between the values of `to_x0_without_noise` for neighbouring levels."""
        if self.dequantization == "uniform":
            return (2.0 if self.centered else 1.0) / self.num_levels
        return self.level_grid[1]

    @property
    def bits_offset(self) -> float:
        """The term to add to -log2 p(x)/D of scaled, dequantised data for bits/dim of the levels.

        It is log2(num_levels), for the width of a level in [0, 1], minus 1 if scaling to [-1, 1]
        doubles the width: 7 for 256 levels in [-1, 1]. For floats, log2(width) replaces
        log2(num_levels), which gives the density in the data's own units.
        """
        return float(np.log2(self.num_levels or self.width) - (1 if self.centered else 0))


def get_preprocessing(spec: DataSpec, num_levels: int = 0) -> Preprocessing:
    """The preprocessing of a data set; `num_levels` replaces its number of levels."""
    width = 1.0
    if spec.scale:
        low, high = ends(spec.scale)
        width = float(np.exp(np.mean(np.log(high - low))))
    levels = num_levels or spec.num_levels
    return Preprocessing(levels, spec.centered, spec.dequantization, spec.random_flip, width)


def share_at_ends(levels: np.ndarray, num_levels: int) -> float:
    """The share of the values that are the lowest or the highest level."""
    return float(np.mean((levels == 0) | (levels == num_levels - 1)))


def levels_to_uint8(levels: np.ndarray, num_levels: int) -> np.ndarray:
    """Convert levels to values 0 … 255; floats are clipped to [0, 1], and 0 if not finite."""
    if not num_levels:
        levels = np.clip(np.nan_to_num(levels, posinf=0, neginf=0), 0, 1)
    return np.round(levels.astype(np.float32) * (255 / highest(num_levels))).astype(np.uint8)


@dataclasses.dataclass(frozen=True)
class Units:
    """The conversion of pixels to what users see: files in the data's own units, and pictures.

    Attributes:
      num_levels: as in `Preprocessing`.
      of_arrays: whether the data set is an array; files of other data sets have values 0 … 255.
      scale: for floats, the values in the data's units that are 0 and 1 here; numbers, or one for
        each channel.
      size: the height and width of the data, without padding.
      show_channels: the channels that pictures show; (): all, side by side if not 1 or 3.
    """

    num_levels: int
    of_arrays: bool
    scale: tuple[Any, ...]
    size: tuple[int, int]
    show_channels: tuple[int, ...]

    def to_files(self, levels: np.ndarray) -> np.ndarray:
        """Convert pixels (N, H, W, C) to the values in files, without padding."""
        height, width = self.size
        levels = levels[:, :height, :width]
        if not self.of_arrays:
            return levels_to_uint8(levels, self.num_levels)
        if not self.scale:
            return levels
        low, high = ends(self.scale)
        return (low + (high - low) * levels.astype(np.float64)).astype(np.float32)

    def from_files(self, files: np.ndarray, padded: tuple[int, int, int]) -> np.ndarray:
        """Convert images (N, H, W, C) from files to pixels, padded; the inverse of `to_files`.

        Raises:
          UserError: they are of another type, or have levels that the data do not have.
        """
        if not self.of_arrays:
            if files.dtype != np.uint8:
                raise UserError(f"images must be uint8, from 0 to 255; these are {files.dtype}")
            levels = np.round(files.astype(np.float32) * (highest(self.num_levels) / 255))
            levels = levels.astype(np.uint8)
        elif self.scale:
            low, high = ends(self.scale)
            levels = ((files.astype(np.float64) - low) / (high - low)).astype(np.float32)
        else:
            if files.dtype.kind not in "iu" or files.min() < 0 or files.max() >= self.num_levels:
                raise UserError(f"images must be whole numbers from 0 to {self.num_levels - 1}")
            levels = files.astype(np.uint8 if self.num_levels <= 256 else np.uint16)
        more = [(0, end - size) for end, size in zip(padded[:2], files.shape[1:3], strict=True)]
        return np.pad(levels, [(0, 0), *more, (0, 0)], mode="edge")

    def to_pictures(self, levels: np.ndarray) -> np.ndarray:
        """Convert pixels (N, H, W, C) to pictures, (N, H, W', 1 or 3) uint8."""
        height, width = self.size
        pictures = levels_to_uint8(levels[:, :height, :width], self.num_levels)
        if self.show_channels:
            return pictures[..., list(self.show_channels)]
        if pictures.shape[-1] in (1, 3):
            return pictures
        return np.moveaxis(pictures, -1, 2).reshape(len(pictures), height, -1, 1)


def get_units(spec: DataSpec) -> Units:
    """The units of a data set."""
    size = spec.shape[:2]
    return Units(spec.num_levels, spec.is_array, spec.scale, size, spec.show_channels)
