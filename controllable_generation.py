"""Inpainting and colourisation with any predictor and corrector (arXiv 2011.13456, app. I)."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from PIL import Image

from build import labels_on_devices
from configs import seeds
from configs.errors import UserError
from data.batches import Dataset
from data.pixels import Preprocessing, highest
from runtime.devices import batch_and_replicated_shardings, to_devices, to_host
from runtime.progress import Progress
from sampling import Constraint, MakeScoreFn, make_score, normal, sample_keys
from sde_lib import SDE


def inpainting(
    sde: SDE, images: Array, mask: ArrayLike
) -> tuple[Constraint, Callable[[Array], Array]]:
    """The constraint of `pc_sample` that inpaints images (arXiv 2011.13456, app. I.2).

    Args:
      sde: the SDE.
      images: (N, H, W, C), in the model's range.
      mask: 1 for pixels to fill in, 0 for known pixels; broadcast to the shape of the images.

    Returns:
      (constraint, finish): `finish(samples)` replaces the known pixels by their exact values.
    """
    mask = jnp.asarray(mask)

    def constrain(key: Array, x: Array, t: Array) -> Array:
        z = normal(key, x.shape)
        return mask * x + (1 - mask) * (sde.mean_coeff(t) * images + sde.std(t) * z)

    return constrain, lambda x: mask * x + (1 - mask) * images


def colorization(sde: SDE, images: Array) -> tuple[Constraint, Callable[[Array], Array]]:
    """The constraint of `pc_sample` that colours grey images (arXiv 2011.13456, app. I.3).

    This is inpainting in an orthonormal basis of the colours: the first basis vector is grey and
    known, and the other two are filled in.

    Args:
      sde: the SDE.
      images: (N, H, W, 3), in the model's range; only the mean of their channels is used.

    Returns:
      As for `inpainting`.
    """
    rows = jnp.array([[1.0, 1.0, 1.0], [1.0, -1.0, 0.0], [1.0, 1.0, -2.0]])
    basis = (rows / jnp.linalg.norm(rows, axis=1, keepdims=True)).T
    # In full precision: on GPUs and TPUs every step would add the error of a rounded product.
    times = functools.partial(jnp.matmul, precision="highest")
    constrain, finish = inpainting(sde, times(images, basis), jnp.array([0.0, 1.0, 1.0]))
    return (
        lambda key, x, t: times(constrain(key, times(x, basis), t), basis.T),
        lambda x: times(finish(times(x, basis)), basis.T),
    )


# (params, key or keys (N,), images, mask, labels=None) → x, with images and x (N, H, W, C) in the
# model's range, and the mask as in `inpainting`.
CompletionFn = Callable[..., Array]


def get_completion_fn(
    sampler: Callable[..., Any],
    sde: SDE,
    make_score_fn: MakeScoreFn,
    colors: bool = False,
    guidance: float = 0.0,
) -> CompletionFn:
    """The compiled function that inpaints images, or colours them and ignores the mask.

    Args:
      sampler: `pc_sample` with its options; see `sampling.pc`.
      sde, make_score_fn, guidance: as in `sampling.get_sampling_fn`.
      colors: whether to colour.
    """

    def complete(
        params: Any, key: Array, images: Array, mask: Array, labels: Array | None = None
    ) -> Array:
        if colors:
            constrain, finish = colorization(sde, images)
        else:
            constrain, finish = inpainting(sde, images, mask)
        score_fn = make_score(make_score_fn, params, labels, guidance)
        x, _ = sampler(sde, score_fn, key, images.shape, constrain=constrain)
        return finish(x)

    return jax.jit(complete)


PER_IMAGE = 6  # number of completions of each image


def read_mask(name: str, size: tuple[int, int], padded: tuple[int, int]) -> np.ndarray:
    """The mask of a region (left, right, top, bottom, center) or of an image file.

    Args:
      name: the region, or a file whose white pixels are to be filled in.
      size: the height and width of the images.
      padded: the height and width of the network's images. The padding is filled in too, since it
        repeats an image's edge.

    Returns:
      (*padded, 1) float32, 1 for pixels to fill in.

    Raises:
      UserError: `name` is neither, or the file has transparency or no white pixel.
    """
    height, width = size
    mask = np.zeros((height, width, 1), np.float32)
    regions: dict[str, Any] = {
        "left": np.s_[:, : width // 2],
        "right": np.s_[:, width // 2 :],
        "top": np.s_[: height // 2],
        "bottom": np.s_[height // 2 :],
        "center": np.s_[height // 4 : height - height // 4, width // 4 : width - width // 4],
    }
    if name in regions:
        mask[regions[name]] = 1
    else:
        mask[_white_pixels(name, size, list(regions))] = 1
    more = (0, padded[0] - height), (0, padded[1] - width), (0, 0)
    return np.pad(mask, more, constant_values=1)


def _white_pixels(name: str, size: tuple[int, int], regions: list[str]) -> np.ndarray:
    """Where an image file, resized, is white, (H, W) bool."""
    try:
        with Image.open(name) as image:
            opaque = np.asarray(image.convert("RGBA"))[..., 3].min() == 255
            resized = image.convert("L").resize(size[::-1], Image.Resampling.NEAREST)
    except (OSError, ValueError) as error:
        raise UserError(
            f"sampling.mask is {name!r}: neither {', '.join(regions)} nor a readable image"
        ) from error
    white = np.asarray(resized) > 127
    if not opaque:  # it may be what is to be filled in, or what is known
        raise UserError(
            f"sampling.mask: {name} has transparency; save it without, white where to fill in and "
            "black elsewhere"
        )
    if not white.any():
        raise UserError(f"sampling.mask: {name} has no white pixel: nothing would be filled in")
    return white


def complete_test_images(
    complete: CompletionFn,
    params: Any,
    test: Dataset,
    preprocessing: Preprocessing,
    mask: np.ndarray | None,
    *,
    count: int,
    batch_size: int,
    seed: int,
    num_classes: int = 0,
) -> dict[str, np.ndarray]:
    """Inpaint or colour images, each `PER_IMAGE` times.

    Args:
      complete: from `get_completion_fn`.
      params: the network's parameters.
      test: test images, or given ones.
      preprocessing: from their levels to the model's range and back.
      mask: from `read_mask`; None: images are coloured.
      count, batch_size: the number of completions, if there are enough images, and the number in a
        batch.
      seed: chooses the images and their noise.
      num_classes: the number of labels of the network; 0: it is told no labels.

    Returns:
      `samples`, `originals` and `known` (the known part of the originals): levels, (N, H, W, C)
      each.

    """
    count = min(count, PER_IMAGE * len(test))
    chosen = np.random.default_rng(seed).permutation(len(test))[: -(-count // PER_IMAGE)]
    examples = test.source.fetch(np.sort(chosen))
    originals, labels = (
        examples[name].repeat(PER_IMAGE, axis=0)[:count] for name in ("image", "label")
    )
    rows, everywhere = batch_and_replicated_shardings()
    size = -(-min(batch_size, count) // jax.device_count()) * jax.device_count()
    params, parts = to_devices(params, everywhere), []
    unknown = to_devices(jnp.asarray(np.zeros(1, np.float32) if mask is None else mask), everywhere)
    progress = Progress("colorize" if mask is None else "inpaint", count, compiles=True)
    for i in range(0, count, size):
        batch = np.arange(i, i + size) % count  # the last one is filled up
        x = preprocessing.to_x0_without_noise(originals[batch])
        keys = sample_keys(jax.random.key(seed + seeds.COMPLETIONS), i, size)
        told = labels_on_devices(labels[batch], num_classes)
        completed = complete(params, to_devices(keys, rows), to_devices(x, rows), unknown, told)
        levels = np.asarray(preprocessing.to_levels(jnp.asarray(to_host(completed))))
        parts.append(levels[: count - i])
        progress.advance(len(parts[-1]))
    if mask is None:
        known = originals.mean(axis=-1, keepdims=True).repeat(3, axis=-1)
    else:
        known = np.where(mask > 0, highest(preprocessing.num_levels) / 2, originals)
    known = known.astype(originals.dtype)
    return {"samples": np.concatenate(parts), "originals": originals, "known": known}


def completion_rows(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """The images of a grid whose rows are the original, its known part, and its completions."""
    cells: list[np.ndarray] = []
    for i in range(0, len(arrays["samples"]), PER_IMAGE):
        cells += [arrays["originals"][i], arrays["known"][i]]
        cells += list(arrays["samples"][i : i + PER_IMAGE])
    return np.stack(cells)
