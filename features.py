"""What maps images to features, and statistics of a data set's features.

Two extractors: the Inception-v3 that FID is defined by, whose weights are published, and a small
classifier that is trained here on the data set's own labels. Scores of the second carry its name,
as in `fd_classifier`, and are no FID.
"""

import dataclasses
import hashlib
import http.client
import json
import logging
import os
import pathlib
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import serialization
from jax import Array

import datasets
import evaluation
import hosts
import reporting
from configs.default import UserError
from models import inception
from pth_reader import read_pth
from session import gather, mesh_shardings, spread

log = logging.getLogger("soft_truncation")

INCEPTION_URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth"
)
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"

# Kernel distance, precision and recall are of at most so many images, drawn at random.
SUBSET = 10_000


@dataclasses.dataclass(frozen=True)
class Extractor:
    """Features of images.

    Attributes:
      name: `inception` or `classifier`.
      weights: the SHA-256 of its weights, which tells features of one from another's.
      fn: levels (N, H, W, C) uint8 → `features` (N, D) and `logits` (N, K), float32.
      batch_size: a number of images that it does without filling up a batch.
    """

    name: str
    weights: str
    fn: Callable[[np.ndarray], dict[str, np.ndarray]]
    batch_size: int


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Features of many images, summed up.

    Attributes:
      facts: what they are of: extractor, weights, data set, image size, number, split.
      count: of the images, 0 if that is not known.
      mean, cov: (D,), (D, D) float64.
      features: of a random subset, (n, D) float32; none: (0, D).
    """

    facts: dict[str, Any]
    count: int
    mean: np.ndarray
    cov: np.ndarray
    features: np.ndarray


def summarize(
    facts: dict[str, Any], batches: Iterable[np.ndarray], total: int, seed: int = 0
) -> Statistics:
    """The statistics of `total` rows of features that come in batches (n, D).

    Sets that are compared need seeds of their own: if rows of one place in both went together,
    and were of the same images, their kernel distance would not be unbiased.
    """
    chosen = np.zeros(total, bool)
    chosen[np.random.default_rng(seed).permutation(total)[:SUBSET]] = True
    moments, kept, start = evaluation.Moments(), [], 0
    for batch in batches:
        moments.add(batch)
        kept.append(batch[chosen[start : start + len(batch)]])
        start += len(batch)
    return Statistics(facts, moments.count, moments.mean, moments.cov, np.concatenate(kept))


def save_statistics(statistics: Statistics, path: pathlib.Path) -> None:
    """Write an .npz with `mu` and `sigma`, as pytorch-fid has them, `features` and `facts`."""
    partial = path.with_suffix(f".{os.getpid()}")
    try:
        with partial.open("wb") as file:
            np.savez(
                file,
                mu=statistics.mean,
                sigma=statistics.cov,
                features=statistics.features,
                facts=np.array(json.dumps(statistics.facts)),
            )
        partial.replace(path)
    except OSError as error:
        raise UserError(f"{path} can't be written: {error.strerror}") from error


def load_statistics(path: pathlib.Path, facts: dict[str, Any]) -> Statistics:
    """Statistics that must be of `facts`; the official *_stats.npz and pytorch-fid's load as well.

    Raises:
      UserError: the file is missing, damaged, or its statistics are of something else.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        if "pool_3" in arrays:  # the official releases keep the features themselves
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
    except Exception as error:  # a damaged archive raises anything at all
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


def _batches(images: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, int]]:
    for start in range(0, len(images), size):
        part = images[start : start + size]
        padding = [(0, size - len(part))] + [(0, 0)] * (images.ndim - 1)
        yield np.pad(part, padding, mode="edge"), len(part)


def apply_batched(
    fn: Callable[[np.ndarray], dict[str, Any]], images: np.ndarray, batch_size: int
) -> dict[str, np.ndarray]:
    """`fn` over `images` in batches of one size, the last one filled up and cut."""
    parts = [
        {name: np.asarray(x)[:count] for name, x in fn(batch).items()}
        for batch, count in _batches(images, batch_size)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _download(path: pathlib.Path) -> bool:
    """Fetch Inception's published weights; False, with a line that says why, where that fails."""
    log.info("downloading Inception's weights for FID into %s", path)
    partial = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(INCEPTION_URL, timeout=30) as source:
            data = source.read()
        if hashlib.sha256(data).hexdigest() != INCEPTION_SHA256:
            raise ValueError("what came is not the published file")
        partial.write_bytes(data)
        partial.replace(path)
    except (OSError, ValueError, http.client.HTTPException) as error:
        log.warning(
            "no FID: Inception's weights can't be downloaded (%s); get %s on another machine, and "
            "put it at %s or name it in eval.inception_path",
            *(error, INCEPTION_URL, path),
        )
        return False
    return True


def _read_inception(file: pathlib.Path, given: bool) -> tuple[Any, str] | None:
    """(parameters, SHA-256) of a file that is `given` or, if not, downloaded; None if it can't."""
    if not given and not file.exists() and not _download(file):
        return None
    weights = hashlib.sha256(file.read_bytes()).hexdigest() if file.exists() else ""
    if not given and weights != INCEPTION_SHA256:
        raise UserError(f"{file} is not the published file; delete it to download it again")
    state = read_pth(file)
    if not isinstance(state, dict):
        raise UserError(f"{file} does not hold the weights of FID's Inception, or of any network")
    try:
        params = inception.convert_state(state)
    except (KeyError, ValueError, AttributeError, TypeError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else error
        raise UserError(f"{file} does not hold the weights of FID's Inception: {reason}") from error
    if weights != INCEPTION_SHA256:
        log.warning("%s is not the published file: figures are not comparable with others'", file)
    return params, weights


def get_inception(path: str, cache_dir: pathlib.Path, num_levels: int) -> Extractor | None:
    """The Inception-v3 of FID.

    Args:
      path: its weights, a .pth file; empty: the published ones, downloaded once into `cache_dir`.
      cache_dir: the user's cache folder.
      num_levels: of the images that it will be given.

    Returns:
      The extractor; None, with a line that says what to do, if there are no weights.

    Raises:
      UserError: `path` can't be read, or is not Inception's.
    """
    file = pathlib.Path(path) if path else cache_dir / INCEPTION_URL.rsplit("/", 1)[1]
    found = hosts.on_main(lambda: _read_inception(file, bool(path)))
    if not found:
        return None
    params, weights = found
    return inception_extractor(params, weights, num_levels)


def inception_extractor(params: Any, weights: str, num_levels: int) -> Extractor:
    """An extractor by `inception.InceptionV3` with these parameters, on all devices."""
    rows, everywhere = mesh_shardings()
    params = spread(params, everywhere)
    model = inception.InceptionV3()
    apply = jax.jit(
        lambda params, images: model.apply({"params": params}, inception.prepare(images)),
        out_shardings=rows,
    )

    def network(levels: np.ndarray) -> dict[str, np.ndarray]:
        images = spread(datasets.levels_to_uint8(levels, num_levels), rows)
        values = apply(params, images)
        return {"features": gather(values["pool_3"]), "logits": gather(values["logits_unbiased"])}

    size = (16 if jax.default_backend() == "cpu" else 128) * jax.device_count()
    fn = lambda levels: apply_batched(network, levels, size)  # noqa: E731
    return Extractor("inception", weights, fn, max(size, 128))


class Classifier(nn.Module):
    """Two convolutions and two dense layers; its features are the 64 units before the logits."""

    num_classes: int

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, Array]:
        """(features (N, 64), logits (N, num_classes)) of images (N, H, W, C) in [-1, 1]."""
        for channels in (32, 64):
            x = nn.relu(nn.Conv(channels, (3, 3))(x))
            x = nn.avg_pool(x, (2, 2), strides=(2, 2))
        features = nn.relu(nn.Dense(64)(x.reshape(len(x), -1)))
        return features, nn.Dense(self.num_classes)(features)


def _normalize(levels: Array | np.ndarray, num_levels: int) -> Array:
    return jnp.asarray(levels, jnp.float32) * (2 / (num_levels - 1)) - 1


def _train_classifier(
    model: Classifier, params: Any, train: datasets.Dataset, steps: int, batch_size: int
) -> Any:
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-3, steps))

    @jax.jit
    def step(params: Any, opt_state: Any, images: Array, labels: Array) -> tuple[Any, Any]:
        def loss_fn(params: Any) -> Array:
            _, logits = model.apply({"params": params}, _normalize(images, train.num_levels))
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        updates, opt_state = optimizer.update(jax.grad(loss_fn)(params), opt_state)
        return optax.apply_updates(params, updates), opt_state

    opt_state = optimizer.init(params)
    rng = np.random.default_rng(0)
    progress = reporting.Progress(f"training {train.name}'s classifier", steps * batch_size)
    for _ in range(steps):
        progress.advance(batch_size)
        batch = train.source.fetch(rng.integers(len(train), size=batch_size))
        params, opt_state = step(params, opt_state, batch["image"], batch["label"])
    return params


def get_classifier(
    train: datasets.Dataset,
    test: datasets.Dataset,
    cache_dir: str | os.PathLike[str],
    steps: int = 1000,
    batch_size: int = 128,
) -> tuple[Extractor, float]:
    """A classifier of the data set's labels, trained once and cached.

    Args:
      train, test: splits with labels; the second only measures the accuracy.
      cache_dir: where the weights are kept.
      steps, batch_size: of its training.

    Returns:
      (the extractor, with 64 features; its accuracy on up to 10,000 images of the test split).
    """
    shape = train.source.fetch(np.arange(1))["image"].shape
    model = Classifier(train.num_classes)
    params = model.init(jax.random.key(0), jnp.zeros(shape))["params"]
    # The name tells recipes and data sets apart, the latter by a few of their images.
    sizes = (len(train), train.num_classes, train.num_levels, shape, steps, batch_size)
    digest = hashlib.sha256(repr((train.name, sizes, datasets.fingerprint(train))).encode())
    folder = pathlib.Path(cache_dir)
    path = folder / f"classifier_{train.name}_{digest.hexdigest()[:16]}.msgpack"
    try:
        params = serialization.from_bytes(params, path.read_bytes())
    except (OSError, ValueError, KeyError, TypeError) as error:
        if path.exists():
            log.warning("%s is damaged (%s) and is made anew", path, error)
        params = _train_classifier(model, params, train, steps, batch_size)
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_bytes(serialization.to_bytes(params))
        partial.replace(path)

    apply = jax.jit(lambda x: model.apply({"params": params}, _normalize(x, train.num_levels)))

    def network(levels: np.ndarray) -> dict[str, Array]:
        features, logits = apply(levels)
        return {"features": features, "logits": logits}

    leaves = b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params))
    weights = hashlib.sha256(leaves).hexdigest()
    fn = lambda levels: apply_batched(network, levels, 500)  # noqa: E731
    extractor = Extractor("classifier", weights, fn, 500)
    correct = [
        extractor.fn(batch["image"])["logits"].argmax(-1) == batch["label"]
        for batch in datasets.batches(test, 500, limit=10_000)
    ]
    return extractor, float(np.mean(np.concatenate(correct)))
