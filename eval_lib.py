"""The loops of --mode eval and --mode stats: scores of checkpoints, and of samples by anyone.

What takes long is kept below <workdir>/eval/parts until the report is written, so that an
evaluation that was cut off goes on where it was. A part's name tells weights, data and options
apart.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from ml_collections import ConfigDict

import checkpointing
import datasets
import environment
import evaluation
import features
import hosts
import likelihood
import reporting
import storage
from configs.default import UserError
from datasets import Data, load_data
from features import Extractor, Statistics
from models import utils as mutils
from readers.samples import load_samples
from session import (
    Setup,
    gather,
    get_sampler,
    init_state,
    mesh_shardings,
    sample_batches,
    set_up,
    spread,
)

log = logging.getLogger("soft_truncation")


def _get_bpd_fn(config: ConfigDict, setup: Setup) -> Callable[..., dict[str, Array]]:
    """(params, keys, x, levels) → NLL, NELBO, evaluations of a solve, (N,) each.

    x is dequantised, `levels` is not; both are scaled.
    """
    make_score_fn = functools.partial(mutils.get_score_fn, config, setup.sde, setup.model)
    num_levels = setup.num_levels
    nll_fn = likelihood.get_nll_fn(config, setup.sde, make_score_fn, num_levels)
    nelbo_fn = likelihood.get_nelbo_fn(config, setup.sde, make_score_fn, num_levels)

    def bpd_fn(params: Any, keys: Array, x: Array, levels: Array) -> dict[str, Array]:
        nll_keys, nelbo_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
        values = {k: v for k, v in nll_fn(params, nll_keys, x).items() if k != "latent"}
        values["nfe"] = jnp.broadcast_to(values["nfe"], len(x))
        values |= nelbo_fn(params, nelbo_keys, x)
        if config.data.dequantization == "lossless":
            values |= nelbo_fn(params, nelbo_keys, levels, lossless=True)
        return values

    return jax.jit(bpd_fn)


@dataclasses.dataclass(frozen=True)
class _Run:
    """What an evaluation has for all checkpoints; each function compiles once."""

    config: ConfigDict
    setup: Setup
    data: Data
    parts: storage.Parts
    bpd_fn: Callable[..., dict[str, Array]]
    sample: Any  # of session.get_sampler
    scorers: list["_Scorer"]

    @property
    def num_test(self) -> int:
        """How many test images are scored."""
        return min(self.config.eval.num_test_data, len(self.data.test))


def _bits_of_batch(
    run: _Run, params: Any, images: np.ndarray, keys: Array
) -> dict[str, np.ndarray]:
    """Bits/dim of levels (N, H, W, C) with a key each, float64; N must fill the devices."""
    rows, _ = mesh_shardings()
    data_keys, keys = jax.vmap(jax.random.split, out_axes=1)(keys)
    x = datasets.dequantize(images, data_keys, run.setup.num_levels)
    x = datasets.scale(x, run.config.data.centered)
    # Read only if they are lossless.
    plain = datasets.to_model(images, run.setup.num_levels, run.config)
    bits = run.bpd_fn(params, *spread((keys, x, plain), rows))
    values = {name: gather(value).astype(np.float64) for name, value in bits.items()}
    for name, value in values.items():
        if not np.isfinite(value).all():
            raise UserError(
                f"{name} is not finite for some images: the weights are broken, or the solver "
                "failed; try a smaller eval.rtol and eval.atol, or more eval.nll_steps"
            )
    return values


def _bits_per_dim(
    run: _Run, params: Any, count: int, num_draws: int, name: str
) -> dict[str, np.ndarray]:
    """NLL, NELBO and evaluations of the first `count` test images, (num_draws, count) each."""
    config, test = run.config, run.data.test
    _, everywhere = mesh_shardings()
    params = spread(params, everywhere)
    key, devices = jax.random.key(config.seed + 4), jax.device_count()
    full = -(-min(config.eval.batch_size, count) // devices) * devices
    solver = {k: config.eval[k] for k in ("batch_size", "nelbo_draws", "nll_steps", "rtol", "atol")}
    digest = storage.digest(params, *_network_fields(config), solver, datasets.fingerprint(test))
    progress, drawn = reporting.Progress(f"bits/dim, {name}", count * num_draws), []

    places = datasets.subset(test, count)

    def batch(draw: int, start: int, size: int) -> dict[str, np.ndarray]:
        number = places[start : start + size]
        images = test.source.fetch(number)["image"]
        # Filled up, so that all batches have one shape, and one program.
        images = np.pad(images, ((0, full - size), (0, 0), (0, 0), (0, 0)), mode="wrap")
        number = np.pad(number, (0, full - size), mode="wrap")
        keys = jax.vmap(lambda n: jax.random.fold_in(jax.random.fold_in(key, n), draw))(number)
        values = _bits_of_batch(run, params, images, keys)
        return {name: value[:size] for name, value in values.items()}

    for draw in range(num_draws):
        row = []
        for start in range(0, count, config.eval.batch_size):
            size = min(config.eval.batch_size, count - start)
            label = f"{digest}/bpd_{draw}_{start:08}_{size}"
            row.append(run.parts.get(label, functools.partial(batch, draw, start, size)))
            mean = np.mean(np.concatenate([part["nll"] for part in row]))
            progress.advance(size, f"NLL {mean:.3f}", fresh=not run.parts.recalled)
        drawn.append({name: np.concatenate([part[name] for part in row]) for name in row[0]})
    return {name: np.stack([values[name] for values in drawn]) for name in drawn[0]}


def _network_fields(config: ConfigDict) -> tuple[Any, ...]:
    """The fields that decide what a network computes on which data."""
    training = config.training
    names = ("sde", "truncation_time", "unbounded_parametrization", "stabilizing_constant")
    return config.seed, config.data, config.model, {name: training[name] for name in names}


def _gaussian_baseline(config: ConfigDict, data: Data, count: int) -> np.ndarray | None:
    """Bits/dim (count,) of test images under a normal distribution fitted to training images."""
    size, channels = config.data.image_size, config.data.num_channels
    dims, num_train = size * size * channels, min(len(data.train), 50_000)
    if dims > 4096 or num_train < 2 * dims:
        log.info("no Gaussian baseline: it needs 2 × %d training images, at most 4096 dims", dims)
        return None
    levels, rng = data.train.num_levels, np.random.default_rng(config.seed)

    def prepare(images: np.ndarray) -> np.ndarray:
        x = (images + rng.random(images.shape)) / levels
        return datasets.scale(x, config.data.centered).reshape(len(x), -1)

    moments = evaluation.Moments()
    for batch in datasets.batches(data.train, 1000, num_train):
        moments.add(prepare(batch["image"]))
    return evaluation.gaussian_bits_per_dim(
        moments,
        prepare(datasets.in_order(data.test, count)["image"]),
        datasets.bits_offset(levels, config.data.centered),
    )


def _evaluate_bpd(run: _Run, params: Any) -> dict[str, Any]:
    count, draws = run.num_test, run.config.eval.num_draws
    values = _bits_per_dim(run, params, count, draws, "trained network")
    report: dict[str, Any] = {"num_test_images": count, "num_draws": draws}
    report |= {name: run.config.eval[name] for name in ("nelbo_draws", "nll_steps", "rtol", "atol")}
    report["nll_nfe"] = float(values.pop("nfe").mean())
    for name in sorted(values):
        mean, stderr, of_draws = likelihood.mean_and_errors(values[name])
        report |= {name: mean, f"{name}_stderr": stderr}
        if of_draws is not None:
            report[f"{name}_stderr_of_draws"] = of_draws
    return report


def _evaluate_baselines(run: _Run) -> dict[str, Any]:
    """NLL of an untrained network, and of a Gaussian."""
    untrained = init_state(run.config, run.setup.model, run.setup.optimizer).params
    # One batch says it: such a network costs the same on every image, to a hundredth of a bit.
    few = min(run.num_test, max(2, run.config.eval.batch_size))
    values = _bits_per_dim(run, untrained, few, 1, "untrained network")
    gaussian = _gaussian_baseline(run.config, run.data, run.num_test)
    report: dict[str, Any] = {"num_images_untrained_network": few}
    for name, bits in (("untrained_network", values["nll"][0]), ("gaussian", gaussian)):
        if bits is not None:
            estimate = evaluation.Estimate.of(bits)
            report[f"nll_{name}"] = estimate.value
            report[f"nll_{name}_stderr"] = estimate.stderr
    return report


@dataclasses.dataclass(frozen=True)
class _Scorer:
    """What samples are scored with: features, and those of the training images."""

    extractor: Extractor
    reference: Statistics
    facts: dict[str, Any]  # for the report


@dataclasses.dataclass(frozen=True)
class _Images:
    """Images to be scored, that can be gone through more than once."""

    count: int
    digest: str  # names them
    batches: Callable[[], Iterator[np.ndarray]]  # levels (n, H, W, C) uint8


def _kept_features(
    extractor: Extractor, images: _Images, parts: storage.Parts, name: str, logits: bool = False
) -> Iterator[dict[str, np.ndarray]]:
    """`features` of images, and `logits` if asked, part by part."""
    progress = reporting.Progress(f"{extractor.name} features, {name}", images.count)
    folder = f"{images.digest}_{extractor.name}_{extractor.weights[:16]}"
    wanted = ("features", "logits") if logits else ("features",)

    def compute(levels: np.ndarray) -> dict[str, np.ndarray]:
        values = extractor.fn(levels)
        return {name: values[name] for name in wanted}

    start = 0
    for levels in _regrouped(images.batches(), extractor.batch_size):
        label = f"{folder}/{start:08}_{len(levels)}"
        part = parts.get(label, functools.partial(compute, levels))
        progress.advance(len(levels), fresh=not parts.recalled)
        start += len(levels)
        yield part


def _regrouped(batches: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """The same rows, `size` at a time."""
    waiting = np.zeros(0)
    for batch in batches:
        waiting = np.concatenate([waiting, batch]) if len(waiting) else batch
        while len(waiting) >= size:
            yield waiting[:size]
            waiting = waiting[size:]
    if len(waiting):
        yield waiting


def _of_dataset(dataset: datasets.Dataset, limit: int | None = None) -> _Images:
    count = len(dataset) if limit is None else min(limit, len(dataset))
    name = storage.digest(datasets.fingerprint(dataset), count)

    def batches() -> Iterator[np.ndarray]:
        for batch in datasets.batches(dataset, 100, count):
            yield batch["image"]

    return _Images(count, name, batches)


def _features_only(parts: Iterable[dict[str, np.ndarray]]) -> Iterator[np.ndarray]:
    for part in parts:
        yield part["features"]


def _cache_dir(config: ConfigDict) -> pathlib.Path:
    return pathlib.Path(config.eval.cache_dir or environment.cache_dir())


def _reference_facts(
    config: ConfigDict, extractor: Extractor, train: datasets.Dataset
) -> dict[str, Any]:
    return {
        "extractor": extractor.name,
        "weights": extractor.weights,
        "dataset": train.name,
        "fingerprint": datasets.fingerprint(train),
        "split": "train",
        "image_size": config.data.image_size,
        "num_channels": config.data.num_channels,
        "num_images": min(len(train), config.eval.num_reference or len(train)),
    }


def _inception_statistics(
    config: ConfigDict, extractor: Extractor, train: datasets.Dataset, make: bool
) -> tuple[Statistics, pathlib.Path]:
    """Those of `eval.stats_path`, which are made if `make`; or of the cache, made if need be."""
    facts = _reference_facts(config, extractor, train)
    name = f"{train.name}_{config.data.image_size}_{storage.digest(facts)}.npz"
    path = pathlib.Path(config.eval.stats_path or _cache_dir(config) / "stats" / name)
    if hosts.on_main(path.exists):
        log.info("statistics of the training images: %s", path)
        try:
            return hosts.on_main(lambda: features.load_statistics(path, facts)), path
        except UserError as error:
            if config.eval.stats_path:
                raise
            log.warning("%s; they are made anew", error)
    if config.eval.stats_path and not make:
        raise UserError(f"eval.stats_path: there is no file {path}; --mode stats makes it")
    option = "eval.stats_path" if config.eval.stats_path else "eval.cache_dir"
    hosts.on_main(lambda: storage.make_folder(path.parent, option))
    parts = storage.Parts(path.with_suffix(".parts"))
    images = _of_dataset(train, facts["num_images"])
    rows = _features_only(_kept_features(extractor, images, parts, "training images"))
    statistics = features.summarize(facts, rows, images.count)
    hosts.on_main(lambda: features.save_statistics(statistics, path))
    hosts.on_main(lambda: parts.discard(parts.used))
    log.info("statistics of %d training images in %s", images.count, path)
    return statistics, path


def _get_scorers(config: ConfigDict, data: Data, parts: storage.Parts) -> list[_Scorer]:
    """All that this data set and this machine can have.

    Raises:
      UserError: weights or statistics are not what they should be.
    """
    scorers, cache_dir = [], _cache_dir(config)
    if config.eval.enable_fid:
        extractor = features.get_inception(
            config.eval.inception_path, cache_dir, data.train.num_levels
        )
        if extractor:
            statistics, path = _inception_statistics(config, extractor, data.train, make=False)
            facts = {
                "inception_weights": extractor.weights,
                "inception_is_published": extractor.weights == features.INCEPTION_SHA256,
                "num_reference": statistics.facts.get("num_images", statistics.count or None),
                "statistics": str(path),
            }
            scorers.append(_Scorer(extractor, statistics, facts))
    if not data.train.num_classes or min(len(data.train), len(data.test)) < 4:
        log.warning("%s has no labels, or too few images: no fd_classifier", data.train.name)
        return scorers
    extractor, accuracy = features.get_classifier(data.train, data.test, cache_dir)

    def statistics_of(images: _Images, name: str) -> Statistics:
        rows = _features_only(_kept_features(extractor, images, parts, name))
        return features.summarize({}, rows, images.count)

    reference = statistics_of(
        _of_dataset(data.train, config.eval.num_reference or 50_000), "training images"
    )
    test = statistics_of(_of_dataset(data.test, 50_000), "test images")
    facts = {
        "fd_classifier_of_test_images": evaluation.frechet_distance_of_moments(
            reference.mean, reference.cov, test.mean, test.cov
        ),
        "num_test_images_for_scale": test.count,
        "num_reference_classifier": reference.count,
        "classifier_accuracy": accuracy,
        "classifier_weights": extractor.weights,
    }
    return [*scorers, _Scorer(extractor, reference, facts)]


def _score(scorer: _Scorer, images: _Images, parts: storage.Parts) -> dict[str, Any]:
    """All distances of images to the training images, each under its extractor's name."""
    logits = []

    def rows() -> Iterator[np.ndarray]:
        for part in _kept_features(scorer.extractor, images, parts, "samples", logits=True):
            logits.append(part["logits"])
            yield part["features"]

    # Another seed: the rows of both must not go together.
    real, fake = scorer.reference, features.summarize({}, rows(), images.count, seed=1)
    inception = scorer.extractor.name == "inception"
    suffix = "" if inception else f"_{scorer.extractor.name}"
    distance = evaluation.frechet_distance_of_moments(real.mean, real.cov, fake.mean, fake.cov)
    report: dict[str, Any] = {"fid" if inception else f"fd{suffix}": distance}
    if inception:
        score = evaluation.split_inception_score(np.concatenate(logits))
        report |= {"inception_score": score.value, "inception_score_stderr": score.stderr}
    if not inception and len(fake.features) >= 20:
        error = evaluation.frechet_distance_stderr(real.mean, real.cov, fake.features)
        # Of a subset, if there are many: the variance falls as 1/N.
        report[f"fd{suffix}_stderr"] = error * np.sqrt(len(fake.features) / fake.count)
    if len(real.features):
        kernel = evaluation.split_kernel_distance(real.features, fake.features)
        precision, recall = evaluation.precision_recall(real.features, fake.features)
        report |= {
            f"num_rows_kid{suffix}": min(len(real.features), len(fake.features)),
            f"kid{suffix}": kernel.value,
            f"kid{suffix}_stderr": kernel.stderr,
            f"precision{suffix}": precision,
            f"recall{suffix}": recall,
        }
    else:
        log.warning("these statistics hold no features: no KID, precision and recall")
    return report | scorer.facts


def _sample_size(config: ConfigDict) -> int:
    return min(config.eval.batch_size, config.eval.num_samples)


def _samples_of_network(run: _Run, params: Any) -> tuple[_Images, dict[str, Any]]:
    """Sample; (the samples, what the report says of them)."""
    config, parts = run.config, run.parts
    count, size = config.eval.num_samples, _sample_size(config)
    digest = storage.digest(params, *_network_fields(config), config.sampling, size)
    keep = lambda name, compute: parts.get(f"{digest}/{name}", compute)  # noqa: E731
    batches = functools.partial(sample_batches, run.sample, params, config.seed, count, size, keep)
    progress, evaluations, broken = reporting.Progress("sampling", count), [], 0
    for part in batches():
        evaluations.append(part.nfe)
        broken += part.num_broken
        note = f"{part.nfe} evaluations"
        progress.advance(len(part.levels), note, fresh=not parts.recalled)
    images = _Images(count, digest, lambda: (part.levels for part in batches()))
    nfe = round(float(np.mean(evaluations)))
    return images, {"num_samples": count, "sampling_nfe": nfe, "num_broken_samples": broken}


def _given_samples(config: ConfigDict, num_levels: int) -> tuple[_Images, dict[str, Any]]:
    """The images of `eval.samples`; (the images, what the report says of them)."""
    path = pathlib.Path(config.eval.samples)
    source = load_samples(path, config.data.image_size, config.data.num_channels)
    dataset = datasets.Dataset(path.stem, source, 256, 0)
    images = _of_dataset(dataset)

    def batches() -> Iterator[np.ndarray]:
        for grey in images.batches():
            yield np.round(grey * ((num_levels - 1) / 255)).astype(np.uint8)

    report = {"samples": config.eval.samples, "num_samples": len(dataset)}
    return dataclasses.replace(images, batches=batches), report


def _evaluate_samples(run: _Run, images: _Images, folder: pathlib.Path) -> dict[str, Any]:
    few = next(_regrouped(images.batches(), 64))
    grid = datasets.levels_to_uint8(few, run.setup.num_levels)
    hosts.on_main(lambda: reporting.save_grid(grid, folder / "samples.png"))
    report: dict[str, Any] = {}
    for scorer in run.scorers:
        report |= _score(scorer, images, run.parts)
    return report


def _evaluate_checkpoint(
    run: _Run, workdir: pathlib.Path, step: int, folder: pathlib.Path
) -> dict[str, Any]:
    config, parts = run.config, run.parts
    log.info("evaluating step %d of %s", step, workdir)
    params = checkpointing.restore_step(config, workdir, run.setup.state_shape, step).ema_params
    before = set(parts.used)

    def score() -> dict[str, np.ndarray]:
        hosts.on_main(lambda: reporting.clear(folder))
        report: dict[str, Any] = {"step": step, "truncation": config.training.truncation}
        report |= {"weights": "EMA", "weights_digest": storage.digest(params)}
        if config.eval.enable_bpd:
            report |= _evaluate_bpd(run, params)
        if config.eval.enable_sampling:
            images, facts = _samples_of_network(run, params)
            report |= facts | _evaluate_samples(run, images, folder)
        return {"json": np.array(json.dumps(report))}

    # Of a sweep that was cut off, checkpoints that were done are not done again, and their samples
    # need not wait on the disk for the others.
    name = storage.digest(params, config, step)
    report = json.loads(str(parts.get(f"{name}/report", score)["json"]))
    hosts.on_main(lambda: parts.discard(parts.used - before - {name}))
    return report


def evaluate(config: ConfigDict, workdir: str | os.PathLike[str]) -> dict[str, Any]:
    """Score checkpoints' EMA weights, or `eval.samples`; writes report.json and report.md.

    The report is in eval/ for one checkpoint and for a sweep, and in eval/samples_… for given
    samples. A sweep has each checkpoint's own report in eval/step_<number>/.

    Returns:
      The report; of a sweep: `checkpoints`, a report each, and `best`, the step by each score.

    Raises:
      UserError: config, data, weights, statistics or checkpoints can't be used.
    """
    workdir = pathlib.Path(workdir)
    setup, data = set_up(config), load_data(config)
    given = _given_samples(config, setup.num_levels) if config.eval.samples else None
    with contextlib.ExitStack() as stack:
        steps = hosts.on_main(lambda: _take_hold(config, workdir, stack))
        return _evaluate(config, setup, data, workdir, given, steps)


def _take_hold(config: ConfigDict, workdir: pathlib.Path, stack: contextlib.ExitStack) -> list[int]:
    """Lock eval/; the steps to evaluate."""
    steps = [] if config.eval.samples else checkpointing.steps_to_evaluate(config, workdir)
    storage.check_network(config, workdir)
    storage.make_folder(workdir / "eval", "--workdir")
    stack.enter_context(storage.locked(workdir / "eval"))
    return steps


def _evaluate(
    config: ConfigDict,
    setup: Setup,
    data: Data,
    workdir: pathlib.Path,
    given: tuple[_Images, dict[str, Any]] | None,
    steps: list[int],
) -> dict[str, Any]:
    folder = workdir / "eval"
    parts = storage.Parts(folder / "parts")
    scorers = _get_scorers(config, data, parts) if config.eval.enable_sampling else []
    if not scorers and (given or not config.eval.enable_bpd):
        raise UserError("nothing would be scored; see the lines above, and the eval.enable_ fields")
    bpd_fn = _get_bpd_fn(config, setup)
    sample = get_sampler(config, setup, _sample_size(config))
    run = _Run(config, setup, data, parts, bpd_fn, sample, scorers)
    if config.eval.enable_bpd and not given and run.num_test < 2:
        raise UserError(f"{data.test.name} has one test image; a standard error needs 2 or more")
    about: dict[str, Any] = {"data": data.train.name, "num_levels": setup.num_levels}
    about["data_notes"] = list(data.train.notes)
    if given:
        images, facts = given
        name = pathlib.Path(config.eval.samples).resolve().name
        folder = folder / f"samples_{name}_{images.digest[:8]}"
        log.info("evaluating %d images of %s", images.count, config.eval.samples)
        report = about | facts | _evaluate_samples(run, images, folder)
        hosts.on_main(functools.partial(reporting.write_report, report, folder))
    else:
        about |= _evaluate_baselines(run) if config.eval.enable_bpd else {}
        report = _evaluate_steps(run, workdir, steps, about)
    hosts.on_main(lambda: _finish(parts, folder))
    return report


def _evaluate_steps(
    run: _Run, workdir: pathlib.Path, steps: list[int], about: dict[str, Any]
) -> dict[str, Any]:
    """A report for each step, and of them all if there are several."""
    reports, folder = [], workdir / "eval"
    for step in steps:
        of_step = folder / f"step_{step:08}" if len(steps) > 1 else folder
        try:
            report = about | _evaluate_checkpoint(run, workdir, step, of_step)
        except UserError as error:
            if len(steps) == 1:
                raise
            log.warning("step %d is left out: %s", step, error)
            continue
        reports.append(report)
        curve = workdir / "metrics.jsonl", of_step / "training.png"
        hosts.on_main(functools.partial(reporting.plot_training, *curve))
        hosts.on_main(functools.partial(reporting.write_report, report, of_step))
    if not reports:
        raise UserError("no checkpoint could be scored; the lines above say why")
    if len(steps) > 1:
        return hosts.on_main(lambda: reporting.write_sweep(reports, folder))
    return report


def _finish(parts: storage.Parts, folder: pathlib.Path) -> None:
    """Show the report's table; what was kept for a second try is not needed any more."""
    parts.discard(parts.used)
    for line in (folder / "report.md").read_text().splitlines():
        if line.startswith("|"):
            log.info("%s", line)
    log.info("report in %s", folder / "report.md")


def make_statistics(config: ConfigDict) -> pathlib.Path:
    """Make the statistics of the training images that FID compares samples with.

    Returns:
      Their path: `eval.stats_path`, or one in the cache.

    Raises:
      UserError: there are no Inception weights, or the path has statistics of something else.
    """
    set_up(config)
    train = datasets.get_dataset(config, "train")
    extractor = features.get_inception(
        config.eval.inception_path, _cache_dir(config), train.num_levels
    )
    if not extractor:
        raise UserError("no Inception weights, hence no statistics; the line above says more")
    statistics, path = _inception_statistics(config, extractor, train, make=True)
    log.info("%s: %s", path, statistics.facts)
    return path
