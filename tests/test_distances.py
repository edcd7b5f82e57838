"""Tests each distance between sets of images against another library, or against the definition written out."""

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from torchmetrics.image.fid import FrechetInceptionDistance

from sprite_diffusion.metrics import distances
from sprite_diffusion.metrics.distances import (
    cmmd,
    frechet_distance,
    interval_of_distance,
    interval_of_mean,
    interval_of_median,
    interval_of_ratio,
    kernel_distance,
    manifold_values,
    median,
)


@pytest.fixture(params=[(60, 5), (20, 40)], ids=["more images than features", "fewer"])
def feature_sets(request):
    num_images, num_features = request.param
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(num_features, num_features))
    real = rng.normal(size=(num_images, num_features)) @ mixing + 1
    generated = rng.normal(size=(num_images + 7, num_features)) @ (mixing + 0.3)
    return torch.from_numpy(real).float(), torch.from_numpy(generated).float()


def with_moments(mean: np.ndarray, covariance: np.ndarray, num_images: int = 50) -> torch.Tensor:
    """Returns features with exactly this sample mean and covariance."""
    noise = np.random.default_rng(len(mean)).normal(size=(num_images, len(mean)))
    noise -= noise.mean(0)
    white = noise @ np.linalg.inv(np.linalg.cholesky(np.cov(noise.T))).T
    return torch.from_numpy(white @ np.linalg.cholesky(covariance).T + mean)


def test_frechet_distance_of_normal_distributions_with_a_closed_form():
    # Diagonal covariances: |m1 - m2|^2 + sum of (s1 - s2)^2
    one = with_moments(np.array([1.0, -2, 0.5]), np.diag([1.0, 4, 9]))
    other = with_moments(np.array([0.0, 1, 0.5]), np.diag([4.0, 1, 0.25]))
    assert frechet_distance(one, other) == pytest.approx(1 + 9 + 0 + 1 + 1 + 2.5**2, rel=1e-12)
    # Covariances that don't commute, two by two: tr (AB)^(1/2) = sqrt(tr AB + 2 sqrt(det AB))
    a, b = np.array([[2.0, 0.5], [0.5, 1]]), np.array([[1.0, -0.7], [-0.7, 3]])
    shared = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a @ b)))
    expected = np.trace(a + b) - 2 * shared
    assert frechet_distance(with_moments(np.zeros(2), a), with_moments(np.zeros(2), b)) == pytest.approx(expected)


def test_frechet_distance_is_that_of_scipy_and_torchmetrics(feature_sets):
    real, generated = (features.double().numpy() for features in feature_sets)
    covariances = np.cov(real.T), np.cov(generated.T)
    scale = sum(np.trace(covariance) for covariance in covariances)
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    expected = np.square(real.mean(0) - generated.mean(0)).sum() + scale - 2 * np.trace(root)
    # In each dimension an eigenvalue of 0 may come out as the rounding error, 2^-52, and its square root as 2^-26.
    tolerance = 2 * scale * real.shape[1] * 2**-26
    assert frechet_distance(*feature_sets) == pytest.approx(expected, abs=tolerance)

    class AsTheyAre(torch.nn.Module):
        num_features = real.shape[1]

        def forward(self, features):
            return features

    metric = FrechetInceptionDistance(feature=AsTheyAre()).set_dtype(torch.float64)
    metric.update(feature_sets[0].double(), real=True)
    metric.update(feature_sets[1].double(), real=False)
    assert frechet_distance(*feature_sets) == pytest.approx(metric.compute().item(), abs=tolerance)


def test_frechet_distance_of_a_set_to_itself_is_0(feature_sets):
    for features in feature_sets:
        assert 0 <= frechet_distance(features * 10, features * 10) < 1e-6
        assert 0 <= frechet_distance(features, features.flip(0)) < 1e-6  # the order does not matter


def test_kernel_distance_is_its_definition(feature_sets):
    real, generated = (features.double().numpy() for features in feature_sets)
    kernel = lambda a, b: (a @ b / len(a) + 1) ** 3  # noqa: E731
    unlike = lambda x: np.mean([kernel(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j])  # noqa: E731
    between = np.mean([kernel(a, b) for a in real for b in generated[: len(real)]])
    expected = unlike(real) + unlike(generated[: len(real)]) - 2 * between
    assert kernel_distance(feature_sets[0], feature_sets[1][: len(real)]) == pytest.approx(expected, rel=1e-9)


def test_kernel_distance_of_large_sets_is_the_mean_over_blocks(feature_sets, monkeypatch):
    real, generated = (features[:20] for features in feature_sets)
    halves = [kernel_distance(real[rows], generated[rows]) for rows in (slice(0, 10), slice(10, 20))]
    whole = kernel_distance(real, generated)
    monkeypatch.setattr(distances, "BLOCK_SIZE", 10)
    assert kernel_distance(real, generated) == pytest.approx(np.mean(halves), rel=1e-9)
    assert whole != pytest.approx(np.mean(halves), rel=1e-3)


def test_cmmd_is_its_definition():
    rng = np.random.default_rng(0)
    real, generated = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in rng.normal(size=(2, 12, 6)))
    kernel = lambda x, y: np.mean([np.exp(-np.square(a - b).sum() / 200) for a in x for b in y])  # noqa: E731
    expected = 1000 * (kernel(real, real) + kernel(generated, generated) - 2 * kernel(real, generated))
    assert cmmd(torch.from_numpy(real), torch.from_numpy(generated)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("at_once", [10_000_000, 70])
def test_precision_recall_density_and_coverage_are_their_definitions(feature_sets, monkeypatch, at_once):
    monkeypatch.setattr(distances, "DISTANCES_AT_ONCE", at_once)  # 70 makes blocks of about a row
    real, generated = (features.double().numpy() for features in feature_sets)

    def distance(a, b):
        return np.sqrt(np.square(a - b).sum())

    def radius(x, i, k):
        return sorted(distance(x[i], x[j]) for j in range(len(x)) if j != i)[k - 1]

    def in_balls(x, y, k):
        """Returns for each x the number of balls around y that it is in."""
        radii = [radius(y, j, k) for j in range(len(y))]
        return np.array([sum(distance(a, b) <= r for b, r in zip(y, radii, strict=True)) for a in x])

    nearest = [min(distance(r, g) for g in generated) for r in real]
    expected = {
        "precision": (in_balls(generated, real, 3) > 0).mean(),
        "recall": (in_balls(real, generated, 3) > 0).mean(),
        "density": (in_balls(generated, real, 5) / 5).mean(),
        "coverage": np.mean([d <= radius(real, i, 5) for i, d in enumerate(nearest)]),
    }
    values = manifold_values(*(features.double() for features in feature_sets))
    assert {name: value.mean().item() for name, value in values.items()} == pytest.approx(expected, rel=1e-12)
    assert len(set(expected.values())) > 2  # not all 0 or 1


def test_the_interval_of_a_mean():
    share = torch.cat([torch.ones(120), torch.zeros(280)])
    low, high = interval_of_mean(share)
    error = 1.96 * (0.3 * 0.7 / 400) ** 0.5
    # A percentile of 1,000 resamples is itself uncertain: by 0.11 of the standard deviation, times 4.
    assert low == pytest.approx(0.3 - error, abs=0.11 * 4 * error / 1.96)
    assert high == pytest.approx(0.3 + error, abs=0.11 * 4 * error / 1.96)


def test_the_interval_of_a_ratio():
    """SciPy's bootstrap of pairs resamples others, as many: the ends lie within a tenth of the width."""
    rng = np.random.default_rng(0)
    wholes = rng.integers(1, 12, 300)
    parts = rng.binomial(wholes, np.where(wholes > 6, 0.6, 0.9))
    ratio = lambda parts, wholes, axis=-1: parts.sum(axis) / wholes.sum(axis)  # noqa: E731
    expected = scipy.stats.bootstrap((parts, wholes), ratio, paired=True, method="percentile", rng=1)
    interval = expected.confidence_interval
    found = interval_of_ratio(torch.from_numpy(parts), torch.from_numpy(wholes))
    np.testing.assert_allclose(found, interval, atol=(interval.high - interval.low) / 10)
    # The mean of each image's share is another figure, as images with much in them have less of it here.
    assert found[1] < (parts / wholes).mean()


def test_the_interval_of_a_median():
    values = torch.randn(401, generator=torch.Generator().manual_seed(0))
    low, high = interval_of_median(values)
    error = 1.96 * 1.2533 / 401**0.5  # of the median of normal numbers, sqrt(pi / 2) times that of their mean
    assert low < float(values.median()) < high
    assert (high - low) / 2 == pytest.approx(error, rel=0.4)
    assert median(torch.tensor([4.0, 1, 3, 2])) == 2.5


def test_the_interval_of_a_distance():
    generator = torch.Generator().manual_seed(0)
    real, generated = torch.randn(2, 400, 1, generator=generator)

    def distance_of_means(real, generated):
        return float(generated.mean() - real.mean())

    low, high = interval_of_distance(distance_of_means, real, generated)
    assert (low + high) / 2 == pytest.approx(distance_of_means(real, generated))
    # A standard deviation of 50 resamples is uncertain by 1 / sqrt(2 * 49) = 10%, times 4.
    assert (high - low) / 2 == pytest.approx(1.96 * float(generated.std()) / 20, rel=0.4)
