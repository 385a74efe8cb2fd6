"""The coordinates that a denoiser predicts in, and the way between them.

With x_t = alpha * x0 + sigma * eps, a prediction in any space fixes both x0 and eps:

    eps    the noise                               Ho et al., arXiv 2006.11239, equation 11
    x0     the clean sample
    v      alpha * eps - sigma * x0                Salimans and Ho, arXiv 2202.00512, appendix D
    flow   eps - x0, the velocity of a straight path   Lipman et al., arXiv 2210.02747, equation 23, time reversed
    score  -eps / sigma                            Song et al., arXiv 2011.13456, section 2

All of these are affine in one another for a fixed x_t. The weights of plain guidance sum to 1, so it gives the same
sample in each of them; what is done to the guided output afterwards does not.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

Space = Literal["eps", "x0", "v", "flow", "score"]
SPACES: tuple[Space, ...] = get_args(Space)
Share = float | Tensor


@dataclass(frozen=True)
class Level:
    """Where predictions were made: what it takes to read them in another space.

    Attributes:
        x: the noisy sample (B, ...) that the model saw.
        alpha: share of the clean sample in it: a number, (B,), or as many dimensions as x. Kept as a tensor that
            broadcasts to x.
        sigma: share of the noise, likewise.
        space: of the predictions.

    Raises:
        ValueError: if a share has another shape.
    """

    x: Tensor
    alpha: Tensor
    sigma: Tensor
    space: Space

    def __post_init__(self) -> None:
        """Give the shares the dimensions of x."""
        for name in ("alpha", "sigma"):
            object.__setattr__(self, name, _share(getattr(self, name), name, self.x))

    def to_space(self, out: Tensor, space: Space) -> Tensor:
        """A prediction of the model in another space."""
        return convert(out, self.x, self.alpha, self.sigma, self.space, space)

    def leaves_open(self, space: Space) -> Tensor:
        """Where a prediction in ``space`` says nothing: eps and score in pure noise, x0 in none.

        All predictions are alike there, whatever the model thinks.

        Returns:
            bool, in the shape of the level.
        """
        shares = {"eps": self.alpha, "score": self.alpha, "x0": self.sigma}
        return shares[space] == 0 if space in shares else torch.zeros_like(self.alpha).bool()

    def elsewhere(self, places: Tensor) -> Level:
        """The same with a level at ``places``, as of :meth:`leaves_open`, that leaves nothing open."""
        alpha, sigma = (torch.where(places, 1.0, share) for share in (self.alpha, self.sigma))
        return replace(self, alpha=alpha, sigma=sigma)

    def from_space(self, out: Tensor, space: Space) -> Tensor:
        """What the model would have had to predict for ``out`` in another space."""
        return convert(out, self.x, self.alpha, self.sigma, space, self.space)


def check_space(space: str) -> Space:
    """The space, if there is one of this name.

    Raises:
        ValueError: if not.
    """
    for known in SPACES:
        if space == known:
            return known
    raise ValueError(f"space is {space!r}, expected one of {', '.join(SPACES)}")


def _share(share: Share, name: str, x: Tensor) -> Tensor:
    """A share of the clean sample or of the noise as a tensor that broadcasts to x (B, ...).

    Raises:
        ValueError: if it has another shape: one that happens to broadcast would put samples on columns.
    """
    if not isinstance(share, Tensor):
        return torch.tensor(float(share), dtype=torch.float64, device=x.device)
    if share.ndim == 1 and len(share) in (1, len(x)):
        return share.view(-1, *[1] * (x.ndim - 1))
    if share.ndim in (0, x.ndim):
        return share
    raise ValueError(
        f"{name} has shape {tuple(share.shape)} for samples {tuple(x.shape)}, expected (), (B,), or as many dimensions "
        "as the samples"
    )


def split(
    out: Tensor, x: Tensor, alpha: Share, sigma: Share, space: Space
) -> tuple[Tensor, Tensor]:
    """The clean sample and the noise that a prediction stands for.

    Args:
        out: a prediction (B, ...).
        x: the noisy sample x_t (B, ...) it was made for.
        alpha: share of the clean sample: a number, (B,), or as many dimensions as x.
        sigma: share of the noise, likewise.
        space: of ``out``.

    Returns:
        x0 and eps, (B, ...) each, with alpha * x0 + sigma * eps = x.

    Raises:
        ValueError: if the space is unknown, or cannot be left at this noise level: eps and score where alpha is 0,
            x0 where sigma is 0. If a share has another shape.
    """
    alpha, sigma = _share(alpha, "alpha", x), _share(sigma, "sigma", x)
    check_level(alpha, sigma, space)
    return split_unchecked(out, x, alpha, sigma, space)


def split_unchecked(
    out: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor, space: Space
) -> tuple[Tensor, Tensor]:
    """:func:`split` for levels that ``check_level`` has let through: in a loop, looking at them again takes time."""
    if space == "score":
        out, space = -sigma * out, "eps"
    if space == "eps":
        return (x - sigma * out) / alpha, out
    if space == "x0":
        return out, (x - alpha * out) / sigma
    if space == "v":
        norm = alpha.square() + sigma.square()
        return (alpha * x - sigma * out) / norm, (sigma * x + alpha * out) / norm
    total = alpha + sigma
    return (x - sigma * out) / total, (x + alpha * out) / total


def join(x0: Tensor, eps: Tensor, alpha: Share, sigma: Share, space: Space) -> Tensor:
    """What a perfect prediction of x0 and eps would be in a space: the target of training.

    Args:
        x0: clean samples (B, ...).
        eps: noise (B, ...).
        alpha: share of the clean sample: a number, (B,), or as many dimensions as x0.
        sigma: share of the noise, likewise.
        space: of the result.

    Raises:
        ValueError: if the space is unknown, or is score and sigma is 0. If a share has another shape.
    """
    check_space(space)
    alpha, sigma = _share(alpha, "alpha", x0), _share(sigma, "sigma", x0)
    if space == "eps":
        return eps
    if space == "x0":
        return x0
    if space == "v":
        return alpha * eps - sigma * x0
    if space == "flow":
        return eps - x0
    _refuse_zero(sigma, "sigma", space)
    return -eps / sigma


def convert(
    out: Tensor, x: Tensor, alpha: Share, sigma: Share, source: Space, target: Space
) -> Tensor:
    """A prediction made in one space, in the coordinates of another.

    Args:
        out: a prediction (B, ...) in ``source``.
        x: the noisy sample (B, ...).
        alpha: see :func:`split`.
        sigma: see :func:`split`.
        source: the space of ``out``.
        target: the space of the result.

    Raises:
        ValueError: see :func:`split` and :func:`join`.
    """
    if check_space(source) == check_space(target):
        return out
    return join(*split(out, x, alpha, sigma, source), alpha, sigma, target)


def check_level(alpha: Tensor, sigma: Tensor, space: Space) -> None:
    """Refuse noise levels at which a prediction in ``space`` leaves half of x_t open.

    Args:
        alpha: shares of the clean sample, of any shape.
        sigma: shares of the noise.
        space: of the predictions.

    Raises:
        ValueError: if the space is unknown, or is eps or score and an alpha is 0, or is x0 and a sigma is 0.
    """
    if check_space(space) in ("eps", "score"):
        _refuse_zero(alpha, "alpha", space)
    if space == "x0":
        _refuse_zero(sigma, "sigma", space)


def _refuse_zero(value: Tensor, name: str, space: Space) -> None:
    if bool((value == 0).any()):
        raise ValueError(
            f"{name} is 0, where the space {space!r} says nothing about the other half of x_t: "
            "expected v or flow, or a path that does not reach this noise level"
        )
