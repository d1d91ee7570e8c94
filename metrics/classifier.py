"""A small classifier that is trained on a data set's own labels.

Scores on its features have its name in theirs, as `fd_classifier`; they are not FID.
"""

import hashlib
import logging
import os
import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import serialization
from jax import Array

from data import pixels
from data.batches import Dataset, fingerprint, in_batches
from metrics.features import Extractor, apply_batched
from runtime.checksums import checksums, compare
from runtime.files import replacing
from runtime.locking import waiting_lock
from runtime.progress import Progress
from runtime.workdir import first_line

log = logging.getLogger("soft_truncation")


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
    return jnp.asarray(levels, jnp.float32) * (2 / pixels.highest(num_levels)) - 1


def _train_classifier(
    model: Classifier, params: Any, train: Dataset, steps: int, batch_size: int
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
    progress = Progress(f"training {train.name}'s classifier", steps * batch_size, compiles=True)
    for _ in range(steps):
        progress.advance(batch_size)
        batch = train.source.fetch(rng.integers(len(train), size=batch_size))
        params, opt_state = step(params, opt_state, batch["image"], batch["label"])
    return params


def _read_classifier(path: pathlib.Path, shape: Any) -> Any:
    """The parameters in a file of the cache; None if it is not there, or damaged."""
    try:
        whole = serialization.msgpack_restore(path.read_bytes())
        # Files of before have the parameters alone.
        params = serialization.from_state_dict(shape, whole.get("params", whole))
        compare(whole.get("checksums", {}), params)
        return params
    except FileNotFoundError:
        return None
    except Exception as error:  # a damaged file can raise any kind of error
        log.warning("%s is damaged (%s); training the classifier again", path, first_line(error))
        return None


def get_classifier(
    train: Dataset,
    test: Dataset,
    cache_dir: str | os.PathLike[str],
    steps: int = 1000,
    batch_size: int = 128,
) -> tuple[Extractor, float]:
    """A classifier of the data set's labels, trained once and cached.

    Args:
      train, test: splits with labels; the second only measures the accuracy.
      cache_dir: the folder where the weights are kept.
      steps, batch_size: of the classifier's training.

    Returns:
      (the extractor of 64 features, the accuracy on up to 10,000 images of the test split).
    """
    shape = train.source.fetch(np.arange(1))["image"].shape
    model = Classifier(train.num_classes)
    params = model.init(jax.random.key(0), jnp.zeros(shape))["params"]
    # The file name contains a hash of the training settings and of a few images.
    sizes = (len(train), train.num_classes, train.num_levels, shape, steps, batch_size)
    digest = hashlib.sha256(repr((train.name, sizes, fingerprint(train))).encode())
    folder = pathlib.Path(cache_dir)
    path = folder / f"classifier_{train.name}_{digest.hexdigest()[:16]}.msgpack"
    folder.mkdir(parents=True, exist_ok=True)
    # Runs that start at once share one classifier: scores by different ones don't compare.
    with waiting_lock(path.with_suffix(".lock"), f"another process trains {path.name}"):
        kept = _read_classifier(path, params)
        if kept is None:
            trained = _train_classifier(model, params, train, steps, batch_size)
            kept = jax.tree.map(np.asarray, trained)
            whole = {"params": kept, "checksums": checksums(kept)}
            with replacing(path) as file:
                file.write(serialization.msgpack_serialize(whole))
        params = kept

    apply = jax.jit(lambda x: model.apply({"params": params}, _normalize(x, train.num_levels)))

    def network(levels: np.ndarray) -> dict[str, Array]:
        features, logits = apply(levels)
        return {"features": features, "logits": logits}

    leaves = b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params))
    weights = hashlib.sha256(leaves).hexdigest()

    def fn(levels: Any) -> Any:
        return apply_batched(network, levels, 500)

    extractor = Extractor("classifier", weights, fn, 500)
    correct = [
        extractor.fn(batch["image"])["logits"].argmax(-1) == batch["label"]
        for batch in in_batches(test, 500, limit=10_000)
    ]
    return extractor, float(np.mean(np.concatenate(correct)))
