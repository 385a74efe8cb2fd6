"""How near a set of images is to real ones, in the space of some features.

Letters: M real images, N others, F features. All but the kernel distance depend on how many images there are: compare
numbers of equal M, N and features only.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from unicfg.evaluation.features import checked_features, require_extra
from unicfg.evaluation.results import Estimate
from unicfg.evaluation.uncertainty import jackknife, leave_out, require

LEAST = 50  # images a side
LEAST_FD = 128  # twice the axes: variances along them are mostly noise below
HALVES = 100
GROUPS = 10
AXES = 64
CHUNK = 2**22  # distances held at a time


def kid(real: Tensor, fake: Tensor) -> Estimate:
    """Kernel distance (KID): squared MMD with the kernel (x . y / F + 1)^3, an unbiased estimate that can be negative.

    Bińkowski et al. 2018, arXiv 1801.01401, section 4, by torchmetrics: the mean over 100 random halves, drawn without
    replacement, of which the estimate from all images is the expectation (100 of them add a tenth of the error).
    The spread of halves is the error of the whole (Shao and Wu 1989, delete-d jackknife with d = n / 2). It is right
    for sets that differ, and 1.7 times too large where both are drawn from the same distribution, because there the
    estimate has no linear part; and up to as much where M and N are far from equal, because both halves are of the
    smaller set's size.

    Args:
        real: features (M, F).
        fake: features (N, F).

    Returns:
        the distance itself; tables often show 1000 times of it. Always the same for the same features.

    Raises:
        ImportError: if torchmetrics is not installed; names the extra.
        TooFew: if one has less than 50 images.
        ValueError: if the features do not fit together, or are not finite.
    """
    real, fake = _checked("kid", real, fake, LEAST)
    half = min(len(real), len(fake)) // 2
    module = require_extra("torchmetrics.image.kid")
    with warnings.catch_warnings():
        # that it keeps all features, which are here already
        warnings.filterwarnings("ignore", "Metric `Kernel Inception Distance`", UserWarning)
        metric = module.KernelInceptionDistance(
            nn.Identity(), subsets=HALVES, subset_size=half, sync_on_compute=False
        )
    metric.update(real, real=True)
    metric.update(fake, real=False)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        value, spread = metric.compute()
    return Estimate(float(value), float(spread), len(fake))


def fd(real: Tensor, fake: Tensor) -> Estimate:
    """Fréchet distance of two Gaussians on the first 64 principal axes of the real set (on all, if F is less).

    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), Heusel et al. 2017, arXiv 1706.08500, eq. 6, by torchmetrics. It
    is biased upwards, about as 1 / N, and what lies outside of the axes is not seen. Of two sets from one Gaussian with
    equal variances v along K axes about v (K^2 / 2 + 5 K / 2) / N is bias; for K = 64 that is 13, 7, 3 % of the total
    variance 2 K v of both at N = 128, 256, 512. Two sets of real
    shapes scenes, in the features ``lite0(64)``, are 206 apart at 128 and 96 at 256; one of them blurred, 284 at 256.

    The error is a jackknife over 10 groups with the axes as they are. Like that of :func:`kid` it is too large, up to
    3 times, where both sets are drawn from the same distribution.

    Args:
        real: features (N, F).
        fake: features (N, F), of as many images.

    Returns:
        the distance, in squared units of the features.

    Raises:
        ImportError: if torchmetrics is not installed; names the extra.
        TooFew: if there are less than 128 images.
        ValueError: if the numbers of images differ, the features do not fit together, or are not finite.
    """
    real, fake = _checked("fd", real, fake, LEAST_FD)
    if len(real) != len(fake):
        raise ValueError(
            f"fd has {len(real)} real images and {len(fake)} others, expected equally many: its bias depends on it"
        )
    centre = real.mean(0)
    axes = torch.linalg.svd(real - centre, full_matrices=False).Vh[:AXES].T
    real, fake = (real - centre) @ axes, (fake - centre) @ axes
    masks = leave_out(len(real), GROUPS)
    replicates = torch.tensor(
        [_frechet(real[kept], fake[kept]) for kept in masks], dtype=torch.float64
    )
    error = jackknife(replicates, len(real), int(masks[0].sum()))
    return Estimate(_frechet(real, fake), error, len(fake))


class _Given(nn.Identity):
    """Features that are computed already, as torchmetrics wants them."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


def _frechet(real: Tensor, fake: Tensor) -> float:
    module = require_extra("torchmetrics.image.fid")
    # other processes have other images: without this it would wait for them, and mix theirs in
    metric = module.FrechetInceptionDistance(_Given(real.shape[1]), sync_on_compute=False)
    metric.update(real, real=True)
    metric.update(fake, real=False)
    return float(metric.compute())


def neighbourhood(real: Tensor, fake: Tensor, k: int = 5) -> dict[str, Estimate]:
    """Precision, recall, density and coverage, by balls that reach to an image's k-th nearest neighbour in its set.

    precision: share of the fake images in the ball of some real one; recall: share of the real images in the ball of
    some fake one (Kynkäänniemi et al. 2019, arXiv 1904.06991, eq. 1 and 2). density: in how many real balls a fake
    image is, divided by k; coverage: share of the real balls that hold a fake image (Naeem et al. 2020, arXiv
    2002.09797, section 3). Of two sets from one distribution density is 1 and coverage about 1 - 2^-k for M = N;
    precision and recall are below 1, by how much depends on the features. Errors are jackknives over 10 groups of
    both sets, and 1 to 2 times too large, because radii change in jumps; more where a share is nearly 0 or 1.

    Args:
        real: features (M, F), compared by Euclidean distance.
        fake: features (N, F).
        k: which neighbour a ball reaches.

    Returns:
        by name; density is 0 or more, all others shares.

    Raises:
        TooFew: if one has less than 50 images.
        ValueError: if k is not in 1 to half of the smaller set, the features do not fit together, or are not finite.
    """
    real, fake = _checked("neighbourhood", real, fake, LEAST)
    most = min(len(real), len(fake)) // 2
    if not 1 <= k <= most:
        raise ValueError(f"k is {k}, expected 1 to {most}, half of the smaller set")
    # the first of each is the whole set, the others are without a group
    real_kept, fake_kept = (
        torch.cat([torch.ones(1, len(own), dtype=torch.bool), leave_out(len(own), GROUPS)])
        for own in (real, fake)
    )
    real_radii, fake_radii = _radii(real, k, real_kept), _radii(fake, k, fake_kept)
    balls = torch.zeros(fake_kept.shape, dtype=torch.int64)  # real ones that a fake is in
    covered = torch.zeros(real_kept.shape, dtype=torch.bool)
    recalled = torch.zeros(real_kept.shape, dtype=torch.bool)
    for rows, away in _distances(real, fake):
        for g in range(len(real_kept)):
            in_real = away <= real_radii[g, rows, None]
            balls[g] += in_real[real_kept[g, rows]].sum(0)
            covered[g, rows] = in_real[:, fake_kept[g]].any(1)
            recalled[g, rows] = (away <= fake_radii[g])[:, fake_kept[g]].any(1)
    return {
        "precision": _over_groups(balls > 0, fake_kept),
        "recall": _over_groups(recalled, real_kept),
        "density": _over_groups(balls.double() / k, fake_kept),
        "coverage": _over_groups(covered, real_kept),
    }


def _over_groups(marks: Tensor, kept: Tensor) -> Estimate:
    """Mean of the marks (G + 1, N) of those kept: the first row is the value, the others give its error."""
    means = torch.stack([row[own].double().mean() for row, own in zip(marks, kept, strict=True)])
    error = jackknife(means[1:], marks.shape[1], int(kept[1].sum()))
    return Estimate(float(means[0]), error, marks.shape[1])


def _radii(points: Tensor, k: int, kept: Tensor) -> Tensor:
    """Distance (G + 1, N) of each point to its k-th nearest among those kept, if it is kept itself."""
    radii = torch.zeros(kept.shape, dtype=points.dtype)
    for rows, away in _distances(points, points):
        for g, own in enumerate(kept):
            radii[g, rows] = away[:, own].kthvalue(k + 1).values  # the nearest is the point itself
    return radii


def _distances(a: Tensor, b: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Euclidean distances of some rows of a to all of b at a time; of equal rows exactly 0."""
    step = max(1, CHUNK // len(b))
    for start in range(0, len(a), step):
        rows = slice(start, min(start + step, len(a)))
        # products of matrices, the default, leave 1e-7 between equal rows
        yield rows, torch.cdist(a[rows], b, compute_mode="donot_use_mm_for_euclid_dist")


def _checked(measure: str, real: Tensor, fake: Tensor, least: int) -> tuple[Tensor, Tensor]:
    real, fake = checked_features("real", real), checked_features("fake", fake)
    if real.shape[1] != fake.shape[1]:
        raise ValueError(
            f"real has {real.shape[1]} features and fake {fake.shape[1]}, expected the same"
        )
    require(measure, len(real), least, "real images")
    require(measure, len(fake), least, "images to compare")
    return real, fake
