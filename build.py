"""Builds the parts of a run from its config: SDE, network, optimiser, training step, sampler."""

import dataclasses
import functools
import logging
import math
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from ml_collections import ConfigDict

import likelihood
import losses
import sampling
import sde_lib
import train_step
from configs import fields, parts, saved
from configs.data import data_spec
from configs.default import get_default_config
from configs.errors import UserError
from configs.saved import as_recorded
from configs.shapes import image_shape
from configs.validate import check_array_fields, validate
from data import arrays, loading, pixels
from data.batches import Data, Dataset
from data.told_labels import check_labels, sample_labels
from models import networks
from models import utils as mutils
from models.score import ScoreModel, TwoExperts
from readers import published
from runtime import checkpointing
from runtime.devices import batch_and_replicated_shardings, to_devices
from runtime.workdir import recorded_config
from train_step import (
    Recipe,
    StepFn,
    TrainCall,
    TrainState,
    get_step_fn,
    make_train_call,
)

log = logging.getLogger("soft_truncation")


# The values that these fields can name; a config file can register more (docs/extending.md).
REGISTRIES: dict[str, dict[str, Any]] = {
    "model.name": networks.NETWORKS,
    "data.dataset": published.PUBLISHED,
    "training.sde": sde_lib.SDES,
    "training.prior": losses.PRIORS,
    "training.weighting": losses.WEIGHTINGS,
    "training.objective": losses.OBJECTIVES,
    "optim.optimizer": train_step.OPTIMIZERS,
    "optim.schedule": train_step.SCHEDULES,
    "sampling.method": sampling.SAMPLERS,
    "sampling.predictor": sampling.PREDICTORS,
    "sampling.corrector": sampling.CORRECTORS,
}


@dataclasses.dataclass(frozen=True)
class Setup:
    """The parts of a run that a config names, except for the data; nothing is compiled yet."""

    sde: sde_lib.SDE
    model: mutils.Model
    optimizer: optax.GradientTransformation
    objective: losses.Objective
    preprocessing: pixels.Preprocessing
    units: pixels.Units
    make_score_fn: sampling.MakeScoreFn  # (params, labels, guidance) → (x, t) → score
    make_train_score_fn: Callable[..., losses.ScoreFn]  # … → (x, t, dropout keys) → score
    state_shape: TrainState  # of jax.ShapeDtypeStruct
    init_params: Callable[[], Any]  # the first parameters, a function of the seed
    make_step_fn: Callable[[], StepFn]
    sampler: sampling.SamplerFn
    make_sample_fn: Callable[[int], Any]  # number of samples → (params, keys, labels) → (x, nfe)
    read_arrays: Callable[..., tuple[Dataset, list[str] | None]]  # of a user's own file
    load_data: Callable[[], Data]
    make_nll_fn: Callable[[], Callable[..., dict[str, Array]]]
    make_nelbo_fn: Callable[[], Callable[..., dict[str, Array]]]
    seed: int
    dtype: str  # that the network computes in
    network: str  # its name
    shape: tuple[int, int, int]  # of an image of the data
    padded_shape: tuple[int, int, int]  # of an image as the network gets it
    dequantization: str
    centered: bool  # whether the network's images are from -1 to 1
    num_classes: int  # of labels that the network is told; 0: none
    classes: tuple[str, ...]  # their names, as far as they are known
    label_dropout: float
    eps: float  # the smallest time of training
    objective_text: str
    optimizer_text: str
    loop: parts.Loop
    sampling: parts.Sampling
    evaluation: parts.Evaluation
    fields: dict[str, Any]  # the whole config, as config.json has it
    rebuild: Callable[[Mapping[str, Any]], "Setup"]  # with other values of some fields
    expert: str = ""  # the run whose score is used from a time on, RUN@t
    score_params: Callable[[Any], Any] = lambda params: params  # → those of make_score_fn

    @property
    def num_levels(self) -> int:
        """The number of values that a pixel of the data can have; 0: pixels are floats."""
        return self.preprocessing.num_levels

    def init_state(self) -> TrainState:
        """The state before the first step, a function of the seed."""
        return self.first_state(self.init_params())

    def first_state(self, params: Any) -> TrainState:
        """The state before the first step of a training that starts from `params`."""
        return _first_state(self.optimizer, params)


def _first_state(optimizer: optax.GradientTransformation, params: Any) -> TrainState:
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema_params=jax.tree.map(jnp.copy, params),
        opt_state=optimizer.init(params),
    )


def get_prior(config: ConfigDict) -> losses.Prior:
    """The prior on the truncation that a config names."""
    factory, sde = losses.PRIORS[config.training.prior], sde_lib.get_sde(config)
    return fields.call(factory, config, "training", "model", sde=sde)


def get_weighting(config: ConfigDict) -> losses.Weighting:
    """The weighting that a config names, a function (sde, t (N,)) → λ(t) (N,)."""
    training = config.training
    chosen = "likelihood" if training.likelihood_weighting else "variance"
    return losses.WEIGHTINGS[training.weighting or chosen]


def get_objective(
    config: ConfigDict,
    sde: sde_lib.SDE,
    num_levels: int = 0,
    axis_name: str | None = train_step.AXIS,
) -> losses.Objective:
    """The objective that a config names.

    Args:
      config: the config.
      sde: its SDE.
      num_levels: replaces the data set's number of levels, if it isn't 0.
      axis_name: the name of the mapped axis of devices that the objective is called within; None:
        there is no such axis.
    """
    return fields.call(
        losses.OBJECTIVES[config.training.objective],
        config,
        "training",
        "model",
        sde=sde,
        preprocessing=pixels.get_preprocessing(data_spec(config), num_levels),
        prior=None if config.training.truncation == "fixed" else get_prior(config),
        weighting=get_weighting(config),
        axis_name=axis_name,
    )


def get_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """The optimiser that a config names, with its learning rate."""
    schedule = fields.call(train_step.SCHEDULES[config.optim.schedule], config, "optim", "training")
    factory = train_step.OPTIMIZERS[config.optim.optimizer]
    return fields.call(factory, config, "optim", "training", learning_rate=schedule)


# The fields of an array data set that are read from its file.
_OF_ARRAYS = ("image_size", "image_width", "num_channels", "num_levels", "scale", "dequantization")


_FREQUENCIES = ("eval_freq", "snapshot_freq_for_preemption", "snapshot_freq")


def _frequencies(num_images: int, batch_size: int) -> dict[str, int]:
    """Steps of 10, 20 and 50 epochs, in hundreds, and not more than those of a large data set."""
    limits = ((10, 100, 1000), (20, 500, 2000), (50, 1000, 10_000))
    steps = [min(max(round(n * num_images / batch_size, -2), low), most) for n, low, most in limits]
    return dict(zip(_FREQUENCIES, map(int, steps), strict=True))


def _with_frequencies(config: ConfigDict, workdir: str | os.PathLike[str]) -> ConfigDict:
    """The config, with the frequencies that are 0 chosen by the number of training images."""
    if all(config.training[name] for name in _FREQUENCIES):
        return config
    config, run = config.copy_and_resolve_references(), recorded_config(workdir)
    if run:
        chosen = run.training
    else:
        train = loading.load_ahead(data_spec(config)).train
        chosen = _frequencies(len(train), config.training.batch_size)
    for name in _FREQUENCIES:
        config.training[name] = config.training[name] or chosen[name]
    return config


def with_data_facts(
    config: ConfigDict,
    workdir: str | os.PathLike[str],
    override: bool = False,
    init_from: str = "",
) -> ConfigDict:
    """The config, with the fields that the recipe leaves to the data set filled in.

    These are the number of labels, if `model.num_classes` is -1, the shape and units of an array
    data set, and the frequencies of `training` that are 0. A relative path of the data becomes
    absolute. A run that is resumed keeps the values that were found at its start, and the names of
    its labels, unless `override` is set and the data are others.

    Args:
      config: the config.
      workdir: the run's folder, or that of a new one.
      override: whether the run may be resumed with another config.
      init_from: the run or model whose weights a new run starts from; the config may be that of
        this model.

    Raises:
      UserError: the data set has no labels, or can't be read.
    """
    path = pathlib.Path(config.data.path)
    if config.data.path and not path.is_absolute() and path.exists():
        config = config.copy_and_resolve_references()
        config.data.path = str(path.absolute())  # for commands in other folders
    found = _with_units_and_labels(config, workdir, override, init_from)
    return _with_frequencies(found, workdir)


def _with_units_and_labels(
    config: ConfigDict, workdir: str | os.PathLike[str], override: bool, init_from: str
) -> ConfigDict:
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
        facts = dict(run.data) if run else arrays.array_facts(data_spec(config))
        own = {name: config.data[name] for name in ("scale", "num_levels") if config.data[name]}
        config.data.update({name: facts[name] for name in _OF_ARRAYS if name in facts} | own)
    if config.model.num_classes != -1:
        return config
    if run:
        config.model.num_classes = run.model.num_classes
        return config
    train = loading.load_ahead(data_spec(config)).train
    if not train.num_classes:
        raise UserError(f"model.num_classes is -1, and {train.name} has no labels")
    config.model.num_classes = train.num_classes
    return config


def open_run(config: ConfigDict, workdir: str | os.PathLike[str], expert: str = "") -> Setup:
    """The parts of the run in `workdir`, or of a new run there (`with_data_facts`, `set_up`).

    Args:
      config, workdir: the run.
      expert: RUN@t, a run whose newest weights give the score at times from t on; empty: none.

    Raises:
      UserError: the config is wrong, or the two runs do not fit.
    """
    config = with_data_facts(config, workdir)
    if not expert:
        return set_up(config)
    name, _, time = expert.rpartition("@")
    folder = pathlib.Path(name)
    try:
        switch = float(time)
    except ValueError:
        switch = math.nan
    if math.isnan(switch) or not (folder / "config.json").is_file():
        raise UserError(f"--expert is {expert!r}; it must be RUN@t, a run and a time")
    theirs = with_data_facts(saved.get_config(folder), folder)
    other = set_up(theirs)
    setup = set_up(config, above=other.make_score_fn)
    for what in ("sde", "padded_shape", "centered", "num_classes"):
        if getattr(setup, what) != getattr(other, what):
            raise UserError(
                f"--expert: {folder} has another {what}, {getattr(other, what)}, than {workdir}, "
                f"{getattr(setup, what)}"
            )
    state = checkpointing.restore_latest(theirs, folder, other.state_shape, weights_only=True)
    log.info("from t = %g on with step %d of %s", switch, int(state.step), folder)
    if not setup.eps < switch < setup.sde.T:  # all times are on one side
        switch = -math.inf if switch <= setup.eps else math.inf
    both = {"above": state.ema_params, "t": jnp.asarray(switch)}
    return dataclasses.replace(
        setup, expert=expert, score_params=lambda params: {"below": params, **both}
    )


def with_classes(setup: Setup, train: Dataset, anew: bool = False) -> Setup:
    """The parts of a run, with the names of the labels of the training images.

    If the run already has names of labels, they must be the same, unless it starts `anew`.
    """
    check_labels(setup.num_classes, () if anew else setup.classes, train)
    if not setup.num_classes:
        return setup
    data = {**setup.fields["data"], "classes": list(train.classes)}
    return dataclasses.replace(setup, classes=train.classes, fields={**setup.fields, "data": data})


def _check_sampling_time(config: ConfigDict, sde: sde_lib.SDE) -> None:
    """Raise a UserError if samplers would stop at a time with too much noise for samples."""
    end, least = config.sampling.truncation_time, config.training.truncation_time
    noise = float(sde.std(jnp.array(end)) / sde.mean_coeff(jnp.array(end)))
    if noise > 0.5 and end > least:
        raise UserError(
            f"config: sampling.truncation_time is {end:g}, where {config.training.sde} has "
            f"σ/α = {noise:.3g}, too much noise for samples to stop at; training has {least:g}"
        )


def _check(config: ConfigDict, sde: sde_lib.SDE) -> None:
    """Raise a UserError for mistakes that can't be found from single fields."""
    training = config.training
    _check_sampling_time(config, sde)
    if config.model.num_classes > 0:
        sample_labels(config.sampling.labels, config.model.num_classes, 0, 1)
    if training.truncation != "fixed" and training.prior != "power":
        prior = get_prior(config)
        losses.check_prior(prior, sde, training.truncation_time, training.prior)


def _network(
    config: ConfigDict, optimizer: optax.GradientTransformation
) -> tuple[mutils.Model, TrainState]:
    """The network, and the shapes of the state."""
    try:
        model = mutils.create_model(config)
        params = mutils.params_shape(model, image_shape(config))
        return model, jax.eval_shape(functools.partial(_first_state, optimizer), params)
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"config.model: no network can be built: {error}") from error


def _check_own_parts(
    config: ConfigDict, score_model: ScoreModel, objective: losses.Objective, params: Any
) -> None:
    """Trace a network or an objective of the user's own; UserError if it can't be trained."""
    name, chosen = config.model.name, config.training.objective
    if name in networks.BUILT_IN and chosen in losses.BUILT_IN:
        return
    shape, dtype = image_shape(config), pixels.get_preprocessing(data_spec(config)).dtype
    keys, index = jax.random.split(jax.random.key(0), 2), jnp.arange(2)
    labels = jnp.zeros(2, jnp.int32) if config.model.num_classes else None

    def network(params: Any, x: Array) -> Array:
        options: dict[str, Any] = {} if labels is None else {"labels": labels}
        time = score_model.time_cond(jnp.ones(2))
        options |= {"train": True, "dropout_keys": keys}
        return jnp.asarray(score_model.network.apply({"params": params}, x, time, **options))

    def losses_of(params: Any, images: Array) -> Array:
        score_fn = score_model.for_training(params, labels)
        return objective(score_fn, jax.random.key(0), images, index, train=True)[0]

    x = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
    images = jax.ShapeDtypeStruct((1, 2, *shape), dtype)
    try:
        out = jax.eval_shape(network, params, x)
        mapped = jax.vmap(losses_of, (None, 0), axis_name=train_step.AXIS)
        of_images = jax.eval_shape(mapped, params, images)
    except Exception as error:  # it is the user's code
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"model.name {name!r} with training.objective {chosen!r} can't be trained: "
            f"{type(error).__name__}: {reason}"
        ) from error
    if out.shape != x.shape:
        raise UserError(
            f"model.name {name!r}: the network gives {out.shape[1:]} for images of {shape}"
        )
    if of_images.shape != (1, 2):
        raise UserError(
            f"training.objective {chosen!r} must give a loss for each image, (N,), and gives "
            f"{of_images.shape[1:]} for N = 2"
        )


def set_up(
    config: ConfigDict, num_devices: int = 1, above: sampling.MakeScoreFn | None = None
) -> Setup:
    """Check a config and build the parts that it names.

    Args:
      config: the config.
      num_devices: the number of devices that share a training batch.
      above: the score of another run, for the larger times (`TwoExperts`); None: there is none.

    Raises:
      UserError: the config is wrong; the message is one line that says why.
    """
    validate(config, num_devices, REGISTRIES)
    sde, training = sde_lib.get_sde(config), config.training
    _check(config, sde)
    optimizer = get_optimizer(config)
    model, shape = _network(config, optimizer)
    score_model = fields.call(ScoreModel, config, "model", "training", sde=sde, network=model)
    make_score_fn = TwoExperts(score_model, above) if above else score_model
    scored = (config, sde, make_score_fn)
    sampler = sampling_method(config)
    objective = get_objective(config, sde)
    _check_own_parts(config, score_model, objective, shape.params)
    recipe = Recipe(
        objective=objective,
        make_score_fn=score_model.for_training,
        optimizer=optimizer,
        seed=config.seed,
        ema_rate=config.model.ema_rate,
        num_micro_batch=config.optim.num_micro_batch,
        num_classes=config.model.num_classes,
        label_dropout=training.label_dropout,
    )
    data = data_spec(config)
    preprocessing = pixels.get_preprocessing(data)
    levels = preprocessing.num_levels
    return Setup(
        sde=sde,
        model=model,
        optimizer=optimizer,
        objective=objective,
        preprocessing=preprocessing,
        units=pixels.get_units(data),
        make_score_fn=make_score_fn,
        make_train_score_fn=score_model.for_training,
        state_shape=shape,
        init_params=lambda: mutils.init_params(
            model, image_shape(config), jax.random.key(config.seed)
        ),
        make_step_fn=functools.partial(get_step_fn, recipe),
        sampler=sampler,
        make_sample_fn=functools.partial(get_sampling_fn, *scored),
        read_arrays=functools.partial(arrays.array_of_images, data),
        load_data=functools.partial(loading.load, data),
        make_nll_fn=functools.partial(likelihood.get_nll_fn, *scored, levels),
        make_nelbo_fn=functools.partial(likelihood.get_nelbo_fn, *scored, levels),
        seed=config.seed,
        dtype=config.model.dtype,
        network=config.model.name,
        shape=data.shape,
        padded_shape=data.padded_shape,
        dequantization=data.dequantization,
        centered=data.centered,
        num_classes=config.model.num_classes,
        classes=tuple(config.data.classes),
        label_dropout=training.label_dropout,
        eps=training.truncation_time,
        objective_text=objective_in_words(config),
        optimizer_text=optimizer_in_words(config),
        loop=fields.call(parts.Loop, config, "training"),
        sampling=fields.call(parts.Sampling, config, "sampling"),
        evaluation=fields.call(parts.Evaluation, config, "eval"),
        fields=as_recorded(config),
        rebuild=lambda changes: set_up(_changed(config, changes), num_devices, above),
    )


def sampling_method(config: ConfigDict) -> sampling.SamplerFn:
    """The sampling method of a config, with its predictor and corrector.

    Raises:
      UserError: the sampler needs a field that the config does not have.
    """
    chosen, sections = config.sampling, ("sampling", "model")

    def step_fn(make: Callable[..., sampling.StepFn] | None) -> sampling.StepFn | None:
        return None if make is None else fields.call(make, config, *sections)

    try:
        return fields.call(
            sampling.SAMPLERS[chosen.method],
            config,
            *sections,
            predictor=step_fn(sampling.PREDICTORS[chosen.predictor]),
            corrector=step_fn(sampling.CORRECTORS[chosen.corrector]),
        )
    except TypeError as error:  # a parameter that is no field
        raise UserError(f"config.sampling: no sampler can be built: {error}") from error


def get_sampling_fn(
    config: ConfigDict, sde: sde_lib.SDE, make_score_fn: sampling.MakeScoreFn, count: int
) -> Callable[..., tuple[Array, Array]]:
    """The compiled function (params, key, labels=None) → (x, nfe) of `count` samples."""
    shape, guidance = (count, *image_shape(config)), config.sampling.guidance
    return sampling.get_sampling_fn(sampling_method(config), sde, make_score_fn, shape, guidance)


def _changed(config: ConfigDict, changes: Mapping[str, Any]) -> ConfigDict:
    changed = config.copy_and_resolve_references()
    changed.update_from_flattened_dict(dict(changes))
    return changed


def get_train_call(setup: Setup, train: Dataset, first_step: int) -> TrainCall:
    """The training function (`make_train_call`) of a run, starting at `first_step`."""
    size, labelled = setup.loop.batch_size, setup.num_classes > 0
    return make_train_call(setup.make_step_fn(), train, size, setup.seed, first_step, labelled)


def objective_in_words(config: ConfigDict) -> str:
    """A description of a config's objective: SDE, weighting, times, truncation and prior.

    For an objective that a config file registers, only the SDE and the objective's name are given.
    """
    training = config.training
    if training.objective != "score_matching":
        return f"{training.sde}, {training.objective} objective"
    flag = "likelihood (g²)" if training.likelihood_weighting else "variance (σ²)"
    drawn = "importance-sampled" if training.importance_sampling else "uniform"
    prior = f", k = {training.k:g}" if training.prior == "power" else f", {training.prior} prior"
    mixed = residual = ""
    if training.mixed:
        ratio = " times the ratio of the halves' losses" if training.balanced else ""
        mixed = (
            "; half of a batch has variance weighting and uniform time, with weight "
            f"{training.ddpm_weight:g}{ratio}"
        )
    if training.reconstruction_loss:
        residual = f"; with the reconstruction loss, {config.data.dequantization} data"
    return (
        f"{training.sde}, {training.weighting or flag} weighting, {drawn} time, "
        f"{training.truncation.replace('_', ' ')} truncation"
        f"{'' if training.truncation == 'fixed' else prior}, ε = {training.truncation_time:g}"
        f"{mixed}{residual}"
    )


def optimizer_in_words(config: ConfigDict) -> str:
    """A description of a config's optimiser and its learning rate."""
    optim = config.optim
    return (
        f"{optim.optimizer}, {optim.schedule.replace('_', ' ')} learning rate of {optim.lr:g} "
        f"after {optim.warmup:,} steps of warm-up"
    )


def labels_on_devices(labels: np.ndarray, num_classes: int, whole: bool = False) -> Array | None:
    """The labels of a batch of images, divided between the devices.

    Args:
      labels: of the images, (N,); N must be divisible by the number of devices.
      num_classes: the number of labels of the network; 0: the result is None.
      whole: whether each device gets the labels of the whole batch instead.
    """
    if not num_classes:
        return None
    rows, everywhere = batch_and_replicated_shardings()
    return to_devices(np.asarray(labels, np.int32), everywhere if whole else rows)
