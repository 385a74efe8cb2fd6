"""Toys whose distributions are known exactly, in every family: what guided sampling is held against.

Two distributions belong to a scale s, and they are not the same. The *sharpened target*

    p(x) p(y | x)^s, up to a constant p(x)^(1 - s) p(x | y)^s       Ho and Salimans, arXiv 2207.12598, section 3

is what guidance is often said to sample. What it does sample, one noise level or one token after another, is the
*guided distribution*: the guided predictions are not those of the sharpened target noised or cut short, except at
s = 0 and s = 1 (Bradley and Nakkiran, arXiv 2408.09000, section 3). Here both can be had exactly.

The unconditional model of every toy is the class-conditional one averaged over the classes, as a perfect model
trained with condition dropout would be. The null label is the number of classes.

Shape letters beyond the library's: R rows of a pass (B or 2B), K components of a mixture, Y classes, N points or
sequences.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from unicfg.guidance.core import Guidance, guide
from unicfg.guidance.spaces import Space, check_space, join
from unicfg.sampling.branches import progress_at
from unicfg.sampling.paths import Path, straight

MOST_SEQUENCES = 2**20  # of an enumeration: a float64 for each takes 8 MiB


def sharpen(cond_log_prob: Tensor, uncond_log_prob: Tensor, s: float) -> Tensor:
    """The sharpened target on finitely many points: p(x)^(1 - s) p(x | y)^s, normalised over them.

    The logarithm of the target is guidance itself, applied to whole samples in place of predictions
    (Ho and Salimans, arXiv 2207.12598, section 3).

    Args:
        cond_log_prob: log p(x | y) at each point (N,); -inf where impossible.
        uncond_log_prob: log p(x), likewise.
        s: scale; 1 gives p(x | y), 0 gives p(x).

    Returns:
        probabilities (N,), float64, with sum 1.

    Raises:
        TypeError: if a log probability is no floating-point tensor.
        ValueError: if the shapes differ, or s is not finite.
    """
    return guide(cond_log_prob, uncond_log_prob, s).double().softmax(0)


@dataclass(frozen=True, eq=False)
class GaussianMixture:
    """A mixture of Gaussians with a class for each component, and its exact denoiser at every noise level.

    With x_t = alpha x0 + sigma eps a component N(mu, v) becomes N(alpha mu, alpha^2 v + sigma^2), so that density,
    score and predictions are sums over components (Karras et al., arXiv 2206.00364, appendix B.3, equation 57 for
    points in place of Gaussians). All of it is computed in float64.

    A mixture is a model: ``sample_diffusion(mixture, cond, uncond=mixture.null_condition, ...)`` takes shape, path
    and space from it.

    Args:
        weights: of the components (K,), > 0, with sum 1; they fix the share of each class as well.
        means: (K, C).
        variances: > 0; (K,) where the same in every direction, or (K, C).
        labels: class of each component (K,), int64, 0 to Y - 1, none left out.
        path: that ``t`` is told on when called as a model.
        space: of the predictions when called as a model.

    Raises:
        ValueError: if a shape, range or sum is another.

    Example:
        >>> mixture = GaussianMixture(
        ...     weights=torch.tensor([0.5, 0.5]), means=torch.tensor([[-1.0], [1.0]]),
        ...     variances=torch.tensor([0.1, 0.1]), labels=torch.tensor([0, 1]))
        >>> x0 = sample_diffusion(mixture, torch.tensor([[1]]), uncond=mixture.null_condition, seeds=[0])
    """

    weights: Tensor
    means: Tensor
    variances: Tensor
    labels: Tensor
    path: Path = field(default_factory=straight)
    space: Space = "flow"

    def __post_init__(self) -> None:
        """Check, and keep everything in float64 with a variance for each direction."""
        if self.means.ndim != 2 or not bool(self.means.isfinite().all()):
            raise ValueError(
                f"means has shape {tuple(self.means.shape)}, expected finite numbers (K, C)"
            )
        count = len(self.means)
        _check_probabilities("weights", self.weights, (count,))
        if not bool((self.weights > 0).all()):
            raise ValueError(f"weights is {self.weights.tolist()}, expected numbers > 0")
        if self.variances.shape not in ((count,), self.means.shape):
            raise ValueError(
                f"variances has shape {tuple(self.variances.shape)}, "
                f"expected {(count,)} or {tuple(self.means.shape)}"
            )
        if not bool(((self.variances > 0) & self.variances.isfinite()).all()):
            raise ValueError(f"variances is {self.variances.tolist()}, expected finite numbers > 0")
        if self.labels.shape != (count,) or self.labels.dtype != torch.long:
            raise ValueError(
                f"labels is {self.labels.dtype} {tuple(self.labels.shape)}, expected int64 {(count,)}"
            )
        seen = self.labels.unique().tolist()
        if seen != list(range(len(seen))):
            raise ValueError(f"labels holds {seen}, expected every class from 0 up to the last")
        check_space(self.space)
        variances = self.variances.double()
        variances = variances[:, None] if variances.ndim == 1 else variances
        object.__setattr__(self, "weights", self.weights.double())
        object.__setattr__(self, "means", self.means.double())
        object.__setattr__(self, "variances", variances.expand(self.means.shape))

    @property
    def classes(self) -> int:
        """Y; also the null label."""
        return int(self.labels.max()) + 1

    @property
    def null_condition(self) -> Tensor:
        """The condition (1,) of the unconditional branch, for ``uncond=``."""
        return torch.tensor([self.classes])

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape (C,) of one sample."""
        return (self.means.shape[1],)

    def log_prob(
        self,
        x: Tensor,
        label: int | Tensor | None = None,
        alpha: float | Tensor = 1.0,
        sigma: float | Tensor = 0.0,
    ) -> Tensor:
        """Log density of noisy samples, of a class or of all.

        Args:
            x: (B, C).
            label: a class for all rows, or (B,) one each; None, or Y, for p(x).
            alpha: share of the clean sample; a number or (B,).
            sigma: share of the noise, likewise; with the default levels the samples are clean.

        Returns:
            (B,), float64.

        Raises:
            ValueError: if a shape does not fit, or there is no such class.
        """
        shares, apart, variances = self._components(x, label, alpha, sigma)
        return _log_densities(shares, apart, variances).logsumexp(1)

    def score(
        self,
        x: Tensor,
        label: int | Tensor | None = None,
        alpha: float | Tensor = 1.0,
        sigma: float | Tensor = 0.0,
    ) -> Tensor:
        """Gradient of :meth:`log_prob` by x, (B, C) in float64; arguments and errors are the same."""
        shares, apart, variances = self._components(x, label, alpha, sigma)
        posterior = _log_densities(shares, apart, variances).softmax(1)
        return -(posterior[..., None] * apart / variances).sum(1)

    def predict(
        self,
        x: Tensor,
        label: int | Tensor | None,
        alpha: float | Tensor,
        sigma: float | Tensor,
        space: Space,
    ) -> Tensor:
        """The exact prediction of a denoiser: the mean of what it is trained on, given x.

        Args:
            x: noisy samples (B, C).
            label: a class for all rows, or (B,) one each; None, or Y, for the unconditional model.
            alpha: share of the clean sample; a number or (B,).
            sigma: share of the noise, likewise.
            space: of the result.

        Returns:
            (B, C), float64.

        Raises:
            ValueError: if a shape does not fit, there is no such class or space, or space is score and sigma is 0.
        """
        shares, apart, variances = self._components(x, label, alpha, sigma)
        posterior = _log_densities(shares, apart, variances).softmax(1)[..., None]
        a, b = _level("alpha", alpha, x), _level("sigma", sigma, x)
        means, clean = self.means.to(x.device), self.variances.to(x.device)
        x0 = (posterior * (means + a[..., None] * clean * apart / variances)).sum(1)
        eps = (posterior * b[..., None] * apart / variances).sum(1)
        return join(x0, eps, a, b, space)

    def __call__(self, x: Tensor, cond: Tensor, t: Tensor) -> Tensor:
        """The prediction in ``space`` for x (R, C), labels ``cond`` (R, 1) and times t (R,), in the dtype of x."""
        alpha, sigma = self.path.coefficients(t.double())
        return self.predict(x, cond[:, 0], alpha, sigma, self.space).to(x.dtype)

    def sample(
        self, count: int, generator: torch.Generator, label: int | Tensor | None = None
    ) -> Tensor:
        """Exact clean samples (B, C), float64.

        Args:
            count: B.
            generator: on the CPU; no other random state is used.
            label: a class for all, or (B,) one each; None, or Y, for p(x).

        Raises:
            ValueError: if ``count`` is not positive, or there is no such class.
        """
        if count < 1:
            raise ValueError(f"count is {count}, expected at least 1")
        shares = self._shares(_labels(label, count, self.classes))
        chosen = torch.multinomial(shares.exp(), 1, generator=generator)[:, 0]
        noise = torch.randn((count, *self.latent_shape), generator=generator, dtype=torch.float64)
        return self.means[chosen] + self.variances[chosen].sqrt() * noise

    def sharpened(self, points: Tensor, label: int, s: float) -> Tensor:
        """The sharpened target on the points of a grid, see :func:`sharpen`.

        Args:
            points: clean samples (N, C), evenly spaced if the result is to stand for a density.
            label: the class y.
            s: scale.

        Returns:
            probabilities (N,) with sum 1 over the points, whatever lies between and beyond them.

        Raises:
            ValueError: if a shape does not fit, there is no such class, or s is not finite.
        """
        return sharpen(self.log_prob(points, label), self.log_prob(points), s)

    def _shares(self, labels: Tensor) -> Tensor:
        """Log weight (B, K) of each component in the class of each row; -inf in the other classes."""
        own = self.labels.to(labels.device) == labels[:, None]
        log = self.weights.to(labels.device).log().expand_as(own)
        return log.masked_fill(~own & (labels[:, None] < self.classes), -math.inf).log_softmax(1)

    def _components(
        self,
        x: Tensor,
        label: int | Tensor | None,
        alpha: float | Tensor,
        sigma: float | Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log weights (B, K), distances from the noised means (B, K, C) and variances (B, K, C)."""
        if x.ndim != 2 or x.shape[1] != self.means.shape[1]:
            raise ValueError(f"x has shape {tuple(x.shape)}, expected (B, {self.means.shape[1]})")
        shares = self._shares(_labels(label, len(x), self.classes).to(x.device))
        a, b = _level("alpha", alpha, x)[..., None], _level("sigma", sigma, x)[..., None]
        apart = x.double()[:, None] - a * self.means.to(x.device)
        return shares, apart, a.square() * self.variances.to(x.device) + b.square()


def _log_densities(shares: Tensor, apart: Tensor, variances: Tensor) -> Tensor:
    """Log of weight times density, (B, K), for each component."""
    log = apart.square() / variances + (2 * math.pi * variances).log()
    return shares - log.sum(-1) / 2


@dataclass
class LabelRows:
    """The cache of a :class:`MarkovChain`: the label of each row, for a chain looks back at no more than ids.

    Attributes:
        labels: (R,), int64.
        length: tokens seen so far, the condition included.
    """

    labels: Tensor
    length: int = 0

    def rows(self, start: int, stop: int) -> LabelRows:
        """The rows from ``start`` up to ``stop``: the same memory, with a length of its own."""
        return LabelRows(self.labels[start:stop])


@dataclass(frozen=True, eq=False)
class MarkovChain:
    """Token sequences from a Markov chain of each class, and the exact logits of the next token.

    Given the class, a token depends on the one before. Without it a token depends on all before, for they tell of the
    class: p(x_i | x_<i) is the sum over classes of p(y | x_<i) p(x_i | x_(i-1), y).

    A chain is a model of ``sample_autoregressive``: ``cond`` (B, 1) holds labels.

    Args:
        prior: probability of each class (Y,).
        initial: of the first token (Y, V).
        transition: from the token before (rows) to the next (Y, V, V); a 0 is a token that cannot follow.
        length: L, tokens of a sequence; V^L is at most 2^20.

    Raises:
        ValueError: if a shape, range or sum is another.

    Example:
        >>> ids = sample_autoregressive(chain, cond, uncond=chain.null_condition, guidance=Guidance(3.0), seeds=[0])
    """

    prior: Tensor
    initial: Tensor
    transition: Tensor
    length: int

    def __post_init__(self) -> None:
        """Check, and keep everything in float64."""
        if self.initial.ndim != 2:
            raise ValueError(f"initial has shape {tuple(self.initial.shape)}, expected (Y, V)")
        classes, vocabulary = self.initial.shape
        _check_probabilities("prior", self.prior, (classes,))
        _check_probabilities("initial", self.initial, (classes, vocabulary))
        _check_probabilities("transition", self.transition, (classes, vocabulary, vocabulary))
        _check_count(vocabulary, self.length)
        for name in ("prior", "initial", "transition"):
            object.__setattr__(self, name, getattr(self, name).double())

    @property
    def classes(self) -> int:
        """Y; also the null label."""
        return len(self.prior)

    @property
    def null_condition(self) -> Tensor:
        """The condition (1,) of the unconditional branch, for ``uncond=``."""
        return torch.tensor([self.classes])

    @property
    def num_tokens(self) -> int:
        """L."""
        return self.length

    def make_cache(self, rows: int) -> LabelRows:
        """Room for the labels of ``rows`` sequences."""
        return LabelRows(torch.zeros(rows, dtype=torch.long))

    def prefill(self, cond: Tensor, cache: LabelRows) -> None:
        """Keep the labels (R, 1), or one (1, 1) for all rows."""
        cache.labels.copy_(_labels(cond[:, 0].expand(len(cache.labels)), None, self.classes))
        cache.length = 1

    def decode(self, ids: Tensor, cache: LabelRows) -> Tensor:
        """Logits (R, V) of the token after ``ids`` (R, n)."""
        cache.length = 1 + ids.shape[1]
        return self.next_log_prob(ids, cache.labels.to(ids.device))

    def next_log_prob(self, ids: Tensor, label: int | Tensor | None = None) -> Tensor:
        """Log probability of each next token.

        Args:
            ids: tokens so far (R, n), 0 <= n < L.
            label: a class for all rows, or (R,) one each; None, or Y, for the unconditional chain.

        Returns:
            (R, V), float64; -inf for a token that cannot follow.

        Raises:
            ValueError: if there is no such class, or n is not less than L.
        """
        if ids.ndim != 2 or ids.shape[1] >= self.length:
            raise ValueError(
                f"ids has shape {tuple(ids.shape)}, expected (R, n) with n < {self.length}"
            )
        labels = _labels(label, len(ids), self.classes).to(ids.device)
        known = torch.cat([torch.eye(self.classes).double(), torch.zeros(1, self.classes).double()])
        belief = torch.where(
            (labels == self.classes)[:, None], self._posterior(ids), known.to(ids.device)[labels]
        )
        return torch.einsum("ry,yrv->rv", belief, self._next(ids)).log()

    def log_prob(self, ids: Tensor, label: int | Tensor | None = None) -> Tensor:
        """Log probability (R,) of sequences ids (R, n), n >= 1, under a class, or averaged over all.

        Raises:
            ValueError: if there is no such class.
        """
        labels = _labels(label, len(ids), self.classes).to(ids.device)
        of_class = self._log_likelihood(ids)  # (R, Y)
        averaged = (of_class + self.prior.to(ids.device).log()).logsumexp(1)
        own = of_class.gather(1, labels.clamp(max=self.classes - 1)[:, None])[:, 0]
        return torch.where(labels == self.classes, averaged, own)

    def distribution(self, label: int | None = None) -> Tensor:
        """Probability (V^L,) of every sequence under a class, or averaged over all; see :func:`all_sequences`."""
        return self.log_prob(self._sequences(), label).exp()

    def sharpened(self, label: int, s: float) -> Tensor:
        """The sharpened target over whole sequences (V^L,), see :func:`sharpen`."""
        ids = self._sequences()
        return sharpen(self.log_prob(ids, label), self.log_prob(ids), s)

    def guided(self, label: int, guidance: Guidance) -> Tensor:
        """What guided sampling draws: the product of guided next-token distributions.

        Each of these is normalised by itself, which the sharpened target is not: it weighs a token by what its
        continuations will do for the class (Bradley and Nakkiran, arXiv 2408.09000, on diffusion).

        Args:
            label: the class y.
            guidance: scale or schedule, and mitigations, as the sampler takes it.

        Returns:
            probabilities (V^L,), float64, see :func:`all_sequences`.

        Raises:
            ValueError: if there is no such class.
        """
        vocabulary = self.initial.shape[1]
        log = torch.zeros(1, dtype=torch.float64)
        for index in range(self.length):
            ids = all_sequences(vocabulary, index)
            logits = guidance.combine(
                progress_at(index, self.length),
                self.next_log_prob(ids, label),
                self.next_log_prob(ids),
            )
            log = (log[:, None] + logits.log_softmax(-1)).flatten()
        return log.exp()

    def _sequences(self) -> Tensor:
        return all_sequences(self.initial.shape[1], self.length)

    def _next(self, ids: Tensor) -> Tensor:
        """Probability (Y, R, V) of the next token in each class."""
        if ids.shape[1] == 0:
            return self.initial.to(ids.device)[:, None].expand(-1, len(ids), -1)
        return self.transition.to(ids.device)[:, ids[:, -1]]

    def _log_likelihood(self, ids: Tensor) -> Tensor:
        """Log probability (R, Y) of ids (R, n) in each class."""
        log = torch.zeros(len(ids), self.classes, dtype=torch.float64, device=ids.device)
        for index in range(ids.shape[1]):
            chances = self._next(ids[:, :index])
            places = ids[:, index].view(1, -1, 1).expand(self.classes, -1, 1)
            log = log + chances.gather(2, places)[..., 0].T.log()
        return log

    def _posterior(self, ids: Tensor) -> Tensor:
        """Probability (R, Y) of each class after ids; the prior after a sequence that no class can begin with."""
        prior = self.prior.to(ids.device)
        log = self._log_likelihood(ids) + prior.log()
        possible = ~log.amax(1, keepdim=True).isneginf()
        return torch.where(possible, log.softmax(1), prior)


@dataclass(frozen=True, eq=False)
class MaskedTable:
    """A few tokens with a known joint table for each class, and every token's exact conditional given the known ones.

    A table is a model of ``sample_masked``: ``cond`` (B, 1) holds labels, id V stands for an unknown token.

    Args:
        prior: probability of each class (Y,).
        table: probability of every sequence in each class (Y, V, ..., V), one dimension a token; at most 2^20 a class.

    Raises:
        ValueError: if a shape, range or sum is another.

    Example:
        >>> ids = sample_masked(table, cond, uncond=table.null_condition, guidance=Guidance(3.0), seeds=[0])
    """

    prior: Tensor
    table: Tensor

    def __post_init__(self) -> None:
        """Check, and keep everything in float64."""
        shape = tuple(self.table.shape)
        if len(shape) < 2 or len(set(shape[1:])) != 1:
            raise ValueError(f"table has shape {shape}, expected (Y, V, ..., V)")
        _check_count(shape[1], len(shape) - 1)
        _check_probabilities("prior", self.prior, shape[:1])
        _check_probabilities("table", self.table.flatten(1), (shape[0], self.table[0].numel()))
        object.__setattr__(self, "prior", self.prior.double())
        object.__setattr__(self, "table", self.table.double())

    @property
    def classes(self) -> int:
        """Y; also the null label."""
        return len(self.prior)

    @property
    def null_condition(self) -> Tensor:
        """The condition (1,) of the unconditional branch, for ``uncond=``."""
        return torch.tensor([self.classes])

    @property
    def num_tokens(self) -> int:
        """L."""
        return self.table.ndim - 1

    @property
    def mask_token(self) -> int:
        """V, the id of an unknown token."""
        return self.table.shape[1]

    def __call__(self, ids: Tensor, cond: Tensor) -> Tensor:
        """Logits (R, L, V) for ids (R, L) and labels ``cond`` (R, 1): see :meth:`conditionals`."""
        return self.conditionals(ids, cond[:, 0])

    def conditionals(self, ids: Tensor, label: int | Tensor | None = None) -> Tensor:
        """Log probability of each token given those that are known.

        Args:
            ids: (R, L), ``mask_token`` where unknown.
            label: a class for all rows, or (R,) one each; None, or Y, for the unconditional model.

        Returns:
            (R, L, V), float64: certain at known tokens, and -inf throughout where the known ones cannot be together.

        Raises:
            ValueError: if a shape does not fit, or there is no such class.
        """
        if ids.ndim != 2 or ids.shape[1] != self.num_tokens:
            raise ValueError(f"ids has shape {tuple(ids.shape)}, expected (R, {self.num_tokens})")
        labels = _labels(label, len(ids), self.classes).to(ids.device)
        sequences = self._sequences().to(ids.device)
        agree = ((ids[:, None] == sequences) | (ids[:, None] == self.mask_token)).all(-1)
        of_label = torch.stack([self.distribution(y) for y in (*range(self.classes), None)])
        weights = of_label.to(ids.device)[labels] * agree  # (R, N)
        one_hot = torch.nn.functional.one_hot(sequences, self.mask_token).double()
        sums = torch.einsum("rn,nlv->rlv", weights, one_hot)
        return sums.log() - weights.sum(1).clamp(min=1e-300).log()[:, None, None]

    def distribution(self, label: int | None = None) -> Tensor:
        """Probability (V^L,) of every sequence in a class, or averaged over all; see :func:`all_sequences`.

        Raises:
            ValueError: if there is no such class.
        """
        flat = self.table.flatten(1)
        y = int(_labels(label, 1, self.classes)[0])
        return self.prior @ flat if y == self.classes else flat[y]

    def sharpened(self, label: int, s: float) -> Tensor:
        """The sharpened target over whole sequences (V^L,), see :func:`sharpen`."""
        return sharpen(self.distribution(label).log(), self.distribution().log(), s)

    def guided(self, label: int, guidance: Guidance, groups: Sequence[Sequence[int]]) -> Tensor:
        """What guided sampling draws where the places that each step reveals are fixed.

        Tokens of one group are drawn independently, from the guided conditionals given all groups before. A single
        group is sampling in one step; one token a group is what a chain does, in any order.

        Args:
            label: the class y.
            guidance: scale or schedule, and mitigations; group i of n is at progress i / (n - 1).
            groups: places that are revealed together, step by step; every place from 0 to L - 1 once.

        Returns:
            probabilities (V^L,), float64, see :func:`all_sequences`.

        Raises:
            ValueError: if the groups are no partition of the places, or there is no such class.
        """
        places = [place for group in groups for place in group]
        if sorted(places) != list(range(self.num_tokens)):
            raise ValueError(
                f"groups is {[list(group) for group in groups]}, "
                f"expected every place from 0 to {self.num_tokens - 1} once"
            )
        sequences = self._sequences()
        seen = torch.full_like(sequences, self.mask_token)
        log = torch.zeros(len(sequences), dtype=torch.float64)
        for index, group in enumerate(groups):
            chosen = torch.tensor(list(group))
            logits = guidance.combine(
                progress_at(index, len(groups)),
                self.conditionals(seen, label)[:, chosen],
                self.conditionals(seen)[:, chosen],
            )
            # what cannot be reached has no conditional, and probability 0 already
            steps = logits.log_softmax(-1).nan_to_num(nan=-math.inf, neginf=-math.inf)
            log = log + steps.gather(2, sequences[:, chosen, None])[..., 0].sum(1)
            seen[:, chosen] = sequences[:, chosen]
        return log.exp()

    def _sequences(self) -> Tensor:
        return all_sequences(self.mask_token, self.num_tokens)


def all_sequences(vocabulary: int, length: int) -> Tensor:
    """Every sequence, in the order that all distributions over sequences have here: the last token runs fastest.

    Args:
        vocabulary: V.
        length: L, 0 included: then there is one, the empty sequence.

    Returns:
        ids (V^L, L), int64.

    Raises:
        ValueError: if there are more than 2^20.
    """
    if vocabulary**length > MOST_SEQUENCES:
        raise ValueError(
            f"vocabulary^length is {vocabulary}^{length}, expected at most {MOST_SEQUENCES} sequences"
        )
    powers = vocabulary ** torch.arange(length - 1, -1, -1)
    return torch.arange(vocabulary**length)[:, None] // powers % vocabulary


def sequence_index(ids: Tensor, vocabulary: int) -> Tensor:
    """Place (B,) of sequences ids (B, L) in :func:`all_sequences`, for counting them."""
    powers = vocabulary ** torch.arange(ids.shape[1] - 1, -1, -1, device=ids.device)
    return (ids * powers).sum(1)


def _labels(label: int | Tensor | None, count: int | None, classes: int) -> Tensor:
    """A label for each of ``count`` rows, the null label for None; of any number of rows where ``count`` is None.

    Raises:
        ValueError: if there is no such class, or not one label a row.
    """
    labels = torch.as_tensor(classes if label is None else label)
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"label is {labels.dtype}, expected integers")
    if labels.ndim == 0 and count is not None:
        labels = labels.expand(count)
    if labels.ndim != 1 or (count is not None and len(labels) != count):
        raise ValueError(f"label has shape {tuple(labels.shape)}, expected a number or ({count},)")
    if not bool(((labels >= 0) & (labels <= classes)).all()):
        raise ValueError(
            f"label is {labels.unique().tolist()}, "
            f"expected 0 to {classes - 1}, or {classes} for the unconditional model"
        )
    return labels.long()


def _level(name: str, value: float | Tensor, x: Tensor) -> Tensor:
    """A share of signal or noise that broadcasts to x (B, C), float64."""
    level = torch.as_tensor(value, dtype=torch.float64, device=x.device)
    if level.ndim == 0:
        return level.view(1, 1)
    if level.shape != (len(x),):
        raise ValueError(f"{name} has shape {tuple(level.shape)}, expected a number or ({len(x)},)")
    return level[:, None]


def _check_probabilities(name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    """Refuse what are not probabilities along the last dimension."""
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {shape}")
    if not bool(((value >= 0) & value.isfinite()).all()):
        raise ValueError(f"{name} is {value.tolist()}, expected numbers >= 0")
    total = value.double().sum(-1)
    if bool((total - 1).abs().max() > 1e-6):
        raise ValueError(f"{name} sums to {total.tolist()}, expected 1")


def _check_count(vocabulary: int, length: int) -> None:
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise ValueError(f"length is {length!r}, expected an int of at least 1")
    if vocabulary**length > MOST_SEQUENCES:
        raise ValueError(
            f"length is {length}: expected at most {MOST_SEQUENCES} sequences of {vocabulary} tokens"
        )
