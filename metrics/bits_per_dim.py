"""Bits/dim of test images under a checkpoint, an untrained network and a Gaussian."""

import dataclasses
import functools
import hashlib
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import likelihood
from build import Setup, labels_on_devices
from configs import seeds
from configs.errors import UserError
from data import pixels
from data.batches import Data, fingerprint, in_batches, in_order, subset
from metrics import distances
from metrics.memory_advice import smaller_batches
from runtime import memory
from runtime.devices import batch_and_replicated_shardings, to_devices, to_host
from runtime.progress import Progress
from runtime.workdir import PartialResults, short_hash

log = logging.getLogger("soft_truncation")

WEIGHTED = "nll_truncated_normal_weighted"


def get_bpd_fn(setup: Setup) -> Callable[..., dict[str, Array]]:
    """A function (params, keys, image_keys, x, levels, labels) → NLL, NELBO and NFE, (N,) each.

    Args of that function: keys of the images for this draw, and for all draws, (N,); x dequantised
    and scaled; `levels` scaled only; labels (N,), or None.
    """
    nll_fn, nelbo_fn = setup.make_nll_fn(), setup.make_nelbo_fn()

    def bpd_fn(
        params: Any,
        keys: Array,
        image_keys: Array,
        x: Array,
        levels: Array,
        labels: Array | None = None,
    ) -> dict[str, Array]:
        nll_keys, nelbo_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
        values = {k: v for k, v in nll_fn(params, nll_keys, x, labels).items() if k != "latent"}
        values |= nelbo_fn(params, nelbo_keys, x, labels)
        if setup.dequantization == "lossless":
            values |= nelbo_fn(params, nelbo_keys, levels, labels, lossless=True)
        if setup.evaluation.truncated_normal:
            # All draws of an image have one probe: then its noise is nearly a common term, which
            # does not bias the bound of several draws.
            probe = jax.vmap(lambda key: jax.random.rademacher(key, x.shape[1:], x.dtype))
            values |= nll_fn(
                params, nll_keys, levels, labels, probe(image_keys), truncated_normal=True
            )
            values |= nelbo_fn(params, nelbo_keys, levels, labels, truncated_normal=True)
        return values

    return jax.jit(bpd_fn)


def bits_program(setup: Setup, batch_size: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A device's share of a batch of bits/dim as a function, and the shapes of its arguments."""
    n = -(-batch_size // jax.device_count())
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), n))
    x = jax.ShapeDtypeStruct((n, *setup.padded_shape), jnp.float32)
    labels = [jax.ShapeDtypeStruct((n,), jnp.int32)] if setup.num_classes else []
    return get_bpd_fn(setup), (setup.state_shape.ema_params, keys, keys, x, x, *labels)


def advise_on_bits(setup: Setup, count: int) -> None:
    """Log how much memory bits/dim of `count` images need, and what to set if that is too much."""
    field, batch_size = "eval.batch_size", min(setup.evaluation.batch_size, count)

    def needed(fields: Mapping[str, Any]) -> int:
        program, shapes = bits_program(setup, fields.get(field, batch_size))
        return memory.needed_bytes(program, *shapes)

    memory.advise("bits/dim", needed, smaller_batches(field, batch_size))


@dataclasses.dataclass(frozen=True)
class BitsEvaluation:
    """Inputs of a bits/dim evaluation, shared by all checkpoints so that it compiles once."""

    setup: Setup
    data: Data
    results: PartialResults
    bpd_fn: Callable[..., dict[str, Array]]  # from `get_bpd_fn`

    @property
    def num_test(self) -> int:
        """The number of test images that are scored."""
        return min(self.setup.evaluation.num_test_data, len(self.data.test))


def keys_of_contents(seed: int, images: np.ndarray) -> Array:
    """A key for each image (N, H, W, C), (N,): a function of the seed and of the image's pixels."""
    digests = [hashlib.blake2b(image.tobytes(), digest_size=8).digest() for image in images]
    numbers = np.frombuffer(b"".join(digests), "<u4").astype(np.uint32).reshape(-1, 2)
    fold_in = jax.vmap(jax.random.fold_in, (None, 0))
    keys = fold_in(jax.random.key(seed + seeds.BITS_PER_DIM), numbers[:, 0])
    return jax.vmap(jax.random.fold_in)(keys, numbers[:, 1])


def _bits_of_batch(
    evaluation: BitsEvaluation, params: Any, images: np.ndarray, labels: np.ndarray, draw: int
) -> dict[str, np.ndarray]:
    """Bits/dim, float64, of levels (N, H, W, C) with labels (N,); the devices must divide N."""
    rows, _ = batch_and_replicated_shardings()
    image_keys = keys_of_contents(evaluation.setup.seed, images)
    keys = jax.vmap(lambda key: jax.random.fold_in(key, draw))(image_keys)
    data_keys, keys = jax.vmap(jax.random.split, out_axes=1)(keys)
    preprocessing = evaluation.setup.preprocessing
    x = preprocessing.to_density_x0(images, data_keys)
    plain = preprocessing.to_x0_without_noise(images)
    told = labels_on_devices(labels, evaluation.setup.num_classes)
    bits = evaluation.bpd_fn(params, *to_devices((keys, image_keys, x, plain), rows), told)
    # The bits of the padding count, too: a bound on those of the image alone.
    whole = math.prod(evaluation.setup.padded_shape) / math.prod(evaluation.setup.shape)
    values = {name: to_host(value).astype(np.float64) for name, value in bits.items()}
    values |= {name: value * whole for name, value in values.items() if name != "nfe"}
    for name, value in values.items():
        if not np.isfinite(value).all():
            raise UserError(
                f"{name} is not finite for some images: the weights are broken, or the solver "
                "failed; try a smaller eval.rtol and eval.atol, or more eval.nll_steps"
            )
    return values


def _bits_per_dim(
    evaluation: BitsEvaluation, params: Any, count: int, num_draws: int, name: str
) -> dict[str, np.ndarray]:
    """NLL, NELBO and NFE of `count` test images (`subset`), (num_draws, count) each.

    All noise of an image is a function of the config's seed and of its pixels, and the solvers take
    each image by itself, so that an image's scores do not depend on the others.
    """
    setup, test = evaluation.setup, evaluation.data.test
    options = setup.evaluation
    _, everywhere = batch_and_replicated_shardings()
    params = to_devices(params, everywhere)
    devices = jax.device_count()
    full = -(-min(options.batch_size, count) // devices) * devices
    names = ("batch_size", "nelbo_draws", "nll_steps", "rtol", "atol")
    solver = {name: getattr(options, name) for name in names}
    if options.truncated_normal:
        solver["truncated_normal"] = True
    data = fingerprint(test), count  # the images of a batch depend on both
    name_of_work = short_hash(params, *network_fields(setup), solver, *data)
    progress, drawn = Progress(f"bits/dim, {name}", count * num_draws, compiles=True), []

    indices = subset(test, count)

    def batch(draw: int, start: int, size: int) -> dict[str, np.ndarray]:
        number = indices[start : start + size]
        # The last batch is padded: all batches have the same shape and use one compiled program.
        number = np.pad(number, (0, full - size), mode="wrap")
        examples = test.source.fetch(number)
        # Images that come without labels are scored as images of no label.
        labels = examples["label"] if test.num_classes else np.full(full, setup.num_classes)
        values = _bits_of_batch(evaluation, params, examples["image"], labels, draw)
        return {name: value[:size] for name, value in values.items()}

    for draw in range(num_draws):
        row = []
        for start in range(0, count, options.batch_size):
            size = min(options.batch_size, count - start)
            label = f"{name_of_work}/bpd_{draw}_{start:08}_{size}"
            row.append(evaluation.results.get(label, functools.partial(batch, draw, start, size)))
            mean = np.mean(np.concatenate([part["nll"] for part in row]))
            progress.advance(size, f"NLL {mean:.3f}", fresh=not evaluation.results.recalled)
        drawn.append({name: np.concatenate([part[name] for part in row]) for name in row[0]})
    return {name: np.stack([values[name] for values in drawn]) for name in drawn[0]}


def network_fields(setup: Setup) -> tuple[Any, ...]:
    """The config fields that determine the network, its SDE and its data."""
    config = setup.fields
    training = config["training"]
    names = ("sde", "truncation_time", "unbounded_parametrization", "stabilizing_constant")
    return config["seed"], config["data"], config["model"], {name: training[name] for name in names}


def _gaussian_baseline(setup: Setup, data: Data, count: int) -> np.ndarray | None:
    """Bits/dim (count,) of test images under a Gaussian fitted to training images, or None."""
    dims, num_train = math.prod(setup.padded_shape), min(len(data.train), 50_000)
    if dims > 4096 or num_train < 2 * dims:
        log.info("no Gaussian baseline: it needs 2 × %d training images, at most 4096 dims", dims)
        return None
    levels, rng = data.train.num_levels, np.random.default_rng(setup.seed)

    def prepare(images: np.ndarray) -> np.ndarray:
        x = (images + rng.random(images.shape)) / levels if levels else images.astype(np.float64)
        return pixels.scale(x, setup.centered).reshape(len(x), -1)

    moments = distances.Moments()
    for batch in in_batches(data.train, 1000, num_train):
        moments.add(prepare(batch["image"]))
    bits = distances.gaussian_bits_per_dim(
        moments,
        prepare(in_order(data.test, count)["image"]),
        setup.preprocessing.bits_offset,
    )
    return bits * (dims / math.prod(setup.shape))


def bits_of_images(evaluation: BitsEvaluation, params: Any) -> dict[str, np.ndarray]:
    """NLL, NELBO and NFE of the test images, (eval.num_draws, number of images) each."""
    draws = evaluation.setup.evaluation.num_draws
    return _bits_per_dim(evaluation, params, evaluation.num_test, draws, "trained network")


def summarize_bits(evaluation: BitsEvaluation, values: dict[str, np.ndarray]) -> dict[str, Any]:
    """Means and standard errors of `bits_of_images`, for the report."""
    setup, options = evaluation.setup, evaluation.setup.evaluation
    count, draws = evaluation.num_test, options.num_draws
    report: dict[str, Any] = {"num_test_images": count, "num_draws": draws}
    report |= {
        name: getattr(options, name) for name in ("nelbo_draws", "nll_steps", "rtol", "atol")
    }
    report["nll_nfe"] = float(values["nfe"].mean())
    report["dequantization"] = setup.dequantization
    scores = {name: values[name] for name in sorted(values) if name != "nfe"}
    if options.truncated_normal:
        eps, width = setup.eps, setup.preprocessing.cell_width
        report["truncated_normal_r"] = float(likelihood.cell_radius(setup.sde, eps, width))
        report["truncated_normal_largest_eps"] = likelihood.largest_eps(setup.sde, width)
        if draws > 1:
            scores[WEIGHTED] = weighted_draws(setup, values)[None]
    for name, of_images in scores.items():
        mean, stderr, of_draws = likelihood.mean_and_errors(of_images)
        report[name] = mean
        if count > 1:
            report[f"{name}_stderr"] = stderr
        if of_draws is not None and name != "nll_truncated_normal":  # its draws share a probe
            report[f"{name}_stderr_of_draws"] = of_draws
    return report


def weighted_draws(setup: Setup, values: dict[str, np.ndarray]) -> np.ndarray:
    """The importance-weighted bound of the draws in `bits_of_images`, (number of images,)."""
    # The bits of the padding are among those of each of the image's own dimensions.
    dims = math.prod(setup.shape)
    return likelihood.importance_weighted(values["nll_truncated_normal"], dims)


def table_of_images(
    evaluation: BitsEvaluation, values: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Columns of a table with a row for each image: scores, and their errors over the draws."""
    columns: dict[str, np.ndarray] = {}
    for name in sorted(values):
        of_draws = values[name]
        if name != "nfe":
            columns[name] = of_draws.mean(axis=0)
        if name not in ("nfe", "nll_truncated_normal") and len(of_draws) > 1:
            columns[f"{name}_stderr"] = of_draws.std(axis=0, ddof=1) / len(of_draws) ** 0.5
    options = evaluation.setup.evaluation
    if options.truncated_normal and options.num_draws > 1:
        columns[WEIGHTED] = weighted_draws(evaluation.setup, values)
    return columns


def evaluate_bits(evaluation: BitsEvaluation, params: Any) -> dict[str, Any]:
    """Means and standard errors of a network's NLL and NELBO, for the report."""
    return summarize_bits(evaluation, bits_of_images(evaluation, params))


def evaluate_baselines(evaluation: BitsEvaluation) -> dict[str, Any]:
    """NLL of the test images under an untrained network and under a Gaussian, for the report."""
    setup = evaluation.setup
    untrained = setup.init_state().params
    # One batch is enough: the NLL of an untrained network varies by 0.01 bits/dim between images.
    few = min(evaluation.num_test, max(2, setup.evaluation.batch_size))
    values = _bits_per_dim(evaluation, untrained, few, 1, "untrained network")
    gaussian = _gaussian_baseline(setup, evaluation.data, evaluation.num_test)
    report: dict[str, Any] = {"num_images_untrained_network": few}
    for name, bits in (("untrained_network", values["nll"][0]), ("gaussian", gaussian)):
        if bits is not None:
            estimate = distances.Estimate.of(bits)
            report[f"nll_{name}"] = estimate.value
            report[f"nll_{name}_stderr"] = estimate.stderr
    return report
