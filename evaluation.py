"""Scores of samples: distances between features of real and generated images.

Distances take plain arrays of features, from any extractor. The extractor here is a small
classifier trained on the data set's own labels; a score that uses it carries its name, as in
`fd_classifier`, and is not an FID.
"""

import hashlib
import logging
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import serialization
from jax import Array

import datasets

log = logging.getLogger("soft_truncation")


def _sqrt_psd(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Fréchet distance of the normal distributions fitted to two sets of features.

    ‖μ_a - μ_b‖² + tr(A + B - 2 (A^½ B A^½)^½) (arXiv 1706.08500), in float64, by eigenvalues of
    symmetric matrices only, so that singular covariances are no trouble.

    Args:
      a: features (N, D), N at least 2.
      b: features (M, D).
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    cov_a, cov_b = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (a, b))
    root = _sqrt_psd(cov_a)
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(root @ cov_b @ root), 0, None)).sum()
    squared = np.sum((a.mean(0) - b.mean(0)) ** 2)
    return float(squared + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def inception_score(logits: np.ndarray) -> float:
    """exp(E KL(p(y|x) ‖ p(y))) of classifier logits (N, K) (arXiv 1606.03498), one split."""
    logits = np.asarray(logits, np.float64)
    log_p = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    p = np.exp(log_p)
    return float(np.exp(np.mean(np.sum(p * (log_p - np.log(p.mean(0))), axis=1))))


def kernel_inception_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Unbiased MMD² with the kernel (x·y/D + 1)³ (arXiv 1801.01401) on all rows.

    Args:
      a: features (N, D), N at least 2.
      b: features (M, D), M at least 2.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    kernel = lambda x, y: (x @ y.T / x.shape[1] + 1) ** 3  # noqa: E731

    def within(x: np.ndarray) -> float:
        gram = kernel(x, x)
        return (gram.sum() - np.trace(gram)) / (len(x) * (len(x) - 1))

    return float(within(a) + within(b) - 2 * kernel(a, b).mean())


def _distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    # The differences themselves: ‖a‖² + ‖b‖² - 2a·b would lose the nearest neighbours' digits.
    return np.stack([np.linalg.norm(b - row, axis=1) for row in a])


def precision_recall(real: np.ndarray, fake: np.ndarray, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (arXiv 1904.06991).

    Args:
      real: features (N, D).
      fake: features (M, D).
      k: a set's manifold is the balls around its points that reach to the k-th neighbour.

    Returns:
      (share of fakes within the real manifold, share of reals within the fake manifold).

    Raises:
      ValueError: a set has no k-th neighbour.
    """
    real, fake = np.asarray(real, np.float64), np.asarray(fake, np.float64)
    if min(len(real), len(fake)) <= k:
        raise ValueError(f"precision and recall with k={k} need more than {k} rows in each set")
    # Column k of a sorted row is the k-th neighbour; column 0 is the point itself.
    radius = lambda x: np.partition(_distances(x, x), k, axis=1)[:, k]  # noqa: E731
    across = _distances(real, fake)
    precision = np.mean((across <= radius(real)[:, None]).any(axis=0))
    recall = np.mean((across <= radius(fake)[None, :]).any(axis=1))
    return float(precision), float(recall)


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


FeatureFn = Callable[[np.ndarray], np.ndarray]  # levels (N, H, W, C) uint8 → features (N, D)


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
    for _ in range(steps):
        batch = train.source.fetch(rng.integers(len(train), size=batch_size))
        params, opt_state = step(params, opt_state, batch["image"], batch["label"])
    return params


def _batches(images: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, int]]:
    for start in range(0, len(images), size):
        part = images[start : start + size]
        padding = [(0, size - len(part))] + [(0, 0)] * (images.ndim - 1)
        yield np.pad(part, padding, mode="edge"), len(part)


def apply_batched(fn: FeatureFn, images: np.ndarray, batch_size: int) -> np.ndarray:
    """`fn` over `images` in batches of one size, the last one filled up and cut."""
    return np.concatenate(
        [np.asarray(fn(batch))[:count] for batch, count in _batches(images, batch_size)]
    )


def default_cache_dir() -> pathlib.Path:
    """The user's cache folder for this project."""
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "soft_truncation"


def get_classifier(
    train: datasets.Dataset,
    test: datasets.Dataset,
    cache_dir: str | os.PathLike[str],
    steps: int = 1000,
    batch_size: int = 128,
) -> tuple[FeatureFn, dict[str, Any]]:
    """The features of a classifier of the data set's labels, trained once and cached.

    Args:
      train, test: splits with labels; the second only measures the accuracy.
      cache_dir: where the weights are kept.
      steps, batch_size: of its training.

    Returns:
      (features of levels (N, H, W, C) uint8 → (N, 64), facts: `accuracy` on the test split and
      `weights`, a hash that names the extractor).
    """
    shape = train.source.fetch(np.arange(1))["image"].shape
    model = Classifier(train.num_classes)
    params = model.init(jax.random.key(0), jnp.zeros(shape))["params"]
    # The name tells recipes and data sets apart, the latter by a few of their images.
    probe = train.source.fetch(np.linspace(0, len(train) - 1, 64).astype(int))
    sizes = (len(train), train.num_classes, train.num_levels, shape, steps, batch_size)
    digest = hashlib.sha256(
        repr((train.name, sizes)).encode() + probe["image"].tobytes() + probe["label"].tobytes()
    )
    folder = pathlib.Path(cache_dir)
    path = folder / f"classifier_{train.name}_{digest.hexdigest()[:16]}.msgpack"
    try:
        params = serialization.from_bytes(params, path.read_bytes())
    except (OSError, ValueError, KeyError, TypeError) as error:
        if path.exists():
            log.warning("%s is damaged (%s) and is made anew", path, error)
        log.info("Training the classifier of %s for the features of fd_classifier", train.name)
        params = _train_classifier(model, params, train, steps, batch_size)
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_bytes(serialization.to_bytes(params))
        partial.replace(path)

    apply = jax.jit(lambda x: model.apply({"params": params}, _normalize(x, train.num_levels)))
    features = lambda images: apply_batched(lambda x: apply(x)[0], images, 500)  # noqa: E731
    held_out = datasets.in_order(test, 10_000)
    logits = apply_batched(lambda x: apply(x)[1], held_out["image"], 500)
    leaves = b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params))
    weights = hashlib.sha256(leaves).hexdigest()[:16]
    accuracy = float(np.mean(logits.argmax(-1) == held_out["label"]))
    return features, {"accuracy": accuracy, "weights": weights}


def compare_features(real: np.ndarray, fake: np.ndarray, name: str) -> dict[str, float]:
    """All distances of two sets of features, each under the extractor's `name`."""
    precision, recall = precision_recall(real[:10_000], fake[:10_000])
    return {
        f"fd_{name}": frechet_distance(real, fake),
        f"kid_{name}": kernel_inception_distance(real[:10_000], fake[:10_000]),
        f"precision_{name}": precision,
        f"recall_{name}": recall,
    }


def gaussian_bits_per_dim(train: np.ndarray, test: np.ndarray, offset: float) -> float:
    """Bits/dim of `test` (M, D) under the normal distribution fitted to `train` (N, D).

    Both are dequantised and scaled data; the fit is the full covariance, by maximum likelihood.
    """
    train, test = np.asarray(train, np.float64), np.asarray(test, np.float64)
    dims = train.shape[1]
    factor = np.linalg.cholesky(np.cov(train, rowvar=False, bias=True))
    white = np.linalg.solve(factor, (test - train.mean(0)).T)
    log_det = 2 * np.log(np.diag(factor)).sum()
    nats = 0.5 * (np.mean(np.sum(white**2, axis=0)) + log_det + dims * np.log(2 * np.pi))
    return float(nats / (dims * np.log(2)) + offset)
