import jax
import numpy as np
import pytest

import datasets
import evaluation
from tests.helpers import GOLDEN, Gaussian, tiny_config

METRICS = np.load(GOLDEN / "metrics.npz")


def test_golden_metrics():
    a, b = METRICS["feat_a"], METRICS["feat_b"]
    np.testing.assert_allclose(evaluation.frechet_distance(a, b), METRICS["fid"], rtol=1e-6)
    score = evaluation.inception_score(METRICS["logits"])
    np.testing.assert_allclose(score, METRICS["inception_score"], rtol=1e-6)
    kid = evaluation.kernel_inception_distance(a[:500], b[:500])
    np.testing.assert_allclose(kid, METRICS["kid_first500"], rtol=1e-6)
    # torch-fidelity, which made the golden values, takes its first set for the generated one.
    precision, recall = evaluation.precision_recall(real=b, fake=a)
    np.testing.assert_allclose(
        [precision, recall], [METRICS["precision"], METRICS["recall"]], rtol=1e-6
    )


def test_frechet_distance_of_singular_covariances():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((50, 80)), rng.standard_normal((40, 80)) + 1
    a[:, 60:] = b[:, 60:] = 0  # fewer rows than columns, and columns that are constant
    value = evaluation.frechet_distance(a, b)
    assert np.isfinite(value) and value > np.sum((a.mean(0) - b.mean(0)) ** 2)
    np.testing.assert_allclose(evaluation.frechet_distance(a, a), 0, atol=1e-5)
    # Shifting a set moves it by the shift's square.
    np.testing.assert_allclose(evaluation.frechet_distance(a, a + 2), 4 * 80, rtol=1e-6)


def test_kid_is_unbiased():
    rng = np.random.default_rng(1)
    draw = lambda: rng.standard_normal((30, 8))  # noqa: E731
    values = [evaluation.kernel_inception_distance(draw(), draw()) for _ in range(300)]
    assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(300)


def test_precision_and_recall_see_missing_modes():
    rng = np.random.default_rng(2)
    real = rng.standard_normal((400, 2)) + np.repeat([[0, 0], [50, 0]], 200, axis=0)
    precision, recall = evaluation.precision_recall(real, rng.standard_normal((200, 2)))
    assert precision > 0.9 and 0.4 < recall <= 0.55
    with pytest.raises(ValueError, match="more than 3 rows"):
        evaluation.precision_recall(real, real[:3])


def test_classifier_is_trained_once_and_tells_classes_apart(tmp_path, monkeypatch):
    train, test = (datasets.get_dataset(tiny_config(), split) for split in ("train", "test"))
    features, facts = evaluation.get_classifier(train, test, tmp_path, steps=200)
    assert facts["accuracy"] > 0.8
    files = list(tmp_path.iterdir())
    assert len(files) == 1

    def fail(*_):
        raise AssertionError("trained again")

    monkeypatch.setattr(evaluation, "_train_classifier", fail)
    again, same = evaluation.get_classifier(train, test, tmp_path, steps=200)
    assert same == facts
    images = datasets.in_order(test)["image"]
    np.testing.assert_array_equal(features(images), again(images))
    monkeypatch.undo()

    files[0].write_bytes(files[0].read_bytes()[:100])  # damage: made anew
    _, mended = evaluation.get_classifier(train, test, tmp_path, steps=200)
    assert mended == facts


def test_gaussian_baseline_is_the_fitted_density():
    data = Gaussian((2, 2, 1), [0.02, 0.1, 0.3, 0.6], 0.2)
    train, test = (
        np.asarray(data.sample(n, seed)).reshape(n, 4) for n, seed in ((50_000, 1), (500, 2))
    )
    bits = evaluation.gaussian_bits_per_dim(train, test, 7)
    np.testing.assert_allclose(bits, data.nats(test).mean() / (4 * np.log(2)) + 7, atol=2e-3)


def test_batches_of_one_size_cover_everything():
    images = np.arange(7 * 2).reshape(7, 2, 1, 1)
    sizes = []

    def features(batch):
        sizes.append(len(batch))
        return jax.numpy.asarray(batch.reshape(len(batch), -1))

    np.testing.assert_array_equal(
        evaluation.apply_batched(features, images, 3), images.reshape(7, 2)
    )
    assert sizes == [3, 3, 3]
