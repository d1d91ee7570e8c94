"""Scores of samples: distances between their features and those of the training images."""

import dataclasses
import functools
import logging
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from build import Setup
from configs import parts
from configs.errors import UserError
from data.batches import Data, Dataset, fingerprint, in_batches
from metrics import distances
from metrics.classifier import get_classifier
from metrics.features import Extractor
from metrics.inception import INCEPTION_SHA256, get_inception
from metrics.statistics import Statistics, load_statistics, save_statistics, summarize
from runtime import environment, hosts
from runtime.progress import Progress
from runtime.workdir import PartialResults, make_folder, short_hash

log = logging.getLogger("soft_truncation")


@dataclasses.dataclass(frozen=True)
class Scorer:
    """A feature extractor and the statistics of the training images that samples are scored by."""

    extractor: Extractor
    reference: Statistics
    facts: dict[str, Any]  # entries of the report


@dataclasses.dataclass(frozen=True)
class Images:
    """Images to be scored; they can be iterated over more than once."""

    count: int
    digest: str  # identifies them in cached results
    batches: Callable[[], Iterator[np.ndarray]]  # levels (n, H, W, C) uint8
    labels: np.ndarray | None = None  # that they were drawn for, (count,), if there are any


def _kept_features(
    extractor: Extractor, images: Images, results: PartialResults, name: str, logits: bool = False
) -> Iterator[dict[str, np.ndarray]]:
    """The `features` of images, and their `logits` if wanted, in parts that are kept on disk."""
    progress = Progress(f"{extractor.name} features, {name}", images.count)
    folder = f"{images.digest}_{extractor.name}_{extractor.weights[:16]}"
    wanted = ("features", "logits") if logits else ("features",)

    def compute(levels: np.ndarray) -> dict[str, np.ndarray]:
        values = extractor.fn(levels)
        return {name: values[name] for name in wanted}

    start = 0
    for levels in regrouped(images.batches(), extractor.batch_size):
        label = f"{folder}/{start:08}_{len(levels)}"
        part = results.get(label, functools.partial(compute, levels))
        progress.advance(len(levels), fresh=not results.recalled)
        start += len(levels)
        yield part


def regrouped(batches: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """The same rows in batches of `size`."""
    waiting = np.zeros(0)
    for batch in batches:
        waiting = np.concatenate([waiting, batch]) if len(waiting) else batch
        while len(waiting) >= size:
            yield waiting[:size]
            waiting = waiting[size:]
    if len(waiting):
        yield waiting


def images_of(dataset: Dataset, limit: int | None = None) -> Images:
    """The images of a data set, or `limit` of them, chosen by `subset`."""
    count = len(dataset) if limit is None else min(limit, len(dataset))
    name = short_hash(fingerprint(dataset), count)

    def batches() -> Iterator[np.ndarray]:
        for batch in in_batches(dataset, 100, count):
            yield batch["image"]

    return Images(count, name, batches)


def _features_only(rows: Iterable[dict[str, np.ndarray]]) -> Iterator[np.ndarray]:
    for part in rows:
        yield part["features"]


def cache_dir(options: parts.Evaluation) -> pathlib.Path:
    """The folder where extractors and statistics are cached."""
    return pathlib.Path(options.cache_dir or environment.cache_dir())


def _reference_facts(setup: Setup, extractor: Extractor, train: Dataset) -> dict[str, Any]:
    return {
        "extractor": extractor.name,
        "weights": extractor.weights,
        "dataset": train.name,
        "fingerprint": fingerprint(train),
        "split": "train",
        "image_size": setup.shape[0],
        "num_channels": setup.shape[2],
        "num_images": min(len(train), setup.evaluation.num_reference or len(train)),
    }


def inception_statistics(
    setup: Setup, extractor: Extractor, train: Dataset, make: bool
) -> tuple[Statistics, pathlib.Path]:
    """Statistics of the training images, and the path of their file.

    Args:
      setup: of the run; if `eval.stats_path` is empty, the file lies in the cache folder.
      extractor: computes the features.
      train: the training images.
      make: whether to make a missing `eval.stats_path`; a missing file in the cache is always made.

    Raises:
      UserError: the file of `eval.stats_path` is missing, can't be read, or is of something else.
    """
    facts, options = _reference_facts(setup, extractor, train), setup.evaluation
    name = f"{train.name}_{setup.shape[0]}_{short_hash(facts)}.npz"
    path = pathlib.Path(options.stats_path or cache_dir(options) / "stats" / name)
    if hosts.on_main(path.exists):
        log.info("statistics of the training images: %s", path)
        try:
            found = hosts.on_main(lambda: vars(load_statistics(path, facts)))
            return Statistics(**found), path
        except UserError as error:
            if options.stats_path:
                raise
            log.warning("%s; computing them again", error)
    if options.stats_path and not make:
        raise UserError(f"eval.stats_path: there is no file {path}; --mode stats makes it")
    option = "eval.stats_path" if options.stats_path else "eval.cache_dir"
    hosts.on_main(lambda: make_folder(path.parent, option))
    kept = PartialResults(path.with_suffix(".parts"))
    images = images_of(train, facts["num_images"])
    rows = _features_only(_kept_features(extractor, images, kept, "training images"))
    statistics = summarize(facts, rows, images.count)
    hosts.on_main(lambda: save_statistics(statistics, path))
    hosts.on_main(lambda: kept.discard(kept.used))
    log.info("statistics of %d training images in %s", images.count, path)
    return statistics, path


def get_scorers(setup: Setup, data: Data) -> list[Scorer]:
    """The scorers that are possible: Inception if it has weights, a classifier if there are labels.

    Raises:
      UserError: a file of weights or statistics can't be read, or is of something else.
    """
    options = setup.evaluation
    scorers, folder = [], cache_dir(options)
    if options.enable_fid:
        if setup.shape[2] not in (1, 3):
            raise UserError(
                f"eval.enable_fid: Inception takes images of 1 or 3 channels, not of "
                f"{setup.shape[2]}; set --config.eval.enable_fid=False"
            )
        extractor = get_inception(options.inception_path, folder, data.train.num_levels)
        if extractor:
            statistics, path = inception_statistics(setup, extractor, data.train, make=False)
            facts = {
                "inception_weights": extractor.weights,
                "inception_is_published": extractor.weights == INCEPTION_SHA256,
                "num_reference": statistics.facts.get("num_images", statistics.count or None),
                "statistics": str(path),
            }
            scorers.append(Scorer(extractor, statistics, facts))
    if not data.train.num_classes or min(len(data.train), len(data.test)) < 4:
        log.warning("%s has no labels, or too few images: no fd_classifier", data.train.name)
        return scorers
    extractor, accuracy = get_classifier(data.train, data.test, folder)
    kept = PartialResults(folder / "features")  # for later evaluations

    def statistics_of(images: Images, name: str) -> Statistics:
        rows = _features_only(_kept_features(extractor, images, kept, name))
        return summarize({}, rows, images.count)

    reference = statistics_of(
        images_of(data.train, options.num_reference or 50_000), "training images"
    )
    test = statistics_of(images_of(data.test, 50_000), "test images")
    facts = {
        "fd_classifier_of_test_images": distances.frechet_distance_of_moments(
            reference.mean, reference.cov, test.mean, test.cov
        ),
        "num_test_images_for_scale": test.count,
        "num_reference_classifier": reference.count,
        "classifier_accuracy": accuracy,
        "classifier_weights": extractor.weights,
    }
    return [*scorers, Scorer(extractor, reference, facts)]


def score_images(scorer: Scorer, images: Images, results: PartialResults) -> dict[str, Any]:
    """All scores of images against the training images, with the extractor in their names."""
    logits = []

    def rows() -> Iterator[np.ndarray]:
        for part in _kept_features(scorer.extractor, images, results, "samples", logits=True):
            logits.append(part["logits"])
            yield part["features"]

    # Another seed than the reference's: `summarize` says why.
    real, fake = scorer.reference, summarize({}, rows(), images.count, seed=1)
    inception = scorer.extractor.name == "inception"
    suffix = "" if inception else f"_{scorer.extractor.name}"
    distance = distances.frechet_distance_of_moments(real.mean, real.cov, fake.mean, fake.cov)
    report: dict[str, Any] = {"fid" if inception else f"fd{suffix}": distance}
    if inception:
        score = distances.split_inception_score(np.concatenate(logits))
        report |= {"inception_score": score.value, "inception_score_stderr": score.stderr}
    if not inception and images.labels is not None:
        told = images.labels < logits[0].shape[-1]  # the others were drawn for no label
        if told.any():
            agree = (np.concatenate(logits).argmax(axis=-1) == images.labels)[told]
            estimate = distances.Estimate.of(agree.astype(np.float64))
            report |= {
                "label_agreement": estimate.value,
                "label_agreement_stderr": estimate.stderr,
            }
    if not inception and len(fake.features) >= 20:
        error = distances.frechet_distance_stderr(real.mean, real.cov, fake.features)
        # Only a subset's features are kept; the variance is proportional to 1/N.
        report[f"fd{suffix}_stderr"] = error * np.sqrt(len(fake.features) / fake.count)
    if len(real.features):
        kernel = distances.split_kernel_distance(real.features, fake.features)
        precision, recall = distances.precision_recall(real.features, fake.features)
        report |= {
            f"num_rows_kid{suffix}": min(len(real.features), len(fake.features)),
            f"kid{suffix}": kernel.value,
            f"kid{suffix}_stderr": kernel.stderr,
            f"precision{suffix}": precision,
            f"recall{suffix}": recall,
        }
    else:
        log.warning("these statistics have no features: KID, precision and recall are not computed")
    return report | scorer.facts
