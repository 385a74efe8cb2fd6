"""How much images differ among themselves.

All of it depends on how many images there are: compare numbers of equal n only.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence

import torch
from torch import Tensor

from unicfg.evaluation.attributes import Reading
from unicfg.evaluation.features import checked_features
from unicfg.evaluation.results import Estimate, TooFew
from unicfg.evaluation.uncertainty import jackknife, leave_out, require, share

LEAST = 4  # images of one prompt: the error comes from leaving one out
LEAST_READINGS = 16  # of one prompt: of 8, the entropy of 8 colours misses a quarter of its 3 bits
MOST_GROUPS = 20

ATTRIBUTES = ("background", "shape", "colour", "size")
Attributes = tuple[str | None, ...]  # of one image: those that its prompt leaves open

# what each leaves open, of background, shape, colour and size of the object that stands out most
OPEN: Mapping[str, Sequence[str]] = {
    "a red shape": ("background", "shape", "size"),
    "a blue shape": ("background", "shape", "size"),
    "a circle": ("background", "colour", "size"),
    "a star": ("background", "colour", "size"),
}


def vendi(features: Tensor) -> Estimate:
    """Vendi score: the number of images that would differ as much if they had nothing in common.

    exp of the entropy of the eigenvalues of K / n, Friedman and Dieng 2022, arXiv 2210.02410, definition 3.1,
    with K_ij = cosine of features i and j. The features are not centred: around their own mean a set of near copies
    would count as much as a varied one. Copies have 1, orthogonal features n. With the features ``lite0``, 32 shapes
    scenes drawn at random have 9 and 32 drawings of the same scene 1.2, at average cosines of 0.43 and 0.97.

    Args:
        features: (N, F).

    Returns:
        1 to N; the error is a jackknife over at most 20 groups.

    Raises:
        TooFew: if there are less than 4 images.
        ValueError: if the shape is wrong, a number is not finite, or an image has features of zeros only.
    """
    return _with_error("vendi", _vendi, features)


def distance(features: Tensor) -> Estimate:
    """Mean cosine distance, 1 - cosine, of two different images of the set.

    Copies have 0, orthogonal features 1. Unlike the others here it is unbiased at any number of images.

    Args:
        features: (N, F), not centred.

    Returns:
        0 to N / (N - 1), to 1 if no feature is negative; the error is a jackknife over at most 20
        groups.

    Raises:
        TooFew: if there are less than 4 images.
        ValueError: if the shape is wrong, a number is not finite, or an image has features of zeros only.
    """
    return _with_error("distance", _distance, features)


def within_prompts(features: Tensor, prompts: Sequence[str]) -> dict[str, Estimate]:
    """Vendi score and distance among the images of one prompt, on average over prompts.

    The error is that of a mean over prompts drawn at random, which holds the error within them; or that within
    them alone, where this is larger, as for a single prompt.

    Args:
        features: (N, F).
        prompts: N; those with one image only are passed over.

    Returns:
        "vendi" and "distance".

    Raises:
        TooFew: if no prompt has several images, or one has 2 or 3.
        ValueError: if the numbers differ, of features and prompts, or of images of the prompts that have several.
    """
    if len(prompts) != len(features):
        raise ValueError(f"{len(features)} features and {len(prompts)} prompts, expected as many")
    own: defaultdict[str, list[int]] = defaultdict(list)
    for row, prompt in enumerate(prompts):
        own[prompt].append(row)
    several = [rows for rows in own.values() if len(rows) > 1]
    if not several:
        raise TooFew(f"none of {len(own)} prompts has several images, expected at least {LEAST}")
    sizes = sorted({len(rows) for rows in several})
    if len(sizes) > 1:
        raise ValueError(
            f"prompts have {sizes} images, expected equally many: the Vendi score depends on it"
        )
    return {
        "vendi": _over_prompts([vendi(features[rows]) for rows in several]),
        "distance": _over_prompts([distance(features[rows]) for rows in several]),
    }


def open_entropy(
    readings: Sequence[Reading], prompts: Sequence[str], open: Mapping[str, Sequence[str]]
) -> Estimate:
    """Entropy of the attributes that prompts leave open, mean over pairs of prompt and attribute.

    Of the frequencies of an attribute's values among a prompt's images, given whether it could be read: what cannot be
    read (None) adds nothing, as burnt images would otherwise count as diverse ones. An attribute has the share that could
    be read times the entropy of what was read, so little of it may mean that images are alike or that they cannot be
    read: :func:`readable` tells which.

    The estimate from frequencies is biased downwards, by about (values - 1) / (2 n ln 2) bits (Miller 1955), and is not
    corrected: the correction grows with the values that were seen, and cells are compared at equal n. True scenes have
    1.83 bits for ``OPEN``, of which 16, 32, 64 images a prompt show 1.68, 1.76, 1.80 on average.

    Args:
        readings: of N images.
        prompts: N; those that are not in ``open`` are passed over.
        open: for each prompt, which of "background", "shape", "colour", "size" it leaves open, of the object that
            stands out most.

    Returns:
        bits; the error is a jackknife over images, for these prompts. It is right where some values are
        rarer than others, and too large, up to twice, where all are as frequent.

    Raises:
        TooFew: if a prompt of ``open`` has less than 16 images.
        ValueError: if the numbers of readings and prompts differ, ``open`` is empty or an attribute is unknown.
    """
    return _over_pairs(_bits, _seen_of_open("open_entropy", readings, prompts, open))


def readable(
    readings: Sequence[Reading], prompts: Sequence[str], open: Mapping[str, Sequence[str]]
) -> Estimate:
    """Share of the attributes that prompts leave open that could be read, mean over pairs of prompt and attribute.

    To be read beside :func:`open_entropy`, which is low where images are alike and where they cannot be read: only
    where this one is as high as in real images has it the first meaning. An image in which nothing stands out has no
    shape, colour and size to read.

    Args:
        readings: of N images.
        prompts: N; those that are not in ``open`` are passed over.
        open: as for :func:`open_entropy`.

    Returns:
        0 to 1; the error is a jackknife over images, for these prompts, and at least that of
        :func:`~unicfg.evaluation.uncertainty.share` where all can be read: it is too large if nearly all or nearly none
        can be read, and right between.

    Raises:
        TooFew: if a prompt of ``open`` has less than 16 images.
        ValueError: if the numbers of readings and prompts differ, ``open`` is empty or an attribute is unknown.
    """
    seen = _seen_of_open("readable", readings, prompts, open)
    found = _over_pairs(_read, seen)
    images = len(seen) * min(map(len, seen))  # the prompt with the fewest counts as much as others
    return found._replace(error=max(found.error, share("readable", images, images).error))


def _with_error(measure: str, statistic: Callable[[Tensor], float], features: Tensor) -> Estimate:
    features = checked_features(measure, features)
    n = len(features)
    require(measure, n, LEAST)
    norms = features.norm(dim=1, keepdim=True)
    if not norms.all():
        raise ValueError(f"{measure} has features of zeros only, which have no direction")
    cosines = (features / norms) @ (features / norms).T
    masks = leave_out(n, n // math.ceil(n / MOST_GROUPS))
    replicates = torch.tensor(
        [statistic(cosines[kept][:, kept]) for kept in masks], dtype=torch.float64
    )
    return Estimate(statistic(cosines), jackknife(replicates, n, int(masks[0].sum())), n)


def _vendi(cosines: Tensor) -> float:
    eigenvalues = torch.linalg.eigvalsh(cosines / len(cosines)).clamp_min(0)
    return float(torch.special.entr(eigenvalues).sum().exp())


def _distance(cosines: Tensor) -> float:
    n = len(cosines)
    return float((1 - cosines).sum() / (n * (n - 1)))  # the diagonal adds 0


def _over_prompts(own: Sequence[Estimate]) -> Estimate:
    values, errors = (
        torch.tensor([estimate[i] for estimate in own], dtype=torch.float64) for i in (0, 1)
    )
    within = float(errors.norm()) / len(own)
    between = float(values.std()) / len(own) ** 0.5 if len(own) > 1 else 0.0
    return Estimate(float(values.mean()), max(within, between), sum(each.n for each in own))


def _seen_of_open(
    measure: str,
    readings: Sequence[Reading],
    prompts: Sequence[str],
    open: Mapping[str, Sequence[str]],
) -> list[list[Attributes]]:
    """For each prompt of ``open`` what its images show.

    Raises:
        TooFew: if a prompt has less than 16 images.
        ValueError: if an argument is wrong.
    """
    if len(readings) != len(prompts):
        raise ValueError(f"{len(readings)} readings and {len(prompts)} prompts, expected as many")
    for name in (name for names in open.values() for name in names):
        if name not in ATTRIBUTES:
            raise ValueError(f"open names {name!r}, expected one of {', '.join(ATTRIBUTES)}")
    if not any(open.values()):
        raise ValueError("open names no attributes, expected at least one")
    seen = []
    for prompt, names in open.items():
        own = [reading for reading, its in zip(readings, prompts, strict=True) if its == prompt]
        require(f"{measure} of {prompt!r}", len(own), LEAST_READINGS)
        seen.append([tuple(_attribute(reading, name) for name in names) for reading in own])
    return seen


def _over_pairs(
    statistic: Callable[[Sequence[Attributes]], float], seen: Sequence[Sequence[Attributes]]
) -> Estimate:
    """The mean over pairs of prompt and attribute, of a statistic that sums over the attributes of a prompt."""
    pairs = sum(len(own[0]) for own in seen)
    total, variance = 0.0, 0.0
    for own in seen:
        without_one = [statistic([*own[:i], *own[i + 1 :]]) for i in range(len(own))]
        replicates = torch.tensor(without_one, dtype=torch.float64)
        total += statistic(own)
        variance += jackknife(replicates, len(own), len(own) - 1) ** 2
    return Estimate(total / pairs, variance**0.5 / pairs, sum(map(len, seen)))


def _attribute(reading: Reading, name: str) -> str | None:
    if name == "background":
        return reading.background
    return getattr(reading.objects[0], name) if reading.objects else None


def _read(seen: Sequence[Attributes]) -> float:
    """Sum over attributes of the share of values that are not None."""
    return sum(value is not None for values in seen for value in values) / len(seen)


def _bits(seen: Sequence[Attributes]) -> float:
    """Sum over attributes of the entropy of values, given whether they are None."""
    return sum(
        _entropy(values) - _entropy([value is None for value in values])
        for values in zip(*seen, strict=True)
    )


def _entropy(values: Sequence[Hashable]) -> float:
    """Of the frequencies, in bits."""
    shares = torch.tensor(list(Counter(values).values()), dtype=torch.float64) / len(values)
    return float(torch.special.entr(shares).sum() / torch.log(torch.tensor(2.0).double()))
