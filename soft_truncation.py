"""A trained model as one object.

    import soft_truncation as st

    model = st.load("pretrained/fashion_mnist")  # a run or an exported model
    images = model.sample(16, seed=0)
    bits = model.bits_per_dim(images)

Images are in the data's units: (N, H, W, C) uint8 from 0 to 255. For a model of arrays they have
the type and the range of values of these arrays. `x` is an image as the network receives it
(`to_x`), (N, H, W, C) float32.
"""

import dataclasses
import os
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

import sampling
from build import Setup, set_up, with_data_facts
from configs import saved, seeds
from configs.errors import UserError
from controllable_generation import get_completion_fn
from data.batches import Data, Dataset
from losses import perturb
from metrics import bits_per_dim
from metrics.batched_sampling import get_sampler, sample_batches, sample_chain
from readers.source import ArraySource
from runtime import checkpointing, hub
from runtime.workdir import PartialResults
from sde_lib import expand

__all__ = ["Model", "UserError", "load"]

Labels = int | Sequence[int] | np.ndarray | None


def load(path: str | os.PathLike[str], step: int | None = None) -> "Model":
    """Load the EMA weights of a run or of an exported model.

    Args:
      path: the folder of a run or of an exported model, or `hf://user/name` of an exported model
        on the Hugging Face hub (`hf://user/name@revision`).
      step: the step of a checkpoint of the run; None: the newest checkpoint.

    Raises:
      UserError: `path` has no model, or it can't be read.
    """
    folder = hub.fetch(str(path)) if hub.is_address(path) else pathlib.Path(path)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no run and no exported model: it has no config.json")
    config = with_data_facts(saved.get_config(folder), folder)
    try:
        setup = set_up(config)
    except UserError as error:
        if "it must be one of" not in str(error):
            raise
        file = saved.read(folder).get("config_file") or "its config file"
        raise UserError(f"{error}; if {file} registers it, import that file first") from error
    if step is None:
        state = checkpointing.restore_latest(config, folder, setup.state_shape, weights_only=True)
    else:
        state = checkpointing.restore_step(setup.fields, folder, setup.state_shape, step)
    return Model(setup, jax.device_put(state.ema_params), int(state.step))


class Model:
    """A network with its weights and its SDE.

    Attributes:
      setup: the parts that its config names: `sde`, `shape` (H, W, C), `num_classes`, `classes`, …
      params: the weights.
      step: the step of training at which the weights were saved.
    """

    def __init__(self, setup: Setup, params: Any, step: int) -> None:
        """Each function is compiled when it is first called, and kept."""
        self.setup, self.params, self.step = setup, params, step
        self._samplers: dict[Any, Any] = {}
        self._bpd_fn = bits_per_dim.get_bpd_fn(setup)
        self._complete: dict[int, Any] = {}
        self._ode = jax.jit(self._solve_ode, static_argnames="forward")

    def __repr__(self) -> str:
        """What the model is of, in a line."""
        setup, (low, high) = self.setup, self.sigma_range
        size, told = "×".join(map(str, setup.shape)), f", {setup.num_classes} classes"
        what = f"{setup.fields['data']['dataset']} {size}{told if setup.num_classes else ''}"
        where = f"step {self.step:,}, σ from {low:.2g} to {high:.3g}"
        return f"<Model of {what}: {setup.network}, {where}>"

    def sample(
        self,
        n: int,
        *,
        seed: int = 0,
        labels: Labels = None,
        guidance: float | None = None,
        method: str | None = None,
        steps: int | None = None,
        keep: int = 0,
        batch_size: int = 64,
    ) -> np.ndarray:
        """Draw n images, (n, H, W, C); with the config's seed, the same as `--mode sample`.

        An image depends on the seed and on its index, and not on n.

        Args:
          n: the number of images.
          seed: the seed of the noise.
          labels: a class, or several that are taken in turn; None: those of `sampling.labels`.
          guidance: w of classifier-free guidance; None: the config's.
          method: pc, ode, heun or dpm_solver; None: the config's.
          steps: the number of steps of that method; None: the config's.
          keep: if not 0, the result is (keep, n, H, W, C): states on the way, at noise levels that
            are evenly spaced in log σ²/α², as images; the last ones are the samples.
          batch_size: the number of images that are drawn at once, without `keep`.

        Raises:
          UserError: a label does not exist, or the options contradict each other.
        """
        size = min(n, batch_size)
        if keep:
            setup = self._setup_of(self._label_text(labels), guidance, method, steps)
            states = sample_chain(setup, self.params, seed, n, keep)
            return np.stack([self.setup.units.to_files(levels) for levels in states])
        sampler = self._sampler(size, self._label_text(labels), guidance, method, steps)
        batches = sample_batches(sampler, self.params, seed, n, size)
        levels = np.concatenate([part.levels for _, part in batches])
        return self.setup.units.to_files(levels)

    def bits_per_dim(
        self,
        images: np.ndarray,
        *,
        labels: Labels = None,
        draws: int = 4,
        seed: int | None = None,
        batch_size: int = 64,
    ) -> dict[str, np.ndarray]:
        """The bits/dim of each image under the model.

        An image's scores are a function of its pixels, its label and the seed.

        Args:
          images: (N, H, W, C), in the data's units.
          labels: the classes of the images, if the network is told labels; None: no label.
          draws: the number of draws of dequantisation and noise for each image; 2 or more give
            standard errors.
          seed: the seed of the noise; None: the config's.
          batch_size: the number of images that are scored at once.

        Returns:
          A dictionary of scores, (N,) float64 each: `nll`, `nll_without_residual`, `nelbo` and
          others (docs/likelihood.md). The names with `_stderr` are their standard errors over the
          draws. `nll` is an upper bound on the negative log-likelihood.

        Raises:
          UserError: the images are not of the model's shape or type.
        """
        levels, setup = self._levels(images), self.setup
        told, classes = self._labels(labels, len(images)), tuple(map(str, range(setup.num_classes)))
        options = dataclasses.replace(
            setup.evaluation, batch_size=batch_size, num_draws=draws, num_test_data=len(images)
        )
        setup = dataclasses.replace(
            setup, evaluation=options, seed=setup.seed if seed is None else seed
        )
        source = ArraySource(levels, np.zeros(len(images), int) if told is None else np.array(told))
        given = Dataset("images", source, setup.num_levels, () if told is None else classes)
        with tempfile.TemporaryDirectory() as folder:
            results = PartialResults(pathlib.Path(folder))
            scored = bits_per_dim.BitsEvaluation(setup, Data(given, given), results, self._bpd_fn)
            values = bits_per_dim.bits_of_images(scored, self.params)
        return bits_per_dim.table_of_images(scored, values)

    def encode(self, images: np.ndarray, *, labels: Labels = None) -> Array:
        """The latents z = x_T of images by the probability-flow ODE, (N, H, W, C) float32.

        Args:
          images: (N, H, W, C), in the data's units. They are used as x_ε/α(ε).
          labels: the images' classes; None: no label.
        """
        told, end = self._labels(labels, len(images)), self.setup.sde.T
        return self._ode(self.params, self.to_x(images), told, end, forward=True)

    def decode(self, z: ArrayLike, *, labels: Labels = None) -> np.ndarray:
        """The images (N, H, W, C) of latents z, by the same ODE; the inverse of `encode`."""
        z = jnp.asarray(z, jnp.float32)
        told, start = self._labels(labels, len(z)), self.setup.sde.T
        return self.to_images(self._ode(self.params, z, told, start, forward=False))

    def interpolate(self, a: np.ndarray, b: np.ndarray, n: int = 8) -> np.ndarray:
        """n images from image a to image b, (H, W, C) each, on a great circle of their latents.

        Returns:
          (n, H, W, C). The first is a and the last is b, up to the solver's error.
        """
        first, last = (self.encode(image[None]).repeat(n, axis=0) for image in (a, b))
        return self.decode(sampling.slerp(first, last, jnp.linspace(0, 1, n)))

    def edit(
        self, images: np.ndarray, t: float, *, seed: int = 0, labels: Labels = None
    ) -> np.ndarray:
        """Add noise to images up to the time t, and remove it again (SDEdit, arXiv 2108.01073).

        Args:
          images: (N, H, W, C), in the data's units.
          t: from ε, at which images do not change, to T, at which they change completely.
          seed: the seed of the noise.
          labels: the classes that the results should have; None: no label.
        """
        x0 = self.to_x(images)
        keys = sampling.sample_keys(jax.random.key(seed + seeds.COMPLETIONS), 0, len(x0))
        noised = perturb(self.setup.sde, x0, jnp.full(len(x0), t), sampling.normal(keys, x0.shape))
        told = self._labels(labels, len(images))
        return self.to_images(self._ode(self.params, noised, told, t, forward=False))

    def inpaint(
        self,
        images: np.ndarray,
        mask: np.ndarray,
        *,
        seed: int = 0,
        labels: Labels = None,
        steps: int = 200,
    ) -> np.ndarray:
        """Draw a part of images anew with the predictor-corrector sampler.

        Args:
          images: (N, H, W, C), in the data's units.
          mask: (H, W) or (N, H, W), true for pixels to fill in.
          seed: the seed of the noise.
          labels: the images' classes; None: no label.
          steps: the number of steps of the sampler.
        """
        x0, told = self.to_x(images), self._labels(labels, len(images))
        if np.shape(mask) not in (images.shape[1:3], images.shape[:3]):
            raise UserError(
                f"the mask must be {images.shape[1:3]} or (N, H, W), not {np.shape(mask)}"
            )
        region = np.broadcast_to(np.asarray(mask, np.float32), images.shape[:3])[..., None]
        more = [(0, p - s) for p, s in zip(x0.shape[1:3], images.shape[1:3], strict=True)]
        region = np.pad(region, ((0, 0), *more, (0, 0)), constant_values=1)
        keys = sampling.sample_keys(jax.random.key(seed + seeds.COMPLETIONS), 0, len(x0))
        if steps not in self._complete:
            setup = self.setup
            sampler = sampling.pc(sampling.ancestral_sampling(), None, steps, setup.eps, 1, True)
            self._complete[steps] = get_completion_fn(sampler, setup.sde, setup.make_score_fn)
        x = self._complete[steps](self.params, keys, x0, jnp.asarray(region), told)
        return self.to_images(x)

    def score(self, x: Array, t: ArrayLike, *, labels: Labels = None) -> Array:
        """The score ∇ log p_t(x), (N, H, W, C) float32; usable within `jax.jit` and `jax.grad`.

        Args:
          x: x_t = α(t) x_0 + σ(t) z, (N, H, W, C) float32.
          t: from ε to T, a number or (N,).
          labels: classes; None: no label.
        """
        score_fn = self.setup.make_score_fn(self.params, self._labels(labels, len(x)))
        return score_fn(x, jnp.broadcast_to(jnp.asarray(t, jnp.float32), x.shape[:1]))

    def denoise(
        self,
        x: Array,
        t: ArrayLike | None = None,
        *,
        sigma: ArrayLike | None = None,
        labels: Labels = None,
    ) -> Array:
        """The expected clean image E[x_0 | x], (N, H, W, C) float32; usable within `jax.jit`.

        Args:
          x: with `t`, x_t = α(t) x_0 + σ(t) z; with `sigma`, x_0 + σ z, the convention of EDM and
            k-diffusion, for every SDE. x_0 is in the scale of the network's data (`to_x`).
          t: a number or (N,), from ε to T.
          sigma: a number or (N,), within `sigma_range`; other values are clipped to it.
          labels: classes; None: no label.
        """
        if (t is None) == (sigma is None):
            raise TypeError("denoise takes t or sigma")
        sde, rows = self.setup.sde, x.shape[:1]
        if sigma is not None:
            low, high = (2 * np.log(end) for end in self.sigma_range)
            gamma = jnp.clip(2 * jnp.log(jnp.asarray(sigma, jnp.float32)), low, high)
            t = sde.inverse_gamma(jnp.broadcast_to(gamma, rows))
            x = x * expand(sde.mean_coeff(t), x)
        t = jnp.broadcast_to(jnp.asarray(t, jnp.float32), rows)
        return sde.denoise(x, t, self.score(x, t, labels=labels))

    @property
    def sigma_range(self) -> tuple[float, float]:
        """The least and the largest σ/α that the network was trained on."""
        sde = self.setup.sde
        low, high = (float(jnp.exp(0.5 * sde.gamma(t))) for t in (self.setup.eps, sde.T))
        return low, high

    def to_x(self, images: np.ndarray) -> Array:
        """Convert images (N, H, W, C) in the data's units to x_0, the network's input, float32."""
        return jnp.asarray(self.setup.preprocessing.to_x0_without_noise(self._levels(images)))

    def to_images(self, x: Array) -> np.ndarray:
        """Convert x_0 (N, H, W, C) to images in the data's units; the inverse of `to_x`."""
        return self.setup.units.to_files(np.asarray(self.setup.preprocessing.to_levels(x)))

    def _levels(self, images: np.ndarray) -> np.ndarray:
        images = np.asarray(images)
        if images.ndim != 4 or images.shape[1:] != self.setup.shape:
            raise UserError(f"the model's images are (N, *{self.setup.shape}), not {images.shape}")
        return self.setup.units.from_files(images, self.setup.padded_shape)

    def _label_text(self, labels: Labels) -> str:
        if labels is None:
            return self.setup.sampling.labels
        return ",".join(str(int(label)) for label in np.atleast_1d(labels))

    def _labels(self, labels: Labels, count: int) -> Array | None:
        """Classes of `count` images (count,) int32; None: no label."""
        if labels is None:
            return None
        told, known = np.broadcast_to(np.asarray(labels, np.int32), count), self.setup.num_classes
        if told.min() < 0 or told.max() >= known:
            raise UserError(f"labels are {told.tolist()}; this model is told labels below {known}")
        return jnp.asarray(told)

    def _setup_of(
        self, labels: str, guidance: float | None, method: str | None, steps: int | None
    ) -> Setup:
        """The parts with these options of sampling; None: the config's."""
        of_pc = (method or self.setup.sampling.method) == "pc"
        changes = {
            "sampling.labels": labels,
            "sampling.guidance": guidance,
            "sampling.method": method,
            "model.num_scales" if of_pc else "sampling.num_steps": steps,
        }
        return self.setup.rebuild({name: x for name, x in changes.items() if x is not None})

    def _sampler(self, size: int, *options: Any) -> Any:
        """The compiled sampler of `size` images with the options of `_setup_of`."""
        asked = (size, *options)
        if asked not in self._samplers:
            self._samplers[asked] = get_sampler(self._setup_of(*options), size)
        return self._samplers[asked]

    def _solve_ode(
        self, params: Any, x: Array, labels: Array | None, t: ArrayLike, forward: bool
    ) -> Array:
        """x_t from x_0 by the probability-flow ODE, or x_0 from x_t; x_ε is taken as α(ε) x_0."""
        setup, sde = self.setup, self.setup.sde
        field = sampling.probability_flow(sde, setup.make_score_fn(params, labels))
        ends, alpha = (sde.solver_time(setup.eps), sde.solver_time(t)), sde.mean_coeff(setup.eps)
        tolerances = setup.evaluation.rtol, setup.evaluation.atol
        field = sampling.in_solver_time(sde, field)
        start = x * alpha if forward else x
        end, _ = sampling.solve_ode(field, start, *(ends if forward else ends[::-1]), *tolerances)
        return end if forward else end / alpha
