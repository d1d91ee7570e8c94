"""Inpainting and colourisation with any predictor and corrector (arXiv 2011.13456, app. I)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from ml_collections import ConfigDict

from sampling import Constraint, MakeScoreFn, pc_options, pc_sample
from sde_lib import SDE


def inpainting(
    sde: SDE, images: Array, mask: ArrayLike
) -> tuple[Constraint, Callable[[Array], Array]]:
    """What `pc_sample` needs to fill in the masked part of images (arXiv 2011.13456, app. I.2).

    Args:
      sde: the SDE.
      images: (N, H, W, C), in the model's range.
      mask: 1 where pixels are to be filled in, 0 where they are known; broadcast to the images.

    Returns:
      (constraint, finish): `finish(samples)` puts the known pixels in exactly.
    """
    mask = jnp.asarray(mask)

    def constrain(key: Array, x: Array, t: Array) -> Array:
        z = jax.random.normal(key, x.shape)
        return mask * x + (1 - mask) * (sde.mean_coeff(t) * images + sde.std(t) * z)

    return constrain, lambda x: mask * x + (1 - mask) * images


def colorization(sde: SDE, images: Array) -> tuple[Constraint, Callable[[Array], Array]]:
    """What `pc_sample` needs to colour grey images (arXiv 2011.13456, app. I.3).

    In an orthonormal basis of the colours whose first vector is grey, inpainting of the others.

    Args:
      sde: the SDE.
      images: (N, H, W, 3), in the model's range; only the mean of their channels is used.

    Returns:
      As `inpainting`.
    """
    rows = jnp.array([[1.0, 1.0, 1.0], [1.0, -1.0, 0.0], [1.0, 1.0, -2.0]])
    basis = (rows / jnp.linalg.norm(rows, axis=1, keepdims=True)).T
    constrain, finish = inpainting(sde, images @ basis, jnp.array([0.0, 1.0, 1.0]))
    return (
        lambda key, x, t: constrain(key, x @ basis, t) @ basis.T,
        lambda x: finish(x @ basis) @ basis.T,
    )


def get_completion_fn(
    config: ConfigDict, sde: SDE, make_score_fn: MakeScoreFn
) -> Callable[[Any, Array, Array, Array], Array]:
    """The task that `config.sampling.task` names, compiled: inpaint or colorize.

    Returns:
      (params, key, images, mask) → x, with images (N, H, W, C) in the model's range, mask as in
      `inpainting` (colorize takes no notice of it), and x like the images.
    """

    def complete(params: Any, key: Array, images: Array, mask: Array) -> Array:
        if config.sampling.task == "colorize":
            constrain, finish = colorization(sde, images)
        else:
            constrain, finish = inpainting(sde, images, mask)
        score_fn, options = make_score_fn(params), pc_options(config)
        x, _ = pc_sample(sde, score_fn, key, images.shape, constrain=constrain, **options)
        return finish(x)

    return jax.jit(complete)
