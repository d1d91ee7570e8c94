import numpy as np
import pytest
import scipy.stats

from metrics import distances
from tests.helpers import GOLDEN, Gaussian

METRICS = np.load(GOLDEN / "metrics.npz")


def test_golden_metrics():
    a, b = METRICS["feat_a"], METRICS["feat_b"]
    np.testing.assert_allclose(distances.frechet_distance(a, b), METRICS["fid"], rtol=1e-6)
    score = distances.inception_score(METRICS["logits"])
    np.testing.assert_allclose(score, METRICS["inception_score"], rtol=1e-6)
    kid = distances.kernel_inception_distance(a[:500], b[:500])
    np.testing.assert_allclose(kid, METRICS["kid_first500"], rtol=1e-6)
    # torch-fidelity, which made the golden values, takes its first set for the generated one.
    precision, recall = distances.precision_recall(real=b, fake=a)
    np.testing.assert_allclose(
        [precision, recall], [METRICS["precision"], METRICS["recall"]], rtol=1e-6
    )


def test_frechet_distance_of_singular_covariances():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((50, 80)), rng.standard_normal((40, 80)) + 1
    a[:, 60:] = b[:, 60:] = 0  # fewer rows than columns, and columns that are constant
    value = distances.frechet_distance(a, b)
    assert np.isfinite(value) and value > np.sum((a.mean(0) - b.mean(0)) ** 2)
    np.testing.assert_allclose(distances.frechet_distance(a, a), 0, atol=1e-5)
    # Shifting a set moves it by the shift's square.
    np.testing.assert_allclose(distances.frechet_distance(a, a + 2), 4 * 80, rtol=1e-6)


def test_moments_of_batches_are_those_of_the_whole():
    # Far from zero, where sums of squares would lose everything.
    rows = 1e6 + np.random.default_rng(0).standard_normal((1000, 5)) * [1, 2, 3, 4, 0]
    moments = distances.Moments()
    for batch in np.split(rows, [1, 10, 400]):
        moments.add(batch.astype(np.float64))
    np.testing.assert_allclose(moments.mean, rows.mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(moments.cov, np.cov(rows, rowvar=False), rtol=1e-8, atol=1e-12)


def test_standard_errors_over_splits_are_honest():
    # What they say is how much the figures differ from one set of samples to another.
    rng = np.random.default_rng(1)

    def scores():
        logits = 2 * rng.standard_normal((500, 10))
        a, b = rng.standard_normal((300, 8)), rng.standard_normal((300, 8)) + 0.3
        return distances.split_inception_score(logits), distances.split_kernel_distance(a, b)

    drawn = list(zip(*(scores() for _ in range(200)), strict=True))
    for estimates in drawn:
        values = np.array([e.value for e in estimates])
        said = np.sqrt(np.mean([e.stderr**2 for e in estimates]))
        np.testing.assert_allclose(said, values.std(), rtol=0.25)


def test_frechet_distance_stderr_is_honest():
    """It is about the scatter of distances of many sets."""
    rng, scale = np.random.default_rng(0), np.linspace(0.5, 2, 8)

    def draw():
        return 0.3 + scale * rng.standard_normal((400, 8))

    sets = [draw() for _ in range(150)]
    mean, cov = np.zeros(8), np.eye(8)
    scattered = [
        distances.frechet_distance_of_moments(mean, cov, rows.mean(0), np.cov(rows.T))
        for rows in sets
    ]
    errors = [distances.frechet_distance_stderr(mean, cov, rows) for rows in sets]
    assert 0.85 < np.sqrt(np.mean(np.square(errors))) / np.std(scattered) < 1.15


def test_the_order_of_samples_does_not_matter():
    # Files of a folder may be sorted by class: each split must still see all classes.
    logits = 10 * np.eye(10)[np.repeat(np.arange(10), 50)]
    assert distances.split_inception_score(logits).value > 8
    few = distances.split_inception_score(logits[::100])
    assert np.isfinite([few.value, few.stderr]).all()


def test_a_set_is_at_no_kernel_distance_from_itself():
    # Unless the same rows meet in the same subset.
    rows = np.random.default_rng(0).standard_normal((2000, 64))
    estimate = distances.split_kernel_distance(rows, rows)
    assert abs(estimate.value) < 4 * estimate.stderr


def test_a_class_that_no_sample_can_be_of_leaves_the_score_finite():
    logits = np.zeros((100, 5))
    logits[:, 0] = -2000
    np.testing.assert_allclose(distances.inception_score(logits), 1)


def test_kid_is_unbiased():
    rng = np.random.default_rng(1)

    def draw():
        return rng.standard_normal((30, 8))

    values = [distances.kernel_inception_distance(draw(), draw()) for _ in range(300)]
    assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(300)


def test_precision_and_recall_see_missing_modes():
    rng = np.random.default_rng(2)
    real = rng.standard_normal((400, 2)) + np.repeat([[0, 0], [50, 0]], 200, axis=0)
    precision, recall = distances.precision_recall(real, rng.standard_normal((200, 2)))
    assert precision > 0.9 and 0.4 < recall <= 0.55
    # Copies of a point that occurs five times lie on its manifold, of radius 0.
    same, other = np.full((5, 2), 0.1), rng.standard_normal((5, 2)) + 10
    assert distances.precision_recall(same, same) == (1, 1)
    assert distances.precision_recall(same, other) == (0, 0)
    with pytest.raises(ValueError, match="more than 3 rows"):
        distances.precision_recall(real, real[:3])


def test_gaussian_baseline_is_the_fitted_density():
    data = Gaussian((2, 2, 1), [0.02, 0.1, 0.3, 0.6], 0.2)
    train, test = (
        np.asarray(data.sample(n, seed)).reshape(n, 4) for n, seed in ((50_000, 1), (500, 2))
    )
    fitted = distances.Moments()
    for rows in np.array_split(train, 3):
        fitted.add(rows)
    bits = distances.gaussian_bits_per_dim(fitted, test, 7)
    np.testing.assert_allclose(bits, data.nats(test) / (4 * np.log(2)) + 7, atol=0.1)
    np.testing.assert_allclose(bits.mean(), data.nats(test).mean() / (4 * np.log(2)) + 7, atol=2e-3)


def test_the_gaussian_baseline_is_fitted_by_maximum_likelihood():
    # Of four rows the difference from the unbiased variance shows: it has 4/3 of it.
    rows, fitted = np.array([[0.0], [2.0], [4.0], [10.0]]), distances.Moments()
    fitted.add(rows)
    bits = distances.gaussian_bits_per_dim(fitted, rows, 0)
    np.testing.assert_allclose(bits, -scipy.stats.norm.logpdf(rows, 4, 14**0.5)[:, 0] / np.log(2))


def test_the_frechet_distance_of_a_set_to_itself_is_not_negative():
    for seed in range(5):
        rows = np.random.default_rng(seed).standard_normal((20, 64)) * 100  # of low rank
        assert 0 <= distances.frechet_distance(rows, rows) < 1e-2
