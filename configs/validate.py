"""Checks of a config, made before anything is compiled."""

import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from configs import fields, seeds
from configs.errors import UserError
from configs.shapes import array_shape, image_shape, size_factor
from models.networks import Network

_CHOICES = {
    "data.dataset": ("digits", "array"),  # and those in readers.published.PUBLISHED
    "data.dequantization": ("none", "uniform", "lossless"),
    "model.dtype": ("float32", "bfloat16"),
    "model.parametrization": ("noise", "velocity"),
    "model.resblock_type": ("biggan", "ddpm"),
    "model.progressive": ("none", "output_skip", "residual"),
    "model.progressive_input": ("none", "input_skip", "residual"),
    "model.progressive_combine": ("sum", "cat"),
    "model.embedding_type": ("positional", "fourier"),
    "training.truncation": ("fixed", "soft", "equivalent_weight"),
    "sampling.task": ("generate", "inpaint", "colorize"),
    "sampling.format": ("npz", "npy", "png"),
}

_POSITIVE = [
    "data.image_size",
    "data.num_channels",
    "model.nf",
    "model.num_res_blocks",
    "model.patch_size",
    "data.max_pixels",
    "model.ema_rate",
    "model.beta_max",
    "model.sigma_min",
    "model.sigma_max",
    "model.sigma_data",
    "model.fourier_scale",
    "model.num_scales",
    "optim.lr",
    "optim.eps",
    "optim.decay_start",
    "optim.num_micro_batch",
    "training.batch_size",
    "training.n_iters",
    "training.truncation_time",
    "training.ddpm_weight",
    "training.stabilizing_constant",
    "training.n_jitted_steps",
    "training.log_freq",
    "training.max_skipped_steps",
    "training.max_failed_saves",
    "sampling.num_steps",
    "sampling.n_steps_each",
    "sampling.snr",
    "sampling.truncation_time",
    "sampling.rtol",
    "sampling.atol",
    "sampling.batch_size",
    "sampling.n_images",
    "eval.batch_size",
    "eval.num_samples",
    "eval.num_test_data",
    "eval.num_draws",
    "eval.image_draws",
    "eval.nelbo_draws",
    "eval.rtol",
    "eval.atol",
]

_NOT_NEGATIVE = (
    "training.eval_freq",
    "training.snapshot_freq",
    "training.snapshot_freq_for_preemption",
    "model.dropout",
    "model.init_scale",
    "model.beta_min",
    "model.embedding_dim",
    "optim.weight_decay",
    "optim.warmup",
    "sampling.keep",
    "eval.begin_ckpt",
    "eval.end_ckpt",
    "eval.sampling_batch_size",
    "eval.num_reference",
    "eval.nll_steps",
)


def _problems(
    config: ConfigDict, num_devices: int, registries: Mapping[str, Mapping[str, Any]]
) -> Iterator[str]:
    def get(name: Any) -> Any:
        return config[name.split(".")[0]][name.split(".")[1]]

    for name in ("model.ch_mult", "model.attn_resolutions"):
        if not all(isinstance(n, int) and n > 0 for n in get(name)):
            yield f"{name} is {tuple(get(name))}; it must be a list of positive whole numbers"
    for name in {**_CHOICES, **registries}:
        choices = (*_CHOICES.get(name, ()), *registries.get(name, ()))
        unset = name == "training.weighting" and not get(name)
        if get(name) not in choices and not unset:
            yield f"{name} is {get(name)!r}; it must be one of {', '.join(choices)}"
    yield from _range_problems(config, get)
    yield from _eval_problems(config)
    yield from _data_problems(config, registries)
    # The name is in the registry: this was checked above.
    sde = fields.call(registries["training.sde"][config.training.sde], config, "training", "model")
    exploding = sde.exploding
    network = registries["model.name"][config.model.name]
    yield from _model_problems(config, network, exploding)
    yield from _size_problems(config)
    yield from _label_problems(config, network)
    yield from _sampling_problems(config, registries)
    yield from _training_problems(config, num_devices)
    if not 0 <= config.seed < 2**32 - seeds.LARGEST:
        yield f"seed is {config.seed}; it must be between 0 and {2**32 - seeds.LARGEST - 1}"


def _range_problems(config: ConfigDict, get: Callable[[str], Any]) -> Iterator[str]:
    for name in _POSITIVE:
        if not (get(name) > 0 and math.isfinite(get(name))):
            yield f"{name} is {get(name)}; it must be a positive number"
    for name in _NOT_NEGATIVE:
        if not (get(name) >= 0 and math.isfinite(get(name))):
            yield f"{name} is {get(name)}; it must not be negative"
    if not math.isfinite(config.training.sigmoid_bias):
        yield f"training.sigmoid_bias is {config.training.sigmoid_bias}; it must be a number"
    if not (config.training.k >= 0):
        yield f"training.k is {config.training.k}; it must be at least 0 (inf: fixed truncation)"
    for name in ("training.truncation_time", "sampling.truncation_time", "model.dropout"):
        if get(name) >= 1:
            yield f"{name} is {get(name)}; it must be below 1"
    for name in ("model.ema_rate", "optim.beta1"):
        if not 0 <= get(name) < 1:
            yield f"{name} is {get(name)}; it must be in [0, 1)"
    clip = config.optim.grad_clip
    if math.isnan(clip) or clip == 0:
        yield f"optim.grad_clip is {clip}; it must be positive, or negative for no clipping"
    if config.optim.schedule == "cosine" and config.training.n_iters <= config.optim.warmup:
        yield (
            f"training.n_iters is {config.training.n_iters}; optim.schedule=cosine ends there, so "
            f"it must be more than optim.warmup, {config.optim.warmup}"
        )
    if not re.fullmatch(r"[a-z0-9.-]*", config.model.license):
        yield f"model.license is {config.model.license!r}; a name is like mit, or cc-by-4.0"
    if config.model.beta_max <= config.model.beta_min:
        yield "model.beta_max must be larger than model.beta_min"
    if config.data.num_channels not in (1, 3) and config.data.dataset != "array":
        yield f"data.num_channels is {config.data.num_channels}; it must be 1 (grey) or 3 (RGB)"


def _eval_problems(config: ConfigDict) -> Iterator[str]:
    if 0 < config.eval.num_samples < 4:
        yield f"eval.num_samples is {config.eval.num_samples}; precision and recall need 4 or more"
    if config.eval.num_test_data == 1:
        yield "eval.num_test_data is 1; a standard error needs 2 or more"
    if 0 < config.eval.num_reference < 4:
        yield (
            f"eval.num_reference is {config.eval.num_reference}; precision and recall need 4 or "
            "more, and 0 takes all training images"
        )
    if 0 < config.eval.nll_steps < 32:  # with fewer, NLL is too low
        yield f"eval.nll_steps is {config.eval.nll_steps}; it must be 32 or more, or 0 (adaptive)"
    if config.eval.begin_ckpt > config.eval.end_ckpt:
        yield (
            f"eval.begin_ckpt is {config.eval.begin_ckpt} and eval.end_ckpt "
            f"{config.eval.end_ckpt}; the end must not be below the beginning"
        )
    if config.eval.images and config.eval.samples:
        yield "eval.images is for bits/dim and eval.samples for distances; give one of them"
    if config.eval.images and not config.eval.enable_bpd:
        yield "eval.images is given, and eval.enable_bpd=False: nothing would be scored"
    if config.eval.samples and not config.eval.enable_sampling:
        yield "eval.samples is given, and eval.enable_sampling=False: nothing would be scored"


def _data_problems(
    config: ConfigDict, registries: Mapping[str, Mapping[str, Any]]
) -> Iterator[str]:
    if config.data.dataset == "digits" and config.data.path:
        yield "data.dataset=digits comes with scikit-learn; data.path must be empty"
    if config.data.dataset == "folder" and not config.data.path:
        yield "data.dataset=folder needs data.path, the folder of images"
    categories = getattr(registries["data.dataset"].get(config.data.dataset), "categories", ())
    if categories and config.data.category not in categories:
        yield (
            f"data.category is {config.data.category!r}; it must be one of {', '.join(categories)}"
        )


def _training_problems(config: ConfigDict, num_devices: int) -> Iterator[str]:
    if config.training.balanced and not config.training.mixed:
        yield "training.balanced is for training.mixed: it brings the halves of a batch to one size"
    if config.training.balanced and config.training.stratified_times:
        yield "training.balanced compares independent times; stratified_times must be False"
    if config.training.balanced and config.optim.num_micro_batch > 1:
        yield "training.balanced needs optim.num_micro_batch=1: its ratio is of the whole batch"
    if config.training.truncation == "equivalent_weight" and (
        config.training.balanced or config.training.reconstruction_loss
    ):
        yield (
            "training.truncation=equivalent_weight has no equal of balanced or of "
            "reconstruction_loss, which depend on τ in other ways than by the weight"
        )
    halves = config.training.likelihood_weighting and config.training.importance_sampling
    if config.training.mixed and config.training.weighting:
        yield "training.mixed has weightings of its own; training.weighting must be empty"
    if config.training.mixed and not halves:
        yield (
            "training.mixed needs likelihood_weighting and importance_sampling to be True: "
            "they are the first half's"
        )
    if config.training.objective == "edm":
        for name in ("mixed", "reconstruction_loss", "weighting", "stratified_times"):
            if config.training[name]:
                yield f"training.objective=edm has times and a weight of its own, without {name}"
        if config.training.truncation == "equivalent_weight":
            yield "training.objective=edm needs training.truncation soft or fixed"
    batch, micro = config.training.batch_size, config.optim.num_micro_batch
    pair = 2 if config.training.mixed else 1
    if micro >= 1 and batch % (num_devices * micro * pair):
        twice = " times 2, for training.mixed" if config.training.mixed else ""
        yield (
            f"training.batch_size is {batch}; it must be a multiple of the number of devices "
            f"({num_devices}) times optim.num_micro_batch ({micro}){twice}"
        )


def _label_problems(config: ConfigDict, network: Network) -> Iterator[str]:
    told, rate = config.model.num_classes, config.training.label_dropout
    w = config.sampling.guidance
    if told < 0 or told == 1:
        yield (
            f"model.num_classes is {told}; it must be 0 (no labels), -1 (the data set's), or 2 or "
            "more"
        )
    if told and not network.takes("num_classes"):
        yield f"model.name={config.model.name} takes no labels; model.num_classes must be 0"
    if not 0 <= rate < 1:
        yield f"training.label_dropout is {rate}; it must be in [0, 1)"
    if not math.isfinite(w):
        yield f"sampling.guidance is {w}; it must be a number"
    if w and not told:
        yield f"sampling.guidance is {w}, and this model is told no labels (model.num_classes=0)"
    if told and not rate and (w or config.sampling.labels.strip() == "none"):
        yield (
            f"{'sampling.guidance' if w else 'sampling.labels=none'} needs a network that was "
            "trained without labels, too; training.label_dropout is 0"
        )
    if config.sampling.labels != "all" and not told:
        yield (
            f"sampling.labels is {config.sampling.labels!r}, and this model is told no labels "
            "(model.num_classes=0)"
        )


def _model_problems(config: ConfigDict, network: Network, exploding: bool) -> Iterator[str]:
    model, sde = config.model, config.training.sde
    if exploding and model.sigma_max <= model.sigma_min:
        yield "model.sigma_max must be larger than model.sigma_min"
    if config.training.unbounded_parametrization and exploding:
        yield (
            f"training.unbounded_parametrization is not for {sde}: its network sees log σ(t), "
            "which is unbounded already"
        )
    if model.parametrization == "velocity" and model.scale_by_sigma:
        yield (
            "model.parametrization=velocity has a scale of its own at each σ; "
            "model.scale_by_sigma must be False"
        )
    if model.scale_by_sigma and not exploding:
        yield f"model.scale_by_sigma is for VE and RVE; with {sde} the score is divided by σ anyway"
    (height, width, _), sections = image_shape(config), ("model", "data", "training")
    given = {"exploding": exploding, "height": height, "width": width}
    yield from fields.call(network.problems, config, *sections, **given)
    for field, value in network.without.items():
        if model[field] != value:
            yield f"model.{field} is {model[field]!r}; {model.name} is a network without it"


def _size_problems(config: ConfigDict) -> Iterator[str]:
    data, model, factor = config.data, config.model, size_factor(config)
    is_array = data.dataset == "array"
    for name in () if is_array else ("image_width", "num_levels", "scale", "pad"):
        if data[name]:
            yield f"data.{name} is for data.dataset=array"
    height, width, channels = image_shape(config)
    if height % factor or width % factor:
        own = array_shape(config)
        near = {n: (n // factor * factor, -(-n // factor) * factor) for n in own[:2] if n % factor}
        what = (
            f"data.image_size is {own[0]}" if height == width else f"the data are {own[0]}×{own[1]}"
        )
        sizes = " and ".join(
            f"{low} or {high} for {n}" if low else f"{high} for {n}"
            for n, (low, high) in near.items()
        )
        pad = "; or set data.pad=True" if is_array else ""
        yield f"{what}; model.name={model.name} needs a multiple of {factor}: {sizes}{pad}"
    shown = tuple(config.sampling.show_channels)
    if shown and len(shown) not in (1, 3):
        yield f"sampling.show_channels is {shown}; it must be one channel or three"
    if any(not isinstance(c, int) or not 0 <= c < channels for c in shown):
        yield f"sampling.show_channels is {shown}; the data's channels are 0 to {channels - 1}"
    if is_array and config.sampling.format == "png":
        yield "sampling.format=png has no room for an array's values; it must be npz or npy"
    if data.scale and data.dequantization != "none":
        yield f"data.dequantization={data.dequantization} is for levels; floats need none"
    if data.scale and config.eval.truncated_normal:
        yield "eval.truncated_normal is for levels; the data are floats"


def check_array_fields(config: ConfigDict) -> None:
    """Check what is needed to read the arrays of `data.path`.

    Raises:
      UserError: one line that names the wrong field.
    """
    data = config.data
    if not data.path:
        raise UserError("config: data.dataset=array needs data.path, a file or folder of arrays")
    ends = [end if isinstance(end, list | tuple) else (end,) for end in data.scale]
    numbers = all(isinstance(n, int | float) and math.isfinite(n) for end in ends for n in end)
    if ends and not (len(ends) == 2 and numbers):
        raise UserError(
            f"config: data.scale is {tuple(data.scale)}; it must be two numbers, the values that "
            "become the ends of the model's range, or two lists with a number for each channel"
        )
    if data.channels_first not in (-1, 0, 1):
        raise UserError(f"config: data.channels_first is {data.channels_first}; it must be 0 or 1")
    if not 0 <= data.num_levels <= 65536:
        raise UserError(f"config: data.num_levels is {data.num_levels}; it must be 2 to 65536")


def _sampling_problems(
    config: ConfigDict, registries: Mapping[str, Mapping[str, Any]]
) -> Iterator[str]:
    sampling = config.sampling
    if config.model.num_scales < 2:
        yield f"model.num_scales is {config.model.num_scales}; the PC sampler needs at least 2"
    predict = registries["sampling.predictor"][sampling.predictor]
    has_flow = predict and "probability_flow" in inspect.signature(predict).parameters
    if sampling.method == "pc" and sampling.probability_flow and not has_flow:
        yield (
            "sampling.probability_flow needs another sampling.predictor than "
            f"{sampling.predictor}, such as euler_maruyama or reverse_diffusion"
        )
    if sampling.method == "pc" and sampling.predictor == sampling.corrector == "none":
        yield "sampling.predictor and sampling.corrector are both none: nothing would be sampled"
    if sampling.task != "generate" and sampling.method != "pc":
        yield f"sampling.task={sampling.task} needs sampling.method=pc"
    if sampling.task != "generate" and sampling.format != "npz":
        yield f"sampling.task={sampling.task} needs sampling.format=npz"
    if sampling.task == "colorize" and config.data.num_channels != 3:
        yield "sampling.task=colorize needs data.num_channels=3"
    if (
        config.training.sde == "reciprocal_vesde"
        and sampling.truncation_time < config.training.truncation_time
    ):
        yield (
            "sampling.truncation_time is below training.truncation_time, where reciprocal_vesde "
            "has its smallest σ"
        )


def validate(
    config: ConfigDict, num_devices: int, registries: Mapping[str, Mapping[str, Any]]
) -> None:
    """Check a config.

    Args:
      config: the config.
      num_devices: the number of devices that share a training batch.
      registries: the values that a field can name, by field; `build.REGISTRIES`.

    Raises:
      UserError: one line that names the first wrong field.
    """
    for problem in _problems(config, num_devices, registries):
        raise UserError(f"config: {problem}")
