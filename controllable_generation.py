"""Inpainting and colourisation with any predictor and corrector (arXiv 2011.13456, app. I)."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from ml_collections import ConfigDict
from PIL import Image

import seeds
from configs.shapes import array_shape, image_shape
from datasets import Dataset, highest
from errors import UserError
from runtime.devices import batch_and_replicated_shardings, to_devices, to_host
from runtime.progress import Progress
from sampling import Constraint, MakeScoreFn, make_score, normal, pc_options, pc_sample, sample_keys
from sde_lib import SDE
from session import Setup, check_labels, labels_on_devices


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
      As `inpainting`.
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


def get_completion_fn(
    config: ConfigDict, sde: SDE, make_score_fn: MakeScoreFn
) -> Callable[..., Array]:
    """The compiled function for `config.sampling.task`, inpaint or colorize.

    Returns:
      (params, key or keys (N,), images, mask, labels=None) → x, with images and x (N, H, W, C) in
      the model's range, and the mask as in `inpainting`; colorize ignores it.
    """

    def complete(
        params: Any, key: Array, images: Array, mask: Array, labels: Array | None = None
    ) -> Array:
        if config.sampling.task == "colorize":
            constrain, finish = colorization(sde, images)
        else:
            constrain, finish = inpainting(sde, images, mask)
        score_fn = make_score(make_score_fn, params, labels, config.sampling.guidance)
        options = pc_options(config)
        x, _ = pc_sample(sde, score_fn, key, images.shape, constrain=constrain, **options)
        return finish(x)

    return jax.jit(complete)


PER_IMAGE = 6  # number of completions of each image


def _read_mask(config: ConfigDict) -> np.ndarray:
    """The mask (H, W, 1) that `sampling.mask` names, 1 for pixels to fill in."""
    (height, width, _), name = array_shape(config), config.sampling.mask
    mask = np.zeros((height, width, 1), np.float32)
    inside = (np.s_[size // 4 : size - size // 4] for size in (height, width))
    regions: dict[str, Any] = {
        "left": np.s_[:, : width // 2],
        "right": np.s_[:, width // 2 :],
        "top": np.s_[: height // 2],
        "bottom": np.s_[height // 2 :],
        "center": tuple(inside),
    }
    if name in regions:
        mask[regions[name]] = 1
        return _mask_padding(config, mask)
    try:
        with Image.open(name) as image:
            opaque = np.asarray(image.convert("RGBA"))[..., 3].min() == 255
            resized = image.convert("L").resize((width, height), Image.Resampling.NEAREST)
    except (OSError, ValueError) as error:
        raise UserError(
            f"sampling.mask is {name!r}: neither {', '.join(regions)} nor a readable image"
        ) from error
    mask = (np.asarray(resized)[..., None] > 127).astype(np.float32)
    if not opaque:  # it may be what is to be filled in, or what is known
        raise UserError(
            f"sampling.mask: {name} has transparency; save it without, white where to fill in and "
            "black elsewhere"
        )
    if not mask.any():
        raise UserError(f"sampling.mask: {name} has no white pixel: nothing would be filled in")
    return _mask_padding(config, mask)


def _mask_padding(config: ConfigDict, mask: np.ndarray) -> np.ndarray:
    """The mask of the padded image: the padding repeats the image's edge, so it is not known."""
    height, width, _ = image_shape(config)
    more = (0, height - mask.shape[0]), (0, width - mask.shape[1]), (0, 0)
    return np.pad(mask, more, constant_values=1)


def complete_test_images(
    config: ConfigDict, setup: Setup, test: Dataset, params: Any
) -> dict[str, np.ndarray]:
    """Inpaint or colour test images, each `PER_IMAGE` times.

    Returns:
      `samples`, `originals` and `known` (the known part of the originals): levels, (N, H, W, C)
      each.

    Raises:
      UserError: there are too few test images, or the mask can't be read.
    """
    check_labels(config, test)
    count, most = config.sampling.n_images, PER_IMAGE * len(test)
    if count > most:
        raise UserError(
            f"sampling.n_images is {count}; the test images completed {PER_IMAGE} times each are "
            f"{most}"
        )
    chosen = np.random.default_rng(config.seed).permutation(len(test))[: -(-count // PER_IMAGE)]
    examples = test.source.fetch(np.sort(chosen))
    originals, labels = (
        examples[name].repeat(PER_IMAGE, axis=0)[:count] for name in ("image", "label")
    )
    mask = np.zeros(1, np.float32) if config.sampling.task == "colorize" else _read_mask(config)
    rows, everywhere = batch_and_replicated_shardings()
    complete = get_completion_fn(config, setup.sde, setup.make_score_fn)
    size = min(config.sampling.batch_size, count)
    size = -(-size // jax.device_count()) * jax.device_count()
    params, parts = to_devices(params, everywhere), []
    progress = Progress(config.sampling.task, len(originals))
    for i in range(0, len(originals), size):
        batch = originals[i : i + size]
        kept = len(batch)
        batch = np.pad(batch, ((0, size - kept), (0, 0), (0, 0), (0, 0)), mode="wrap")
        told = np.pad(labels[i : i + size], (0, size - kept), mode="wrap")
        x = setup.preprocessing.to_x0_without_noise(batch)
        keys = sample_keys(jax.random.key(config.seed + seeds.COMPLETIONS), i, size)
        known_at = to_devices(jnp.asarray(mask), everywhere)
        given = labels_on_devices(told, config.model.num_classes)
        completed = complete(params, to_devices(keys, rows), to_devices(x, rows), known_at, given)
        completed = jnp.asarray(to_host(completed))
        parts.append(np.asarray(setup.preprocessing.to_levels(completed))[:kept])
        progress.advance(kept)
    if config.sampling.task == "colorize":
        known = originals.mean(axis=-1, keepdims=True).repeat(3, axis=-1)
    else:
        known = np.where(mask > 0, highest(setup.num_levels) / 2, originals)
    known = known.astype(originals.dtype)
    return {"samples": np.concatenate(parts), "originals": originals, "known": known}


def completion_rows(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """The images of a grid whose rows are the original, its known part, and its completions."""
    cells: list[np.ndarray] = []
    for i in range(0, len(arrays["samples"]), PER_IMAGE):
        cells += [arrays["originals"][i], arrays["known"][i]]
        cells += list(arrays["samples"][i : i + PER_IMAGE])
    return np.stack(cells)
