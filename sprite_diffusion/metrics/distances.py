"""Distances between two sets of images, by their features: each function takes features (N, D), a row per image."""

from collections.abc import Callable, Iterator

import torch

NEIGHBOURS_OF_PRECISION = 3  # k of Kynkäänniemi et al. 2019
NEIGHBOURS_OF_DENSITY = 5  # k of Naeem et al. 2020
BLOCK_SIZE = 2500  # images of each set whose kernel is in memory at a time
DISTANCES_AT_ONCE = 10_000_000  # pairs of images whose distances are in memory at a time
CMMD_BANDWIDTH = 10.0  # sigma and scale of Jayasumana et al. 2024
CMMD_SCALE = 1000.0
RESAMPLES_OF_DISTANCES = 50
RESAMPLES_OF_MEANS = 1000

Interval = tuple[float, float]
Distance = Callable[[torch.Tensor, torch.Tensor], float]  # of real and generated features (N, D)


def frechet_distance(real: torch.Tensor, generated: torch.Tensor) -> float:
    """Returns the squared Fréchet distance between the normal distributions that fit two sets, in float64.

    Equation 6 of Heusel et al. 2017; the distance of Inception's features is the FID. With centred features A and B,
    the trace of (A'A B'B)^(1/2) is the sum of the singular values of A B'. The usual way, the square roots of the
    eigenvalues of a product of covariances, loses half of the digits: for fewer images than features it gives a set a
    distance of -1e-6 to itself.
    """
    real, generated = real.double(), generated.double()
    deviations = [_factor_covariance(features) for features in (real, generated)]  # each R with covariance R'R
    total_variance = sum(float(factor.square().sum()) for factor in deviations)
    shared = torch.linalg.svdvals(deviations[0] @ deviations[1].T).sum()
    squared = float((real.mean(0) - generated.mean(0)).square().sum() + total_variance - 2 * shared)
    return max(squared, 0.0)  # rounding may leave -1e-14


def kernel_distance(real: torch.Tensor, generated: torch.Tensor) -> float:
    """Returns the KID of Binkowski et al. 2018: the unbiased squared MMD with a cubic kernel, in float64.

    It is 0 on average for sets of the same distribution, and may be negative. Large sets are cut into blocks, whose
    mean is unbiased as well, so that memory does not grow with the square of the number of images.
    """
    from torchmetrics.image.kid import poly_mmd  # here, as it takes a second, which a training need not wait for

    num_blocks = -(-min(len(real), len(generated)) // BLOCK_SIZE)
    blocks = zip(real.double().tensor_split(num_blocks), generated.double().tensor_split(num_blocks), strict=True)
    return float(torch.stack([poly_mmd(a, b) for a, b in blocks]).mean())


def cmmd(real: torch.Tensor, generated: torch.Tensor) -> float:
    """Returns the CMMD of Jayasumana et al. 2024: 1000 times the squared MMD of CLIP's embeddings, Gaussian kernel."""
    pairs = ((real, real), (generated, generated), (real, generated))
    within_real, within_generated, between = (_mean_gaussian_kernel(a.double(), b.double()) for a, b in pairs)
    return CMMD_SCALE * (within_real + within_generated - 2 * between)


def manifold_values(real: torch.Tensor, generated: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns for each image what it contributes to precision, recall, density and coverage, which are the means.

    Around each image of a set is a ball that reaches to its k-th neighbour in the set. Precision (of generated images)
    and recall (of real ones), Kynkäänniemi et al. 2019, count the images that are in a ball of the other set. Density
    (of generated images), Naeem et al. 2020, is the number of real balls that an image is in, divided by k; it may
    exceed 1. Coverage (of real images), also theirs, counts the balls that a generated image is in.

    Returns:
        Values (N_generated,) of "precision" and "density", and (N_real,) of "recall" and "coverage", in float64.
    """
    real_radius, real_wide_radius = _neighbour_distances(real)
    generated_radius, _ = _neighbour_distances(generated)
    precision, density = [], []
    recall = torch.zeros(len(real), dtype=torch.bool)
    coverage = torch.zeros(len(real), dtype=torch.bool)
    for rows, distances in _distance_blocks(generated, real):  # (block, N_real)
        precision.append((distances <= real_radius).any(dim=1))
        density.append((distances <= real_wide_radius).sum(dim=1).double() / NEIGHBOURS_OF_DENSITY)
        recall |= (distances <= generated_radius[rows, None]).any(dim=0)
        coverage |= (distances <= real_wide_radius).any(dim=0)
    return {
        "precision": torch.cat(precision).double(),
        "recall": recall.double(),
        "density": torch.cat(density),
        "coverage": coverage.double(),
    }


def interval_of_mean(values: torch.Tensor) -> Interval:
    """Returns the 95% bootstrap interval of the mean of values (N,): percentiles over resampled images."""
    return _interval(values, torch.mean)


def interval_of_median(values: torch.Tensor) -> Interval:
    """Returns the interval of `interval_of_mean` for the median."""
    return _interval(values, median)


def interval_of_ratio(parts: torch.Tensor, wholes: torch.Tensor) -> Interval:
    """Returns the interval of `interval_of_mean` for the sum of parts (N,) by that of wholes (N,), in pairs."""
    return _interval(torch.stack([parts, wholes], dim=1).double(), lambda pairs: pairs[:, 0].sum() / pairs[:, 1].sum())


def median(values: torch.Tensor) -> torch.Tensor:
    """Returns the median of values (N,); between two of them, their mean, where torch's own is the lower one."""
    return values.quantile(0.5)


def _interval(values: torch.Tensor, statistic: Callable[[torch.Tensor], torch.Tensor]) -> Interval:
    """Returns the 95% bootstrap interval of a statistic of values (N, ...): percentiles over resampled images."""
    generator = torch.Generator().manual_seed(0)
    resampled = [
        statistic(values[torch.randint(len(values), (len(values),), generator=generator)])
        for _ in range(RESAMPLES_OF_MEANS)
    ]
    low, high = torch.stack(resampled).double().quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def interval_of_distance(distance: Distance, real: torch.Tensor, generated: torch.Tensor) -> Interval:
    """Returns the 95% bootstrap interval of a distance between sets, over resampled generated images.

    It reaches 1.96 standard errors to each side of the distance. Percentiles would not do: repeated images make every
    distance to a resampled set larger.
    """
    generator = torch.Generator().manual_seed(0)
    resampled = [
        distance(real, generated[torch.randint(len(generated), (len(generated),), generator=generator)])
        for _ in range(RESAMPLES_OF_DISTANCES)
    ]
    value, error = distance(real, generated), float(torch.tensor(resampled, dtype=torch.float64).std())
    return value - 1.96 * error, value + 1.96 * error


def _factor_covariance(features: torch.Tensor) -> torch.Tensor:
    """Returns R (min(N, D), D) such that R'R is the covariance of features (N, D)."""
    centred = features - features.mean(0)
    return torch.linalg.qr(centred, mode="r").R / (len(features) - 1) ** 0.5


def _mean_gaussian_kernel(a: torch.Tensor, b: torch.Tensor) -> float:
    """Returns the mean of exp(-|x - y|^2 / (2 sigma^2)) over all rows x of `a` and y of `b`."""
    sums = [(-distances.square() / (2 * CMMD_BANDWIDTH**2)).exp().sum() for _, distances in _distance_blocks(a, b)]
    return float(torch.stack(sums).sum()) / (len(a) * len(b))


def _neighbour_distances(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the distances (N,) of each image to its neighbours of the ranks that precision and density use."""
    farthest = max(NEIGHBOURS_OF_PRECISION, NEIGHBOURS_OF_DENSITY)
    nearest = torch.cat(  # the first neighbour of an image is the image, at 0
        [distances.topk(farthest + 1, largest=False).values for _, distances in _distance_blocks(features, features)]
    )
    return nearest[:, NEIGHBOURS_OF_PRECISION], nearest[:, NEIGHBOURS_OF_DENSITY]


def _distance_blocks(a: torch.Tensor, b: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yields some rows of `a` and their Euclidean distances (rows, N_b) to all of `b`, until no row is left.

    The faster way, by a matrix product, would cancel most digits of a small distance.
    """
    block_size = max(1, DISTANCES_AT_ONCE // len(b))
    for start in range(0, len(a), block_size):
        rows = slice(start, start + block_size)
        yield rows, torch.cdist(a[rows], b, compute_mode="donot_use_mm_for_euclid_dist")
