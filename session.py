"""Building the parts of a run from its config: SDE, network, optimiser, training step, sampler."""

import dataclasses
import functools
import itertools
import logging
import os
import pathlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from ml_collections import ConfigDict

import datasets
import losses
import sampling
import sde_lib
import seeds
from configs import fields
from configs.default import get_default_config
from configs.shapes import image_shape
from configs.validate import check_array_fields, validate
from errors import UserError
from models import utils as mutils
from models.networks import NETWORKS
from models.score import ScoreModel
from runtime import memory
from runtime.devices import batch_and_replicated_shardings, to_devices, to_host
from runtime.workdir import recorded_config
from train_step import (
    StepFn,
    TrainCall,
    TrainState,
    get_optimizer,
    get_step_fn,
    make_train_call,
    pack_state,
)

log = logging.getLogger("soft_truncation")


# The values that these fields can name; a config file can register more (docs/extending.md).
REGISTRIES: dict[str, dict[str, Any]] = {
    "training.sde": sde_lib.SDES,
    "training.prior": losses.PRIORS,
    "training.weighting": losses.WEIGHTINGS,
    "model.name": NETWORKS,
    "sampling.method": sampling.SAMPLERS,
    "sampling.predictor": sampling.PREDICTORS,
    "sampling.corrector": sampling.CORRECTORS,
}


@dataclasses.dataclass(frozen=True)
class Setup:
    """The parts of a run that a config names, without the data; nothing is compiled yet."""

    sde: sde_lib.SDE
    model: mutils.Model
    optimizer: optax.GradientTransformation
    objective: losses.Objective
    preprocessing: datasets.Preprocessing
    units: datasets.Units
    make_score_fn: sampling.MakeScoreFn  # (params, labels, guidance) → (x, t) → score
    make_train_score_fn: Callable[..., losses.ScoreFn]  # … → (x, t, dropout keys) → score
    state_shape: TrainState  # of jax.ShapeDtypeStruct

    @property
    def num_levels(self) -> int:
        """The number of values of a pixel of the data; 0: floats."""
        return self.preprocessing.num_levels


def init_state(
    config: ConfigDict, model: mutils.Model, optimizer: optax.GradientTransformation
) -> TrainState:
    """The state before the first step, a function of the config's seed."""
    params = mutils.init_params(model, image_shape(config), jax.random.key(config.seed))
    return _first_state(optimizer, params)


def _first_state(optimizer: optax.GradientTransformation, params: Any) -> TrainState:
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema_params=jax.tree.map(jnp.copy, params),
        opt_state=optimizer.init(params),
    )


# The fields of an array data set that are read from its file.
_OF_ARRAYS = ("image_size", "image_width", "num_channels", "num_levels", "scale", "dequantization")


def with_data_facts(
    config: ConfigDict,
    workdir: str | os.PathLike[str],
    override: bool = False,
    init_from: str = "",
) -> ConfigDict:
    """The config with what the data set says in place of what the recipe leaves to it.

    That is the number of labels for `model.num_classes` = -1, and the shape and units of an array
    data set. A run keeps what was found at its start, and the names of its labels, unless it goes
    on with other data by `override`.

    Args:
      config: the config.
      workdir: the run's folder, or that of a new one.
      override: whether the run may go on with another config.
      init_from: the run or model that a new run starts from; the config may be its own.

    Raises:
      UserError: the data set has no labels, or can't be read.
    """
    is_array = config.data.dataset == "array"
    if not (is_array or config.model.num_classes):
        return config
    config, run = config.copy_and_resolve_references(), recorded_config(workdir)
    before = run or (recorded_config(init_from) if init_from else None)
    same = before and all(before.data[name] == config.data[name] for name in ("dataset", "path"))
    if is_array and before and not same and (override or not run):
        # Units that the recipe has from there are of other data.
        for name in ("scale", "num_levels"):
            if config.data[name] == before.data[name]:
                config.data[name] = get_default_config().data[name]
    if run and (run.data.dataset != config.data.dataset or (override and not same)):
        run = None
    if run and not config.data.classes:
        config.data.classes = run.data.classes
    if is_array:
        check_array_fields(config)
        facts = dict(run.data) if run else datasets.array_facts(config)
        own = {name: config.data[name] for name in ("scale", "num_levels") if config.data[name]}
        config.data.update({name: facts[name] for name in _OF_ARRAYS if name in facts} | own)
    if config.model.num_classes != -1:
        return config
    if run:
        config.model.num_classes = run.model.num_classes
        return config
    train = datasets.get_dataset(config, "train")
    if not train.num_classes:
        raise UserError(f"model.num_classes is -1, and {train.name} has no labels")
    config.model.num_classes = train.num_classes
    return config


def check_labels(config: ConfigDict, images: datasets.Dataset) -> None:
    """Raise a UserError if the network is told labels that the images do not have."""
    told = config.model.num_classes
    if not told:
        return
    if told != images.num_classes:
        has = f"{images.num_classes} labels" if images.num_classes else "no labels"
        raise UserError(
            f"model.num_classes is {told}, and {images.name} has {has}; a new run takes the data "
            "set's with --config.model.num_classes=-1"
        )
    for number, (known, name) in enumerate(zip(config.data.classes, images.classes, strict=False)):
        if known != name:
            raise UserError(
                f"label {number} is {name!r} in {images.name}, and {known!r} in the run's training "
                "data; bring images of the same classes, or start a new run with --init_from"
            )


def with_classes(config: ConfigDict, train: datasets.Dataset, anew: bool = False) -> ConfigDict:
    """The config with the names of the labels that its network is told.

    They are checked as above, but not the names if `anew`.
    """
    config = config.copy_and_resolve_references()
    config.data.classes = () if anew else config.data.classes
    check_labels(config, train)
    if config.model.num_classes:
        config.data.classes = train.classes
    return config


@dataclasses.dataclass(frozen=True)
class Classes:
    """The classes that a network knows."""

    names: tuple[str, ...]
    count: int
    dataset: str  # where the names come from


def classes_of(config: ConfigDict) -> Classes:
    """The classes that a config's network knows."""
    names = tuple(config.data.classes)
    return Classes(names, config.model.num_classes, config.data.dataset)


def _check_sampling_time(config: ConfigDict, sde: sde_lib.SDE) -> None:
    """Raise a UserError if samples would stop so early that they are means of many images."""
    end, least = config.sampling.truncation_time, config.training.truncation_time
    noise = float(sde.std(jnp.array(end)) / sde.mean_coeff(jnp.array(end)))
    if noise > 0.5 and end > least:
        raise UserError(
            f"config: sampling.truncation_time is {end:g}, where {config.training.sde} has "
            f"σ/α = {noise:.3g}, too much noise for samples to stop at; training has {least:g}"
        )


def set_up(config: ConfigDict, num_devices: int = 1) -> Setup:
    """Check a config and build the parts that it names.

    Args:
      config: the config.
      num_devices: the number of devices that share a training batch.

    Raises:
      UserError: the config is wrong; the message is one line that says why.
    """
    validate(config, num_devices, REGISTRIES)
    sde, model = sde_lib.get_sde(config), mutils.create_model(config)
    score_model = fields.call(ScoreModel, config, "model", "training", sde=sde, network=model)
    _check_sampling_time(config, sde)
    if config.model.num_classes > 0:
        sample_labels(config, 0, 1)
    training = config.training
    if training.truncation != "fixed" and training.prior != "power":
        prior = losses.get_prior(config)
        losses.check_prior(prior, sde, training.truncation_time, training.prior)
    optimizer = get_optimizer(config)
    try:
        params = mutils.params_shape(model, image_shape(config))
        shape = jax.eval_shape(functools.partial(_first_state, optimizer), params)
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"config.model: no network can be built: {error}") from error
    return Setup(
        sde=sde,
        model=model,
        optimizer=optimizer,
        objective=losses.get_objective(config, sde),
        preprocessing=datasets.get_preprocessing(config),
        units=datasets.get_units(config),
        make_score_fn=score_model,
        make_train_score_fn=score_model.for_training,
        state_shape=shape,
    )


def _step_fn(config: ConfigDict, setup: Setup) -> StepFn:
    return get_step_fn(
        setup.objective,
        setup.make_train_score_fn,
        setup.optimizer,
        seed=config.seed,
        ema_rate=config.model.ema_rate,
        num_micro_batch=config.optim.num_micro_batch,
        num_classes=config.model.num_classes,
        label_dropout=config.training.label_dropout,
    )


def get_train_call(
    config: ConfigDict, setup: Setup, train: datasets.Dataset, first_step: int
) -> TrainCall:
    """The training function (`make_train_call`) of a config, whose first call is `first_step`."""
    step_fn, labelled = _step_fn(config, setup), config.model.num_classes > 0
    batch_size = config.training.batch_size
    return make_train_call(step_fn, train, batch_size, config.seed, first_step, labelled)


def train_program(config: ConfigDict) -> tuple[StepFn, tuple[Any, ...]]:
    """One training step of one device, and the shapes of its arguments."""
    setup = set_up(config)
    n = config.training.batch_size // jax.device_count()
    images = jax.ShapeDtypeStruct((1, n, *image_shape(config)), setup.preprocessing.dtype)
    index = jax.ShapeDtypeStruct((n,), jnp.int32)
    state = jax.eval_shape(pack_state, setup.state_shape)
    labels = [jax.ShapeDtypeStruct((1, n), jnp.int32)] if config.model.num_classes else []
    return _step_fn(config, setup), (state, images, index, *labels)


def sampling_method(config: ConfigDict) -> sampling.SamplerFn:
    """The sampling method of a config, with its predictor and corrector."""
    chosen, sections = config.sampling, ("sampling", "model")

    def step_fn(make: Callable[..., sampling.StepFn] | None) -> sampling.StepFn | None:
        return None if make is None else fields.call(make, config, *sections)

    return fields.call(
        sampling.SAMPLERS[chosen.method],
        config,
        *sections,
        predictor=step_fn(sampling.PREDICTORS[chosen.predictor]),
        corrector=step_fn(sampling.CORRECTORS[chosen.corrector]),
    )


def get_sampling_fn(
    config: ConfigDict, sde: sde_lib.SDE, make_score_fn: sampling.MakeScoreFn, count: int
) -> Callable[..., tuple[Array, Array]]:
    """The compiled function (params, key, labels=None) → (x, nfe) of `count` samples."""
    shape, guidance = (count, *image_shape(config)), config.sampling.guidance
    return sampling.get_sampling_fn(sampling_method(config), sde, make_score_fn, shape, guidance)


def sample_program(config: ConfigDict, batch_size: int) -> tuple[Any, tuple[Any, ...]]:
    """A device's share of a batch of samples as a function, and the shapes of its arguments."""
    setup, n = set_up(config), -(-batch_size // jax.device_count())
    sample_fn = get_sampling_fn(config, setup.sde, setup.make_score_fn, n)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), n))
    labels = [jax.ShapeDtypeStruct((n,), jnp.int32)] if config.model.num_classes else []
    return sample_fn, (setup.state_shape.ema_params, keys, *labels)


# XLA for GPUs gives the evaluations in a sampler more memory than one of them needs: up to 2.2
# times for the PC sampler's two, 1.3 for an ODE's (`python -m benchmarks.memory --target h100`).
_OF_PC, _OF_ODE = 2.2, 1.3


def _changed(config: ConfigDict, changes: Mapping[str, Any]) -> ConfigDict:
    changed = config.copy_and_resolve_references()
    changed.update_from_flattened_dict(dict(changes))
    return changed


def advise_on_training(config: ConfigDict) -> None:
    """Log how much memory training needs, and what to set if it is more than there is."""

    def needed(changes: Mapping[str, Any]) -> int:
        step_fn, shapes = train_program(_changed(config, changes))
        return memory.needed_bytes(step_fn, *shapes, donate=1, devices=jax.device_count())

    remedies: list[dict[str, Any]] = []
    if config.model.dtype != "bfloat16":
        remedies.append({"model.dtype": "bfloat16"})
    can_remat = NETWORKS[config.model.name].takes("remat")
    if can_remat and not config.model.remat:
        remedies.append({"model.dtype": "bfloat16", "model.remat": True})
    images = config.training.batch_size // jax.device_count()
    pair = 2 if config.training.mixed else 1
    for parts in () if config.training.balanced else (4, 16):  # which needs the whole batch
        if images % (parts * pair) == 0 and parts > config.optim.num_micro_batch:
            kept = {"model.remat": True} if can_remat else {}
            remedies.append({"model.dtype": "bfloat16", **kept, "optim.num_micro_batch": parts})
    memory.advise("training", needed, remedies)


def advise_on_sampling(config: ConfigDict, field: str, batch_size: int) -> None:
    """Log how much memory sampling needs; `field` is the config's field of the batch size."""

    def needed(changes: Mapping[str, Any]) -> int:
        program, shapes = sample_program(config, changes.get(field, batch_size))
        factor = _OF_PC if config.sampling.method == "pc" else _OF_ODE
        return round(factor * memory.needed_bytes(program, *shapes))

    memory.advise("sampling", needed, smaller_batches(field, batch_size))


def smaller_batches(field: str, batch_size: int) -> list[dict[str, Any]]:
    """Remedies that halve a batch size again and again, down to one image a device."""
    sizes = itertools.takewhile(
        lambda size: size >= jax.device_count(), (batch_size >> n for n in itertools.count(1))
    )
    return [{field: size} for size in sizes]


def objective_in_words(config: ConfigDict) -> str:
    """What a config trains by: SDE, weighting, times, truncation and prior."""
    training = config.training
    flag = "likelihood (g²)" if training.likelihood_weighting else "variance (σ²)"
    drawn = "importance-sampled" if training.importance_sampling else "uniform"
    prior = f", k = {training.k:g}" if training.prior == "power" else f", {training.prior} prior"
    return (
        f"{training.sde}, {training.weighting or flag} weighting, {drawn} time, "
        f"{training.truncation.replace('_', ' ')} truncation"
        f"{'' if training.truncation == 'fixed' else prior}, ε = {training.truncation_time:g}"
    )


class Samples(NamedTuple):
    """A batch of samples."""

    levels: np.ndarray  # (n, H, W, C), of `Preprocessing.dtype`
    nfe: int  # score evaluations per sample
    num_broken: int  # number of samples that are not finite


def sample_labels(config: ConfigDict, start: int, count: int) -> np.ndarray:
    """The labels of the samples with the indices start … start + count - 1, int32.

    They are those of `sampling.labels`, in turn; `model.num_classes` stands for no label.

    Raises:
      UserError: `sampling.labels` can't be read, or a label does not exist.
    """
    text, known = config.sampling.labels.strip(), config.model.num_classes
    if text == "all":
        chosen = np.arange(known)
    elif text == "none":
        chosen = np.array([known])
    else:
        chosen = _read_labels(text)
        wrong = [int(label) for label in chosen if not 0 <= label < known]
        if wrong:
            raise UserError(
                f"sampling.labels has {wrong[0]}; the labels of this model are 0 to {known - 1}"
            )
    return chosen[np.arange(start, start + count) % len(chosen)].astype(np.int32)


def _read_labels(text: str) -> np.ndarray:
    try:
        numbers = pathlib.Path(text).read_text() if pathlib.Path(text).is_file() else text
        chosen = np.array([int(number) for number in numbers.replace(",", " ").split()])
    except (OSError, ValueError):
        chosen = np.zeros(0, int)
    if not len(chosen):
        raise UserError(
            f"sampling.labels is {text!r}; it must be a label, several as 0,1,2, all, none, or a "
            "text file of labels"
        )
    return chosen


def labels_on_devices(labels: np.ndarray, num_classes: int, whole: bool = False) -> Array | None:
    """The labels of a batch of images, of which each device has its share.

    Args:
      labels: of the images, (N,); the devices must divide N.
      num_classes: of the network; 0: the result is None.
      whole: each device has the whole batch instead.
    """
    if not num_classes:
        return None
    rows, everywhere = batch_and_replicated_shardings()
    return to_devices(np.asarray(labels, np.int32), everywhere if whole else rows)


def get_sampler(config: ConfigDict, setup: Setup, batch_size: int) -> Any:
    """A function (params, key, start=0) → `batch_size` Samples, computed on all devices.

    `start` is the index of the first sample. A sample's noise and label depend on its index alone.
    """
    full = -(-batch_size // jax.device_count()) * jax.device_count()
    rows, everywhere = batch_and_replicated_shardings()
    sample_fn = get_sampling_fn(config, setup.sde, setup.make_score_fn, full)

    def sample_levels(params: Any, keys: Array, labels: Array | None) -> tuple[Array, Array, Array]:
        x, nfe = sample_fn(params, keys, labels)
        broken = ~jnp.isfinite(x).all(axis=(1, 2, 3))
        return setup.preprocessing.to_levels(x), nfe, broken

    compiled = jax.jit(sample_levels, out_shardings=(rows, everywhere, rows))

    def sample(params: Any, key: Array, start: int = 0) -> Samples:
        params = to_devices(params, everywhere)
        keys = to_devices(sampling.sample_keys(key, start, full), rows)
        labels = None
        if config.model.num_classes:
            chosen = sample_labels(config, start, full)
            labels = labels_on_devices(chosen, config.model.num_classes)
        levels, nfe, broken = compiled(params, keys, labels)
        broken = to_host(broken)[:batch_size].sum()
        if broken:
            log.warning(
                "%d of %d samples are not finite and are shown black: the weights are broken, or "
                "the sampler failed",
                broken,
                batch_size,
            )
        return Samples(to_host(levels)[:batch_size], int(nfe), int(broken))

    return sample


# (name, compute) → the result of compute(), or the stored result of that name
CacheFn = Callable[[str, Callable[[], dict[str, np.ndarray]]], dict[str, np.ndarray]]


def sample_batches(
    sample: Any,
    params: Any,
    seed: int,
    count: int,
    batch_size: int,
    cache: CacheFn | None = None,
    present: Collection[int] = (),
) -> Iterator[tuple[int, Samples]]:
    """Yield (index of the first, samples) of each batch.

    Each sample is a function of the seed and of its index.

    Args:
      sample: from `get_sampler`, for this batch size.
      params: the network's parameters.
      seed: the config's seed.
      count, batch_size: the number of samples, and the number in a batch.
      cache: stores and returns earlier batches; None: batches are not stored.
      present: indices of samples that are not needed; batches of only these are left out.
    """
    key, params = (
        jax.random.key(seed + seeds.SAMPLES),
        to_devices(params, batch_and_replicated_shardings()[1]),
    )
    for start in range(0, count, batch_size):
        if all(i in present for i in range(start, min(start + batch_size, count))):
            continue

        def draw(start: int = start) -> dict[str, np.ndarray]:
            drawn = sample(params, key, start)
            return {name: np.asarray(value) for name, value in drawn._asdict().items()}

        part = cache(f"samples_{start:08}", draw) if cache else draw()
        levels = part["levels"][: count - start]
        yield start, Samples(levels, int(part["nfe"]), int(part["num_broken"]))
