"""Scores of samples: distances between features of real and generated images.

They take arrays of features from any extractor, and compute in float64.
"""

import dataclasses

import numpy as np


class Moments:
    """Mean and covariance of rows that are added batch by batch."""

    def __init__(self) -> None:
        """Start with no rows."""
        self.count = 0
        self.mean = np.zeros(())
        self._scatter = np.zeros(())

    def add(self, rows: np.ndarray) -> None:
        """Add rows (n, D), by the pairwise update of Chan, Golub and LeVeque (1983)."""
        rows = np.asarray(rows, np.float64)
        mean, total = rows.mean(axis=0), self.count + len(rows)
        shift, centred = mean - self.mean, rows - mean
        between = np.outer(shift, shift) * (self.count * len(rows) / total)
        self._scatter = self._scatter + centred.T @ centred + between
        self.mean = self.mean + shift * (len(rows) / total)
        self.count = total

    @property
    def cov(self) -> np.ndarray:
        """The unbiased covariance (D, D); at least two rows must have been added."""
        return self._scatter / (self.count - 1)


def _sqrt_psd(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T


def frechet_distance_of_moments(
    mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray
) -> float:
    """Fréchet distance of two normal distributions, from means (D,) and covariances (D, D).

    ‖μ_a - μ_b‖² + tr(A + B - 2 (A^½ B A^½)^½) (arXiv 1706.08500). It needs the eigenvalues of
    symmetric matrices only, and so works with singular covariances too.
    """
    root = _sqrt_psd(cov_a)
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(root @ cov_b @ root), 0, None)).sum()
    squared = np.sum((mean_a - mean_b) ** 2)
    # Of equal sets it would be negative by rounding.
    return max(float(squared + np.trace(cov_a) + np.trace(cov_b) - 2 * cross), 0.0)


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Fréchet distance of the normal distributions fitted to two sets of features.

    Args:
      a: features (N, D), N at least 2.
      b: features (M, D).
    """
    moments = Moments(), Moments()
    for each, rows in zip(moments, (a, b), strict=True):
        each.add(rows)
    return frechet_distance_of_moments(*(x for m in moments for x in (m.mean, m.cov)))


def frechet_distance_stderr(
    mean: np.ndarray, cov: np.ndarray, rows: np.ndarray, groups: int = 10
) -> float:
    """Standard error of the distance of `rows` to given moments: a jackknife over groups of rows.

    It covers the random choice of `rows` only, not the distance's bias, which depends on the number
    of rows and is the same for sets of one size.

    Args:
      mean, cov: (D,), (D, D), assumed to be exact.
      rows: independent features (N, D), N at least 2 * groups.
      groups: the number of groups; each is left out once.
    """
    parts = np.array_split(rows, groups)
    values = []
    for i in range(groups):
        rest = Moments()
        for part in parts[:i] + parts[i + 1 :]:
            rest.add(part)
        values.append(frechet_distance_of_moments(mean, cov, rest.mean, rest.cov))
    return float(np.sqrt((groups - 1) * np.var(values)))


@dataclasses.dataclass(frozen=True)
class Estimate:
    """An estimated value and its standard error."""

    value: float
    stderr: float

    @classmethod
    def of(cls, values: np.ndarray) -> "Estimate":
        """The mean of independent values (N,), with its standard error; N is at least 2."""
        return cls(float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(len(values))))


def inception_score(logits: np.ndarray) -> float:
    """exp(E KL(p(y|x) ‖ p(y))) of classifier logits (N, K) (arXiv 1606.03498), one split."""
    logits = np.asarray(logits, np.float64)
    log_p = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    log_mean = np.logaddexp.reduce(log_p, axis=0) - np.log(len(log_p))
    return float(np.exp(np.mean(np.sum(np.exp(log_p) * (log_p - log_mean), axis=1))))


def _shuffled(rows: np.ndarray, seed: int = 0) -> np.ndarray:
    """Rows in a random order, since the files of a folder may be sorted by class."""
    return rows[np.random.default_rng(seed).permutation(len(rows))]


def split_inception_score(logits: np.ndarray, splits: int = 10) -> Estimate:
    """The mean Inception score over disjoint parts of logits (N, K), as papers report it."""
    parts = np.array_split(_shuffled(logits), min(splits, len(logits)))
    return Estimate.of(np.array([inception_score(part) for part in parts]))


def kernel_inception_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Unbiased MMD² with the kernel (x·y/D + 1)³ (arXiv 1801.01401) on all rows.

    Args:
      a: features (N, D), N at least 2.
      b: features (M, D), M at least 2.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x: np.ndarray) -> float:
        gram = kernel(x, x)
        return (gram.sum() - np.trace(gram)) / (len(x) * (len(x) - 1))

    return float(within(a) + within(b) - 2 * kernel(a, b).mean())


def split_kernel_distance(a: np.ndarray, b: np.ndarray, size: int = 1000) -> Estimate:
    """The mean kernel distance of (N, D) and (M, D) over ten or more disjoint subsets.

    Each subset has at most `size` rows. Disjoint subsets are independent, so the spread of their
    distances gives an unbiased standard error.
    """
    count = min(len(a), len(b))
    size = max(2, min(size, count // 10))
    a, b = _shuffled(a, 0), _shuffled(b, 1)
    starts = range(0, count - size + 1, size)
    return Estimate.of(
        np.array([kernel_inception_distance(a[i : i + size], b[i : i + size]) for i in starts])
    )


def _squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    from sklearn.metrics.pairwise import euclidean_distances  # takes a second

    squared = euclidean_distances(a, b, squared=True)
    # They are computed from scalar products: a distance below the rounding error is a zero.
    squared[squared < 1e-12 * max(np.mean(a**2), np.mean(b**2)) * a.shape[1]] = 0
    return squared


def precision_recall(real: np.ndarray, fake: np.ndarray, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (arXiv 1904.06991).

    Args:
      real: features (N, D).
      fake: features (M, D).
      k: a set's manifold is the union of the balls around its points whose radius is the distance
        to the k-th neighbour.

    Returns:
      (share of fakes within the real manifold, share of reals within the fake manifold).

    Raises:
      ValueError: a set has k rows or fewer.
    """
    real, fake = np.asarray(real, np.float64), np.asarray(fake, np.float64)
    if min(len(real), len(fake)) <= k:
        raise ValueError(f"precision and recall with k={k} need more than {k} rows in each set")
    centre = real.mean(axis=0)  # keeps distances; products lose fewer digits
    real, fake = real - centre, fake - centre

    def squared_radius(x: np.ndarray) -> np.ndarray:
        # Column k of a sorted row is the k-th neighbour; column 0 is the point itself.
        return np.concatenate(
            [np.partition(_squared_distances(rows, x), k, axis=1)[:, k] for rows in _chunks(x)]
        )

    def share_within(x: np.ndarray, others: np.ndarray) -> float:
        radius = squared_radius(others)
        within = [(_squared_distances(rows, others) <= radius).any(axis=1) for rows in _chunks(x)]
        return float(np.mean(np.concatenate(within)))

    return share_within(fake, real), share_within(real, fake)


def _chunks(rows: np.ndarray) -> list[np.ndarray]:
    """Rows in chunks of at most 2000, since all distances at once would fill the memory."""
    return np.array_split(rows, -(-len(rows) // 2000))


def gaussian_bits_per_dim(fitted: Moments, test: np.ndarray, offset: float) -> np.ndarray:
    """Bits/dim (M,) of `test` (M, D) under a Gaussian with the moments of the training data.

    Test and training data are dequantised and scaled. The Gaussian has a full covariance and is
    fitted by maximum likelihood; `offset` accounts for the scaling, in bits/dim.
    """
    cov = fitted.cov * ((fitted.count - 1) / fitted.count)
    test, dims = np.asarray(test, np.float64), len(cov)
    factor = np.linalg.cholesky(cov)
    white = np.linalg.solve(factor, (test - fitted.mean).T)
    log_det = 2 * np.log(np.diag(factor)).sum()
    nats = 0.5 * (np.sum(white**2, axis=0) + log_det + dims * np.log(2 * np.pi))
    return nats / (dims * np.log(2)) + offset
