"""The training step: its state, optimisers, packed parameters, micro-batches and EMA."""

import collections
import dataclasses
import itertools
import logging
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax import Array
from jax.typing import ArrayLike

from configs.parts import Loop
from data.batches import Dataset, in_memory, train_batches
from losses import Objective, ScoreFn, drop_labels, step_key

log = logging.getLogger("soft_truncation")

AXIS = "batch"  # the name of the mapped axis of devices


@struct.dataclass
class TrainState:
    """The state of training, which is also the contents of a checkpoint."""

    step: Array
    params: Any
    ema_params: Any
    opt_state: Any


# (packed state, images (steps, n, H, W, C), index (n,), labels (steps, n) if there are any)
# → (state, metrics (steps,))
StepFn = Callable[..., tuple[TrainState, dict[str, Array]]]
# (packed state, number of steps) → (state, metrics (steps,))
TrainCall = Callable[[TrainState, int], tuple[TrainState, dict[str, Array]]]


def _trainable_mask(params: Any) -> Any:
    """Whether each parameter is trained; the Fourier embedding's frequencies are not."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "GaussianFourierProjection" not in str(path[0]), params
    )


def decay(weight_decay: float) -> optax.GradientTransformation:
    """L2 decay of the trained parameters, also if they are `Packed`; it has no state."""

    def add(updates: Any, params: Any) -> Any:
        if isinstance(params, Packed):
            trained = updates.trained + weight_decay * params.trained
            return dataclasses.replace(updates, trained=trained)
        mask = _trainable_mask(params)
        return jax.tree.map(lambda g, p, m: g + weight_decay * m * p, updates, params, mask)

    return optax.stateless(add) if weight_decay else optax.identity()


def clip(grad_clip: float) -> optax.GradientTransformation:
    """Clipping by the global norm; a negative `grad_clip` turns it off."""
    return optax.clip_by_global_norm(grad_clip) if grad_clip >= 0 else optax.identity()


def adam(
    learning_rate: optax.Schedule, grad_clip: float, weight_decay: float, beta1: float, eps: float
) -> optax.GradientTransformation:
    """Adam with clipping and L2 decay, as in the official release.

    The structure of its state does not depend on the settings, so a run can change them.
    """
    return optax.chain(
        clip(grad_clip),
        decay(weight_decay),
        optax.scale_by_adam(b1=beta1, b2=0.999, eps=eps),
        optax.scale_by_learning_rate(learning_rate),
    )


def adamw(
    learning_rate: optax.Schedule, grad_clip: float, weight_decay: float, beta1: float, eps: float
) -> optax.GradientTransformation:
    """Adam with clipping and decoupled decay (arXiv 1711.05101): its strength is lr · decay."""
    return optax.chain(
        clip(grad_clip),
        optax.scale_by_adam(b1=beta1, b2=0.999, eps=eps),
        decay(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


# The optimisers that `optim.optimizer` can name: functions whose parameters are named after fields
# of a config (configs.fields.call), or `learning_rate`, a schedule.
OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "Adam": adam,
    "AdamW": adamw,
}


def constant(lr: float, warmup: int) -> optax.Schedule:
    """A linear warm-up from 0, then `lr`."""
    return optax.linear_schedule(0.0, lr, warmup) if warmup else optax.constant_schedule(lr)


def cosine(lr: float, warmup: int, n_iters: int) -> optax.Schedule:
    """A linear warm-up from 0, then half a cosine wave from `lr` down to 0 at `n_iters`."""
    return optax.warmup_cosine_decay_schedule(0.0, lr, warmup, n_iters)


def inverse_sqrt(lr: float, warmup: int, decay_start: int) -> optax.Schedule:
    """EDM2's schedule (arXiv 2312.02696).

    A linear warm-up from 0, then `lr`, and from `decay_start` on lr/√(step/decay_start).
    """
    before = constant(lr, warmup)

    def learning_rate(step: ArrayLike) -> Array:
        return before(step) * jax.lax.rsqrt(jnp.maximum(jnp.asarray(step) / decay_start, 1.0))

    return learning_rate


# The learning rates that `optim.schedule` can name: functions whose parameters are named after
# fields of a config, to a function step → learning rate.
SCHEDULES: dict[str, Callable[..., optax.Schedule]] = {
    "constant": constant,
    "cosine": cosine,
    "inverse_sqrt": inverse_sqrt,
}


def ema_decay(rate: float, num_updates: ArrayLike) -> Array:
    """min(rate, (1 + n)/(10 + n)) for the n-th update, counted from 1, as in the release."""
    n = jnp.asarray(num_updates, jnp.float32)
    return jnp.minimum(rate, (1 + n) / (10 + n))


@struct.dataclass
class Packed:
    """A tree of parameters as two vectors, which a few kernels can update instead of thousands.

    Attributes:
      trained, fixed: the concatenated leaves that are trained, and those that are not
        (`_trainable_mask`).
      layout: (structure of the tree, each leaf's shape, whether each leaf is trained).
    """

    trained: Array
    fixed: Array
    layout: Any = struct.field(pytree_node=False)


def pack(params: Any) -> Packed:
    """Pack a tree of parameters, or another tree of the same structure."""
    leaves, structure = jax.tree.flatten(params)
    kinds = jax.tree.leaves(_trainable_mask(params))
    parts: list[list[Array]] = [[], []]
    for leaf, kind in zip(leaves, kinds, strict=True):
        parts[kind].append(jnp.ravel(leaf))
    fixed, trained = (jnp.concatenate(part) if part else jnp.zeros(0) for part in parts)
    return Packed(trained, fixed, (structure, tuple(map(jnp.shape, leaves)), tuple(kinds)))


def unpack(packed: Packed) -> Any:
    """Undo `pack`."""
    structure, shapes, kinds = packed.layout
    leaves, place = [], [0, 0]
    for shape, kind in zip(shapes, kinds, strict=True):
        start, stop = place[kind], place[kind] + math.prod(shape)
        leaves.append((packed.trained if kind else packed.fixed)[start:stop].reshape(shape))
        place[kind] = stop
    return jax.tree.unflatten(structure, leaves)


@jax.jit
def pack_state(state: TrainState) -> TrainState:
    """Pack every tree in the state that has the structure of the parameters, for `get_step_fn`."""
    structure: Any = jax.tree.structure(state.params)

    def is_params(x: Any) -> Any:
        return structure == jax.tree.structure(x)

    return jax.tree.map(lambda x: pack(x) if is_params(x) else x, state, is_leaf=is_params)


@jax.jit
def unpack_state(state: TrainState) -> TrainState:
    """Undo `pack_state`."""

    def is_packed(x: Any) -> Any:
        return isinstance(x, Packed)

    return jax.tree.map(lambda x: unpack(x) if is_packed(x) else x, state, is_leaf=is_packed)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a training step does.

    Attributes:
      objective: the loss.
      make_score_fn: (parameters, labels if there are any) → (x, t, dropout keys) → score.
      optimizer: made by one of `OPTIMIZERS`.
      seed: the run's seed.
      ema_rate: the decay rate of the parameters' moving average.
      num_micro_batch: number of sequential parts of a device's batch, to save memory; their
        gradients are averaged.
      num_classes: the number of labels of the network; 0: it is told no labels.
      label_dropout: the share of images whose label the network is not told.
    """

    objective: Objective
    make_score_fn: Callable[..., ScoreFn]
    optimizer: optax.GradientTransformation
    seed: int
    ema_rate: float
    num_micro_batch: int = 1
    num_classes: int = 0
    label_dropout: float = 0.0


def mean_loss(
    params: Any, recipe: Recipe, key: Array, images: Array, index: Array, labels: Array | None
) -> tuple[Array, Array]:
    """The mean loss of images, and τ, for the key of a step; the rest as in `get_step_fn`."""
    if labels is None:
        score_fn = recipe.make_score_fn(params)
    else:
        told = drop_labels(key, index, labels, recipe.label_dropout, recipe.num_classes)
        score_fn = recipe.make_score_fn(params, told)
    losses, tau = recipe.objective(score_fn, key, images, index, train=True)
    return jnp.mean(losses), tau


def loss_and_gradient(
    packed: Packed, recipe: Recipe, key: Array, *batch: Array | None
) -> tuple[Array, Array, Packed]:
    """The mean loss of a device's images, τ, and the gradient; arguments as in `mean_loss`."""
    grad_fn, params = jax.value_and_grad(mean_loss, has_aux=True), unpack(packed)
    if recipe.num_micro_batch == 1:
        (loss, tau), grads = grad_fn(params, recipe, key, *batch)
        return loss, tau, pack(grads)

    def accumulate(total: Any, part: tuple[Array, ...]) -> tuple[Any, Array]:
        (loss, tau), grads = grad_fn(params, recipe, key, *part)
        return jax.tree.map(jnp.add, total, (loss, pack(grads))), tau

    num_parts = recipe.num_micro_batch
    parts = jax.tree.map(lambda x: x.reshape(num_parts, -1, *x.shape[1:]), batch)
    zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, packed))
    # XLA's CPU backend runs convolution gradients 6 to 32 times slower inside a loop.
    unroll = num_parts if jax.default_backend() == "cpu" else 1
    total, taus = jax.lax.scan(accumulate, zero, parts, unroll=unroll)
    loss, grads = jax.tree.map(lambda x: x / num_parts, total)
    return loss, taus[0], grads


def move_average(ema_params: Any, params: Any, decay: ArrayLike) -> Any:
    """The moving average of parameters after one more update."""
    return jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), ema_params, params)


def update(
    state: TrainState, recipe: Recipe, loss: Array, grads: Packed
) -> tuple[TrainState, dict[str, Array]]:
    """Update the state by the global batch's loss and gradient; returns it and the metrics."""
    updates, opt_state = recipe.optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    params = params.replace(fixed=state.params.fixed)  # whatever the optimiser does with them
    ema_params = move_average(state.ema_params, params, ema_decay(recipe.ema_rate, state.step + 1))
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    params, ema_params, opt_state = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old),
        (params, ema_params, opt_state),
        (state.params, state.ema_params, state.opt_state),
    )
    metrics = {"loss": loss, "grad_norm": grad_norm, "skipped": 1 - finite}
    return TrainState(state.step + 1, params, ema_params, opt_state), metrics


def one_step(
    state: TrainState, recipe: Recipe, images: Array, index: Array, labels: Array | None
) -> tuple[TrainState, dict[str, Array]]:
    """One training step; see `get_step_fn`."""
    key = step_key(recipe.seed, state.step)
    loss, tau, grads = loss_and_gradient(state.params, recipe, key, images, index, labels)
    loss, grads = jax.lax.pmean((loss, grads), AXIS)
    state, metrics = update(state, recipe, loss, grads)
    return state, {**metrics, "tau": tau}


def get_step_fn(recipe: Recipe) -> StepFn:
    """A function for one or more training steps, to be called in a pmap with axis name `AXIS`.

    Returns:
      step_fn(state, images, index, labels) → (state, metrics). The state is packed
      (`pack_state`), `images` (steps, n, H, W, C) uint8 is this device's share of each step's
      global batch, `index` (n,) the indices of its images in the global batch, and `labels`
      (steps, n) their labels, which are left out if `num_classes` is 0. Metrics are `loss` and
      `grad_norm` of the global batch, `tau` and `skipped`, (steps,) each. If the loss or the
      norm of the gradient is not finite, `skipped` is 1 and only the state's `step` changes.
    """

    def step_fn(
        state: TrainState, images: Array, index: Array, labels: Array | None = None
    ) -> tuple[TrainState, dict[str, Array]]:
        if len(images) > 1:

            def next_step(state: TrainState, batch: Any) -> Any:
                return one_step(state, recipe, batch[0], index, batch[1])

            return jax.lax.scan(next_step, state, (images, labels))
        first = None if labels is None else labels[0]
        state, metrics = one_step(state, recipe, images[0], index, first)  # a loop is slow on a CPU
        return state, jax.tree.map(lambda x: x[None], metrics)

    return step_fn


def times_of_step(
    objective: Objective, seed: int, step: int, images: ArrayLike
) -> tuple[Array, Array]:
    """The truncation and the times (N,) of step number `step`, counted from 0.

    `images` are those of the step, or others of the same number and shape.
    """

    def call(images: Array) -> tuple[Array, Array]:
        seen = []

        def score_fn(x: Array, t: Array, dropout_keys: Array | None) -> Array:
            seen.append(t)
            return x

        index = jnp.arange(len(images))
        _, tau = objective(score_fn, step_key(seed, step), images, index, train=False)
        return tau, seen[0]

    tau, t = jax.vmap(call, axis_name=AXIS)(jnp.asarray(images)[None])
    return tau[0], t[0]


def _on_accelerator() -> bool:
    return jax.default_backend() != "cpu"


def steps_a_call(loop: Loop) -> int:
    """The number of steps in one call, a divisor of `n_jitted_steps` and of all intervals."""
    if not _on_accelerator():  # convolution gradients are slow in loops there
        return 1
    regular = (loop.snapshot_freq, loop.snapshot_freq_for_preemption)
    return math.gcd(loop.n_jitted_steps, loop.log_freq, loop.eval_freq, *regular)


# Data sets of at most this many bytes are kept in an accelerator's memory.
_RESIDENT = 2**30


# Calls that the host is ahead of the device.
_MOST_IN_FLIGHT = 2


def make_train_call(
    step_fn: StepFn,
    train: Dataset,
    batch_size: int,
    seed: int,
    first_step: int,
    labelled: bool = False,
) -> TrainCall:
    """A function (packed state, n) → (state n steps later, their metrics (n,)), on all devices.

    Data sets of up to 1 GiB are kept in an accelerator's memory; a step then receives only the
    indices of its images.

    Args:
      step_fn: from `get_step_fn`.
      train: the training images.
      batch_size: the size of the global batch.
      seed: determines the order of the images.
      first_step: the step of the first call; later calls continue from there.
      labelled: whether the step takes labels.
    """
    num_local, whole = jax.local_device_count(), None
    in_flight: collections.deque[Array] = collections.deque()
    resident: tuple[Any, ...] = ()
    if _on_accelerator():
        whole = in_memory(train, _RESIDENT)
    batches = train_batches(
        train,
        batch_size,
        seed,
        first_step,
        jax.process_index(),
        jax.process_count(),
        indices_only=whole is not None,
    )
    if whole is None:
        parallel = jax.pmap(step_fn, axis_name=AXIS, donate_argnums=0)
    else:

        def step_of_resident(state: Any, whole: Any, chosen: Array, index: Array) -> Any:
            images, *labels = (part[chosen] for part in whole)
            return step_fn(state, images, index, *labels)

        parallel = jax.pmap(step_of_resident, axis_name=AXIS, donate_argnums=0)
        parts = (whole["image"], whole["label"].astype(np.int32))
        resident = (replicate(parts if labelled else parts[:1], num_local),)
        log.info("the training images are in the device's memory")

    def shard(rows: list[np.ndarray]) -> np.ndarray:
        """Reshape a list of batches, one for each step, to (devices, steps, n, …)."""
        return np.stack([row.reshape(num_local, -1, *row.shape[1:]) for row in rows], axis=1)

    def train_call(packed: TrainState, count: int) -> tuple[TrainState, dict[str, Array]]:
        given = list(itertools.islice(batches, count))
        index = shard([given[0]["index"]])[:, 0]
        labels = [shard([b["label"] for b in given])] if labelled and whole is None else []
        images = shard([b["image"] for b in given])
        packed, values = parallel(packed, *resident, images, index, *labels)
        in_flight.append(values["loss"])
        if len(in_flight) > _MOST_IN_FLIGHT:  # each waits with its images in memory
            jax.block_until_ready(in_flight.popleft())
        return packed, first_copy(values)

    return train_call


def replicate(tree: Any, num_local: int) -> Any:
    """Copy a tree to each of this process's devices, along a new first axis of its arrays."""
    # By a pmap with the step's axis name; with another sharding the step would compile twice.
    copy = jax.pmap(lambda _, tree: tree, axis_name=AXIS, in_axes=(0, None))
    return copy(np.arange(num_local), tree)


def first_copy(tree: Any) -> Any:
    """The first device's copy of a replicated tree."""
    return jax.tree.map(lambda x: x.addressable_data(0).reshape(x.shape[1:]), tree)


@jax.jit
def _add_steps(sums: dict[str, Array], values: dict[str, Array]) -> dict[str, Array]:
    skipped = values["skipped"]
    # The number of skipped steps at the end; if all were skipped, the earlier streak continues.
    row = jnp.sum(jnp.cumprod(skipped[::-1]))
    return {
        "loss": sums["loss"] + jnp.sum(jnp.where(skipped, 0, values["loss"])),
        "steps": sums["steps"] + jnp.sum(1 - skipped),
        "skipped": sums["skipped"] + jnp.sum(skipped),
        "streak": row + jnp.where(row == len(skipped), sums["streak"], 0),
    }


class LossSums:
    """Sums over steps, kept on the device so that no step waits for the host."""

    def __init__(self) -> None:
        """All sums are 0."""
        self.reset(0)

    def reset(self, streak: int) -> None:
        """Begin new sums, after `streak` skipped steps in a row."""
        zero = np.zeros((), np.int32)
        self._sums: dict[str, Any] = {
            **{"loss": np.zeros((), np.float32), "steps": zero, "skipped": zero},
            "streak": np.array(streak, np.int32),
        }

    def add(self, values: dict[str, Array]) -> None:
        """Add the metrics of n steps, (n,) each."""
        self._sums = _add_steps(self._sums, {name: values[name] for name in ("loss", "skipped")})

    def read(self) -> dict[str, float]:
        """The sum of the `loss`, the numbers of `steps` and `skipped` steps, and the `streak`.

        `loss` and `steps` do not count skipped steps. `streak` is the number of steps in a row, up
        to the last one, that were skipped.
        """
        return {name: np.asarray(value).item() for name, value in self._sums.items()}
