"""Statistics of the features of many images, and the files that hold them."""

import dataclasses
import json
import logging
import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from configs.errors import UserError
from metrics.distances import Moments
from runtime.files import replacing

log = logging.getLogger("soft_truncation")

# Kernel distance, precision and recall use a random subset of at most this many images.
SUBSET = 10_000


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Statistics of the features of many images.

    Attributes:
      facts: their origin: extractor, weights, data set, split, image size, number of images.
      count: the number of images, 0 if it is not known.
      mean, cov: (D,), (D, D) float64.
      features: those of a random subset, (n, D) float32; (0, D) if they were not kept.
    """

    facts: dict[str, Any]
    count: int
    mean: np.ndarray
    cov: np.ndarray
    features: np.ndarray


def summarize(
    facts: dict[str, Any], batches: Iterable[np.ndarray], total: int, seed: int = 0
) -> Statistics:
    """The statistics of `total` rows of features, given in batches (n, D).

    Two sets that are compared need different seeds: with one seed, rows with the same index would
    be chosen in both, and if these are of the same images, the kernel distance would be biased.
    """
    chosen = np.zeros(total, bool)
    chosen[np.random.default_rng(seed).permutation(total)[:SUBSET]] = True
    moments, kept, start = Moments(), [], 0
    for batch in batches:
        moments.add(batch)
        kept.append(batch[chosen[start : start + len(batch)]])
        start += len(batch)
    return Statistics(facts, moments.count, moments.mean, moments.cov, np.concatenate(kept))


def save_statistics(statistics: Statistics, path: pathlib.Path) -> None:
    """Write an .npz file with `mu` and `sigma`, as in pytorch-fid, `features` and `facts`."""
    try:
        with replacing(path) as file:
            np.savez(
                file,
                mu=statistics.mean,
                sigma=statistics.cov,
                features=statistics.features,
                facts=np.array(json.dumps(statistics.facts)),
            )
    except OSError as error:
        raise UserError(f"{path} can't be written: {error.strerror}") from error


def load_statistics(path: pathlib.Path, facts: dict[str, Any]) -> Statistics:
    """Read statistics and check their `facts`; reads pytorch-fid's and official *_stats.npz too.

    Raises:
      UserError: the file is missing or damaged, or its facts differ.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        if "pool_3" in arrays:  # the official releases store the features
            pools = arrays["pool_3"]
            if pools.ndim != 2:
                raise ValueError(f"pool_3 is of shape {pools.shape}")
            statistics = summarize({}, [pools], len(pools))
        else:
            mean, cov = (np.asarray(arrays[name], np.float64) for name in ("mu", "sigma"))
            kept = arrays.get("features", np.zeros((0, *mean.shape), np.float32))
            recorded = json.loads(str(arrays["facts"])) if "facts" in arrays else {}
            number = recorded.get("num_images", 0) if isinstance(recorded, dict) else 0
            statistics = Statistics(recorded, number, mean, cov, kept)
        dims, rows = statistics.mean.size, statistics.features
        if statistics.mean.shape != (dims,) or statistics.cov.shape != (dims, dims):
            raise ValueError("mean and covariance do not belong together")
        if not (np.isfinite(statistics.mean).all() and np.isfinite(statistics.cov).all()):
            raise ValueError("its values are not finite")
        if rows.shape[1:] != (dims,) or 0 < len(rows) < 4 or not np.isfinite(rows).all():
            raise ValueError("its features do not belong to its mean")
        if type(statistics.facts) is not dict:
            raise ValueError("its facts are no facts")
        if dims != 2048:
            raise ValueError(f"it has {dims} features, and Inception's are 2048")
    except Exception as error:  # a damaged archive can raise any kind of error
        reason = f"it has no {error}" if isinstance(error, KeyError) else error
        raise UserError(f"{path} can't be read as statistics: {reason}") from error
    if not statistics.facts:
        log.warning("%s does not say what it is of; make sure that it is of the same images", path)
    for name, ours in facts.items() if statistics.facts else ():
        theirs = statistics.facts.get(name)
        if theirs != ours:
            raise UserError(
                f"{path} has {name} {theirs}, and here it is {ours}; name another file in "
                "eval.stats_path, or make one with --mode stats"
            )
    return statistics
