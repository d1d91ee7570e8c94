"""Soft truncation: the prior on the truncation, times, weightings and the training step.

The objective for one truncation τ (arXiv 2106.05527, eq. 4) is

    L(θ; λ, τ) = ½ ∫_τ^T λ(t) E‖s_θ(x_t, t) - ∇ log p_0t(x_t | x_0)‖² dt.

Soft truncation draws τ anew in every step, one for the whole mini-batch. All randomness is a
function of (seed, step, index of the image in the global batch), so that neither the number of
devices nor an interruption changes a run.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import Array
from jax.typing import ArrayLike
from ml_collections import ConfigDict

import datasets
from models import utils as mutils
from sde_lib import SDE, expand


class Prior(Protocol):
    """What a prior on the truncation has."""

    def icdf(self, u: ArrayLike) -> Array:
        """The τ with P(τ' ≤ τ) = u, elementwise on `u` in [0, 1]."""

    def cdf(self, t: ArrayLike) -> Array:
        """P(τ ≤ t), elementwise."""


@dataclasses.dataclass(frozen=True)
class TruncationPrior:
    """P_k(τ) ∝ τ^-k on [eps, T] (arXiv 2106.05527, §4.2).

    Accurate to 1e-5 relative in float32 for every k, k → 1 included.

    Attributes:
      k: exponent, at least 0. 0 is uniform; inf is the fixed truncation τ = eps.
      eps: smallest truncation.
      T: largest truncation.
    """

    k: float
    eps: float
    T: float = 1.0

    def __post_init__(self) -> None:
        if not self.k >= 0:
            raise ValueError(f"the prior's k is {self.k}; it must be at least 0")
        if not 0 < self.eps < self.T:
            raise ValueError(f"the prior's eps is {self.eps}; it must be in (0, {self.T})")

    @property
    def _power(self) -> float:
        return self.k - 1

    @property
    def _log_range(self) -> float:
        return math.log(self.T / self.eps)

    def icdf(self, u: ArrayLike) -> Array:
        """The τ with P(τ' ≤ τ) = u, elementwise on `u` in [0, 1]."""
        u = jnp.asarray(u)
        m, log_range = self._power, self._log_range
        if math.isinf(self.k):
            return jnp.full_like(u, self.eps)
        if m == 0:
            log_ratio = u * log_range
        elif abs(m) * log_range < 0.5:
            # 1 - u(1 - (ε/T)^m) is close to 1 here: log1p keeps the digits as k → 1.
            log_ratio = -jnp.log1p(u * math.expm1(-m * log_range)) / m
        else:
            # The same as a sum of positive terms, which keeps the digits as u → 1.
            log_ratio = -jnp.log((1 - u) + u * math.exp(-m * log_range)) / m
        return jnp.clip(self.eps * jnp.exp(log_ratio), self.eps, self.T)

    def cdf(self, t: ArrayLike) -> Array:
        """P(τ ≤ t), elementwise."""
        t = jnp.asarray(t)
        if math.isinf(self.k):
            return jnp.where(t >= self.eps, 1.0, 0.0)
        log_ratio = jnp.log(jnp.clip(t, self.eps, self.T) / self.eps)
        if self._power == 0:
            return log_ratio / self._log_range
        m = self._power
        return jnp.expm1(-m * log_ratio) / math.expm1(-m * self._log_range)

    def pdf(self, t: ArrayLike) -> Array:
        """Density at t, elementwise; 0 outside [eps, T]. For k = inf: inf at eps, 0 elsewhere."""
        t = jnp.asarray(t)
        if math.isinf(self.k):
            return jnp.where(t == self.eps, jnp.inf, 0.0)
        m, log_range = self._power, self._log_range
        normalizer = log_range if m == 0 else -math.expm1(-m * log_range) / m
        inside = (t >= self.eps) & (t <= self.T)
        ratio = jnp.where(inside, t, self.eps) / self.eps
        return jnp.where(inside, ratio ** (-self.k) / (self.eps * normalizer), 0.0)


# The prior on τ by `training.prior`.
PRIORS: dict[str, Callable[[ConfigDict], Prior]] = {
    "power": lambda config: TruncationPrior(config.training.k, config.training.truncation_time),
}


def get_prior(config: ConfigDict) -> Prior:
    """The prior on the truncation that a config names."""
    return PRIORS[config.training.prior](config)


def draw_times(
    sde: SDE, u: Array, tau: ArrayLike, importance_sampling: bool
) -> tuple[Array, Array]:
    """Times on [τ, T] from uniforms, and the reciprocal of the density that they were drawn with.

    Args:
      sde: the SDE.
      u: uniforms in [0, 1], shape (N,).
      tau: truncation, scalar or (N,).
      importance_sampling: draw t ∝ g²/σ² (the density of the importance-sampled likelihood
        weighting) instead of uniformly.

    Returns:
      (t, 1/density), each (N,): `mean(f(t) / density)` is unbiased for ∫_τ^T f(t) dt.
    """
    if importance_sampling:
        t = sde.importance_time(u, tau)
        return t, sde.importance_normalizer(tau) * (sde.std(t) / sde.diffusion(t)) ** 2
    tau = jnp.asarray(tau)
    return tau + u * (sde.T - tau), jnp.broadcast_to(sde.T - tau, u.shape)


def sum_image(x: Array) -> Array:
    """Sums over all axes but the first, float32."""
    return jnp.sum(x.astype(jnp.float32), axis=tuple(range(1, x.ndim)))


# λ(t) by `training.weighting`; without one `training.likelihood_weighting` says which.
WEIGHTINGS: dict[str, Callable[[SDE, Array], Array]] = {
    "likelihood": lambda sde, t: sde.diffusion(t) ** 2,
    "variance": lambda sde, t: sde.std(t) ** 2,
}


def get_weighting(config: ConfigDict) -> Callable[[SDE, Array], Array]:
    """(sde, t (N,)) → λ(t) (N,), the weighting that a config names."""
    training = config.training
    chosen = "likelihood" if training.likelihood_weighting else "variance"
    return WEIGHTINGS[training.weighting or chosen]


def perturb(sde: SDE, x0: Array, t: Array, z: Array) -> Array:
    """x_t = α x_0 + σ z for x0 and z (N, ...), t (N,)."""
    return expand(sde.mean_coeff(t), x0) * x0 + expand(sde.std(t), x0) * z


def score_matching_loss(
    score_fn: Callable[[Array, Array], Array],
    sde: SDE,
    x0: Array,
    t: Array,
    z: Array,
    weight: Array,
) -> Array:
    """½ weight ‖s(x_t, t) - ∇ log p_0t(x_t | x_0)‖² for each image (denoising score matching).

    Args:
      score_fn: (x (N, ...), t (N,)) → score (N, ...).
      sde: the SDE.
      x0: scaled data, (N, ...).
      t: times, (N,).
      z: standard normal noise, the shape of x0.
      weight: λ(t) over the density that t was drawn with, (N,).

    Returns:
      (N,) in float32, summed over the dimensions of an image.
    """
    std = sde.std(t)
    # ∇ log p_0t = -z/σ; multiplied through by σ, so that nothing is divided by a small σ.
    scaled_score = expand(std, x0) * score_fn(perturb(sde, x0, t, z), t)
    return 0.5 * (weight / std**2) * sum_image((scaled_score + z) ** 2)


def reconstruction_loss(
    score_fn: Callable[[Array, Array], Array], sde: SDE, x0: Array, eps: ArrayLike, z: Array
) -> Array:
    """The residual: log p_0ε(x_ε | x_0) - log p(x_0 | x_ε) for x_ε = α x_0 + σ z, in nats.

    The decoder p(x_0 | x_ε) is normal, with the mean `sde.denoise(x_ε)` and the deviation σ/α.

    Args:
      score_fn, sde, x0: as in `score_matching_loss`.
      eps: where the diffusion starts.
      z: standard normal noise, the shape of x0.

    Returns:
      (N,) in float32.
    """
    dims = math.prod(x0.shape[1:])
    error, alpha = _decoding_error(score_fn, sde, x0, eps, z)
    # Both are normal; the deviations σ and σ/α leave D log α of their normalisers.
    return 0.5 * (sum_image(error**2) - sum_image(z**2)) - dims * jnp.log(alpha)


def discrete_decoder_loss(
    score_fn: Callable[[Array, Array], Array],
    sde: SDE,
    x0: Array,
    eps: ArrayLike,
    z: Array,
    lowest: float,
    width: float,
) -> Array:
    """-log P(x_0 | x_ε), the lossless decoder of levels (arXiv 2006.11239, eq. 13), in nats.

    P is the mass of `reconstruction_loss`'s decoder on the interval of each level, which for the
    lowest and the highest level is unbounded.

    Args:
      score_fn, sde, eps, z: as in `reconstruction_loss`.
      x0: levels, scaled and not dequantised, (N, ...).
      lowest: the lowest level, scaled; the highest is 1.
      width: distance between levels.

    Returns:
      (N,) in float32.
    """
    error, alpha = _decoding_error(score_fn, sde, x0, eps, z)
    half = 0.5 * width * alpha / sde.std(eps)
    below = jnp.where(x0 < lowest + 0.5 * width, -jnp.inf, error - half)
    above = jnp.where(x0 > 1 - 0.5 * width, jnp.inf, error + half)
    return -sum_image(_log_normal_mass(below, above))


def _decoding_error(
    score_fn: Callable[[Array, Array], Array], sde: SDE, x0: Array, eps: ArrayLike, z: Array
) -> tuple[Array, Array]:
    """(x_0 - E[x_0 | x_ε]) in the decoder's deviations, and α(ε)."""
    t = jnp.full(len(x0), eps, jnp.float32)
    x_eps = perturb(sde, x0, t, z)
    std, alpha = sde.std(eps), sde.mean_coeff(eps)
    return (x0 - sde.denoise(x_eps, t, score_fn(x_eps, t))) * alpha / std, alpha


def _log_normal_mass(below: Array, above: Array) -> Array:
    """log(Φ(above) - Φ(below)), either of which can be infinite, without under- or overflow."""
    # On the left of 0, where Φ keeps its digits.
    mirror = below > 0
    low, high = jnp.where(mirror, -above, below), jnp.where(mirror, -below, above)
    high = jnp.minimum(high, 40.0)  # where Φ is 1 and has a derivative
    narrow = high - low < 0.01
    middle = jnp.where(narrow, 0.5 * (low + high), 0.0)
    width = jnp.where(narrow, high - low, 1.0)
    density = -0.5 * middle**2 - 0.5 * math.log(2 * math.pi) + jnp.log(width)
    tail = jax.scipy.special.log_ndtr(jnp.where(narrow, 1.0, high))
    cut = jax.scipy.special.log_ndtr(jnp.where(narrow | jnp.isinf(low), 0.0, low))
    whole = narrow | jnp.isinf(low)
    mass = tail + jnp.where(whole, 0.0, jnp.log1p(-jnp.exp(jnp.where(whole, -1.0, cut - tail))))
    return jnp.where(narrow, density, mass)


@struct.dataclass
class TrainState:
    """Everything that a run keeps: a checkpoint is exactly this."""

    step: Array
    params: Any
    ema_params: Any
    opt_state: Any


def _is_trained(params: Any) -> Any:
    """For each parameter, whether it is: the Fourier embedding's frequencies are not."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "GaussianFourierProjection" not in str(path[0]), params
    )


def _decays(params: Any) -> Any:
    """For each parameter, or for each vector of `Packed`, whether L2 decay applies to it."""
    if isinstance(params, Packed):
        return dataclasses.replace(params, trained=True, fixed=False)  # type: ignore[arg-type]
    return _is_trained(params)


def get_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """Clip by global norm, L2 decay, Adam, linear warm-up from 0: the official order."""
    optim = config.optim
    schedule = optax.linear_schedule(0.0, optim.lr, optim.warmup) if optim.warmup else optim.lr
    decay = (
        optax.add_decayed_weights(optim.weight_decay, mask=_decays)
        if optim.weight_decay
        else optax.identity()
    )
    return optax.chain(
        optax.clip_by_global_norm(optim.grad_clip) if optim.grad_clip >= 0 else optax.identity(),
        decay,
        optax.scale_by_adam(b1=optim.beta1, b2=0.999, eps=optim.eps),
        optax.scale_by_learning_rate(schedule),
    )


def ema_decay(rate: float, num_updates: ArrayLike) -> Array:
    """min(rate, (1 + n)/(10 + n)) for the n-th update, counted from 1 (the official rule)."""
    n = jnp.asarray(num_updates, jnp.float32)
    return jnp.minimum(rate, (1 + n) / (10 + n))


def step_key(seed: int, step: ArrayLike) -> Array:
    """The key of one training step."""
    return jax.random.fold_in(jax.random.key(seed), step)


def draw_truncation(key: Array, config: ConfigDict) -> Array:
    """The truncation of one step, a scalar: drawn from the prior, or ε."""
    if config.training.truncation != "soft":
        return jnp.asarray(config.training.truncation_time, jnp.float32)
    return get_prior(config).icdf(jax.random.uniform(key))


def _image_keys(image_key: Array, i: Array) -> Array:
    """Keys of an image's data, time, noise, dropout, and noise at the truncation."""
    return jax.random.split(jax.random.fold_in(image_key, i), 5)


def _times_and_weights(
    config: ConfigDict, sde: SDE, u: Array, index: Array, tau: Array
) -> tuple[Array, Array]:
    """Times of images, and the weight of each one's loss, from uniform numbers; (N,) each."""
    training = config.training
    t, inverse_density = draw_times(sde, u, tau, training.importance_sampling)
    weight = get_weighting(config)(sde, t) * inverse_density
    if training.mixed:
        other_t, other_inverse = draw_times(sde, u, tau, importance_sampling=False)
        other_weight = WEIGHTINGS["variance"](sde, other_t) * other_inverse
        first = index % 2 == 0
        t = jnp.where(first, t, other_t)
        weight = jnp.where(first, weight, other_weight)
    if training.truncation == "equivalent_weight":
        weight = weight * get_prior(config).cdf(t)
    return t, weight


def times_of_step(config: ConfigDict, sde: SDE, step: int) -> tuple[Array, Array]:
    """The truncation and the times (batch,) that the step after `step` steps trains at."""
    tau_key, image_key = jax.random.split(step_key(config.seed, step))
    tau, index = draw_truncation(tau_key, config), jnp.arange(config.training.batch_size)
    u = jax.vmap(lambda i: jax.random.uniform(_image_keys(image_key, i)[1]))(index)
    return tau, _times_and_weights(config, sde, u, index, tau)[0]


def get_batch_loss_fn(
    config: ConfigDict, sde: SDE, model: mutils.Model, num_levels: int, train: bool
) -> Callable[[Any, Array, Array, Array], tuple[Array, Array]]:
    """The objective of the config, as a function that does all of its drawing from keys.

    Returns:
      loss_fn(params, key, images, index) → (loss of each image (N,), τ). `key` is the step's,
      `images` are uint8 (N, H, W, C), `index` (N,) is each image's place in the global batch.
      With `training.mixed` the images of even places are the first half, the others the second;
      with `balanced`, the halves' ratio is that of the batch on all devices.
    """
    training, data = config.training, config.data
    scale = 1.0 / (data.image_size**2 * data.num_channels) if training.reduce_mean else 1.0
    lowest, width = datasets.level_grid(num_levels, data.centered)

    def loss_fn(params: Any, key: Array, images: Array, index: Array) -> tuple[Array, Array]:
        tau_key, image_key = jax.random.split(key)
        tau = draw_truncation(tau_key, config)

        def draw(i: Array) -> tuple[Array, Array, Array, Array, Array]:
            data_key, t_key, z_key, dropout_key, z_tau_key = _image_keys(image_key, i)
            z, z_tau = (jax.random.normal(k, images.shape[1:]) for k in (z_key, z_tau_key))
            return data_key, jax.random.uniform(t_key), z, dropout_key, z_tau

        data_keys, u, z, dropout_keys, z_tau = jax.vmap(draw)(index)
        x0 = datasets.preprocess(images, data_keys, num_levels, config, flip=train)
        t, weight = _times_and_weights(config, sde, u, index, tau)
        score_fn = mutils.get_score_fn(config, sde, model, params, train=train)
        if train:
            score_fn = lambda x, t, score=score_fn: score(x, t, dropout_keys)  # noqa: E731
        losses = score_matching_loss(score_fn, sde, x0, t, z, weight)
        if training.mixed:
            ratio, first = jnp.ones(()), index % 2 == 0
            if training.balanced:
                ratio = _mean_ratio(losses, first, "batch" if train else None)
            losses = losses * jnp.where(first, 2, 2 * training.ddpm_weight * ratio)
        if training.reconstruction_loss:
            if data.dequantization == "lossless":
                losses += discrete_decoder_loss(score_fn, sde, x0, tau, z_tau, lowest, width)
            else:
                losses += reconstruction_loss(score_fn, sde, x0, tau, z_tau)
        return losses * scale, tau

    return loss_fn


def _mean_ratio(losses: Array, first: Array, axis_name: str | None) -> Array:
    """The mean of first losses over the others after them, as a constant; over all devices."""
    ratios = jnp.where(first, losses / jnp.roll(losses, -1), 0)
    mean = jnp.sum(ratios) / jnp.sum(first)
    return jax.lax.stop_gradient(jax.lax.pmean(mean, axis_name) if axis_name else mean)


@struct.dataclass
class Packed:
    """A tree of parameters as two vectors, which take a few kernels to update and not thousands.

    Attributes:
      trained, fixed: the leaves of each kind (`_is_trained`), one after the other.
      layout: (structure of the tree, each leaf's shape, whether each is trained).
    """

    trained: Array
    fixed: Array
    layout: Any = struct.field(pytree_node=False)


def pack(params: Any) -> Packed:
    """`Packed` of a tree of parameters, or of another tree of that structure."""
    leaves, structure = jax.tree.flatten(params)
    kinds = jax.tree.leaves(_is_trained(params))
    parts: list[list[Array]] = [[], []]
    for leaf, kind in zip(leaves, kinds, strict=True):
        parts[kind].append(jnp.ravel(leaf))
    fixed, trained = (jnp.concatenate(part) if part else jnp.zeros(0) for part in parts)
    return Packed(trained, fixed, (structure, tuple(map(jnp.shape, leaves)), tuple(kinds)))


def unpack(packed: Packed) -> Any:
    """The tree that was packed."""
    structure, shapes, kinds = packed.layout
    leaves, place = [], [0, 0]
    for shape, kind in zip(shapes, kinds, strict=True):
        start, stop = place[kind], place[kind] + math.prod(shape)
        leaves.append((packed.trained if kind else packed.fixed)[start:stop].reshape(shape))
        place[kind] = stop
    return jax.tree.unflatten(structure, leaves)


@jax.jit
def pack_state(state: TrainState) -> TrainState:
    """The state as `get_step_fn`'s steps take it: all that is laid out as parameters is packed."""
    structure: Any = jax.tree.structure(state.params)
    is_params = lambda x: structure == jax.tree.structure(x)  # noqa: E731
    return jax.tree.map(lambda x: pack(x) if is_params(x) else x, state, is_leaf=is_params)


@jax.jit
def unpack_state(state: TrainState) -> TrainState:
    """The state that was packed."""
    is_packed = lambda x: isinstance(x, Packed)  # noqa: E731
    return jax.tree.map(lambda x: unpack(x) if is_packed(x) else x, state, is_leaf=is_packed)


def get_step_fn(
    config: ConfigDict,
    sde: SDE,
    model: mutils.Model,
    optimizer: optax.GradientTransformation,
    num_levels: int,
) -> Callable[[TrainState, Array, Array], tuple[TrainState, dict[str, Array]]]:
    """Training steps, as many as there are batches, to be pmapped with axis name "batch".

    Returns:
      step_fn(state, images, index) → (state, metrics): the state is packed (`pack_state`),
      `images` (steps, n, H, W, C) uint8 is this device's share of the global batches, `index` (n,)
      the places of its images in each. Metrics are of each step, (steps,): the loss and the
      gradient's norm are of the global batch, `tau` is the same on all devices. If one of the
      first two is not finite, `skipped` is 1 and all but the state's step stays.
    """
    batch_loss_fn = get_batch_loss_fn(config, sde, model, num_levels, train=True)
    num_micro = config.optim.num_micro_batch

    def loss_and_grads(
        packed: Packed, key: Array, images: Array, index: Array
    ) -> tuple[Array, Array, Packed]:
        params = unpack(packed)

        def mean_loss(params: Any, images: Array, index: Array) -> tuple[Array, Array]:
            losses, tau = batch_loss_fn(params, key, images, index)
            return jnp.mean(losses), tau

        grad_fn = jax.value_and_grad(mean_loss, has_aux=True)

        def micro_step(total: Any, batch: tuple[Array, Array]) -> tuple[Any, Array]:
            (loss, tau), grads = grad_fn(params, *batch)
            return jax.tree.map(jnp.add, total, (loss, pack(grads))), tau

        if num_micro == 1:
            (loss, tau), grads = grad_fn(params, images, index)
            return loss, tau, pack(grads)
        batches = jax.tree.map(lambda x: x.reshape(num_micro, -1, *x.shape[1:]), (images, index))
        zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, packed))
        # Unrolled on a CPU, where XLA's gradients of convolutions crawl inside a loop.
        unroll = num_micro if jax.default_backend() == "cpu" else 1
        total, taus = jax.lax.scan(micro_step, zero, batches, unroll=unroll)
        loss, grads = jax.tree.map(lambda x: x / num_micro, total)
        return loss, taus[0], grads

    def one_step(
        state: TrainState, images: Array, index: Array
    ) -> tuple[TrainState, dict[str, Array]]:
        key = step_key(config.seed, state.step)
        loss, tau, grads = loss_and_grads(state.params, key, images, index)
        loss, grads = jax.lax.pmean((loss, grads), "batch")
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        decay = ema_decay(config.model.ema_rate, state.step + 1)
        ema_params = jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), state.ema_params, params)
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        params, ema_params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (params, ema_params, opt_state),
            (state.params, state.ema_params, state.opt_state),
        )
        metrics = {"loss": loss, "grad_norm": grad_norm, "tau": tau, "skipped": 1 - finite}
        return TrainState(state.step + 1, params, ema_params, opt_state), metrics

    def step_fn(
        state: TrainState, images: Array, index: Array
    ) -> tuple[TrainState, dict[str, Array]]:
        if len(images) > 1:
            return jax.lax.scan(lambda state, batch: one_step(state, batch, index), state, images)
        state, metrics = one_step(state, images[0], index)  # convolutions crawl in a CPU's loops
        return state, jax.tree.map(lambda x: x[None], metrics)

    return step_fn
