"""All measures of one cell of a study, and of the real images that it is held against."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tokenizers_vq import VQTokenizer, to_float
from unicfg.evaluation import burn
from unicfg.evaluation.accuracy import attribute_accuracy
from unicfg.evaluation.attributes import read_scenes
from unicfg.evaluation.captions import (
    CaptionScorer,
    caption_measures,
    caption_ranks,
    distinct,
    minilm,
)
from unicfg.evaluation.diversity import open_entropy, within_prompts
from unicfg.evaluation.features import Features, extract, find_features
from unicfg.evaluation.fidelity import fd, kid, neighbourhood
from unicfg.evaluation.results import Estimate, TooFew
from unicfg.evaluation.tasks import Task
from unicfg.evaluation.uncertainty import mean_over_images
from unicfg.sampling import Trace

EXAMPLES = 2000  # real images with captions, at most, to learn from what captions look like


@dataclass
class Tally:
    """Measures by name, and why others have no number."""

    measures: dict[str, Estimate] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def add(
        self, names: tuple[str, ...], measure: Callable[[], Estimate | Mapping[str, Estimate]]
    ) -> None:
        """Keep what a measure gives under its name, or its own names, or the reason why it gives nothing."""
        try:
            found = measure()
        except TooFew as error:
            self.missing.update(dict.fromkeys(names, str(error)))
            return
        named = {names[0]: found} if isinstance(found, Estimate) else found
        for name in names:
            if math.isfinite(named[name].value):
                self.measures[name] = named[name]
            else:
                self.missing[name] = f"it is {named[name].value}"


@dataclass(frozen=True)
class Drawn:
    """What was drawn for one cell.

    Attributes:
        images: one a prompt of the task (N, 3, H, W), in [-1, 1].
        opened: of each open prompt in turn, equally many (M, 3, H, W).
        ids: tokens of ``images`` (N, h, w); None of a family that has none.
        trace: of ``images``.
        seconds: that drawing an image took.
    """

    images: Tensor
    opened: Tensor
    ids: Tensor | None
    trace: Trace
    seconds: float


class Measuring:
    """Measures what was drawn for a task.

    Args:
        task: what was to be drawn.
        features: see :func:`unicfg.evaluation.features.find_features`.
        tokenizer: of the weights.

    Raises:
        ImportError: if what computes the features is not installed.
        ValueError: if there are no such features.
    """

    def __init__(self, task: Task, features: str, tokenizer: VQTokenizer) -> None:
        self.task, self.tokenizer = task, tokenizer
        self.features: Features = find_features(features)
        self.real = None if task.real is None else self._points(to_float(task.real))
        self.captions = _Captions.learn(task, self.features)

    def cell(self, drawn: Drawn) -> Tally:
        """All measures of a cell."""
        tally, points = Tally(), self._points(drawn.images)
        self._adherence(tally, drawn.images, points)
        self._diversity(tally, drawn.opened)
        self._fidelity(tally, points)
        self._burn(tally, drawn.images, drawn.ids)
        entropy, strength = drawn.trace.entropy.mean(0), drawn.trace.strength
        if drawn.ids is not None:
            tally.add(("entropy",), lambda: mean_over_images("entropy", entropy))
        if bool(strength.isfinite().all()):
            tally.add(("strength",), lambda: mean_over_images("strength", strength))
        else:
            tally.missing["strength"] = "the conditional model was not run at every step"
        count = len(drawn.images)
        rows = float(drawn.trace.branches.sum())
        tally.measures["rows"] = Estimate(rows, math.nan, count)
        tally.measures["seconds"] = Estimate(drawn.seconds, math.nan, count)
        return tally

    def references(self) -> dict[str, dict[str, Estimate]]:
        """The same measures of real images, of what the tokenizer makes of them, and of real images with wrong captions.

        Real images are held against other real images.
        """
        if self.task.real is None or self.real is None:
            return {}
        found = {}
        images = to_float(self.task.real)
        tally = Tally()
        if len(images) == len(self.task.prompts):
            self._adherence(tally, images, self.real)
        if self.task.others is not None:
            self._fidelity(tally, self._points(to_float(self.task.others)))
        self._burn(tally, images, self.tokenizer.encode(images))
        found["real images"] = tally.measures
        again, tally = self.tokenizer.decode(self.tokenizer.encode(images)), Tally()
        points = self._points(again)
        if len(images) == len(self.task.prompts):
            self._adherence(tally, again, points)
        self._fidelity(tally, points)
        self._burn(tally, again, None)
        found["reconstructions"] = tally.measures
        if len(images) == len(self.task.prompts):
            wrong = Tally()
            # every image with the prompt of a distant one
            half = len(images) // 2
            self._adherence(wrong, images.roll(half, 0), self.real.roll(half, 0))
            found["shuffled captions"] = wrong.measures
        return found

    def _points(self, images: Tensor) -> Tensor:
        return extract(self.features, images)

    def _adherence(self, tally: Tally, images: Tensor, points: Tensor) -> None:
        if self.task.scenes:
            graded = attribute_accuracy(read_scenes(images), self.task.scenes)
            count = len(images)
            tally.add(("attributes",), lambda: mean_over_images("attributes", graded.per_image))
            share = graded.exact
            error = (share * (1 - share) / count) ** 0.5
            tally.measures["whole_scene"] = Estimate(share, error, count)
        if self.captions is not None:
            ranks, among = self.captions.ranks(points), len(self.captions.candidates)
            tally.add(("caption_top5", "caption_rank"), lambda: caption_measures(ranks, among))

    def _diversity(self, tally: Tally, opened: Tensor) -> None:
        if len(opened) == 0:
            return
        each = len(opened) // len(self.task.open_prompts)
        prompts = [prompt for prompt in self.task.open_prompts for _ in range(each)]
        points = self._points(opened)
        tally.add(("vendi", "distance"), lambda: within_prompts(points, prompts))
        if self.task.leaves_open:
            tally.add(
                ("open_entropy",),
                lambda: open_entropy(read_scenes(opened), prompts, self.task.leaves_open),
            )

    def _fidelity(self, tally: Tally, points: Tensor) -> None:
        names = ("kid", "fd", "precision", "recall", "density", "coverage")
        if self.real is None:
            tally.missing |= dict.fromkeys(names, "the data has no real images")
            return
        real = self.real
        equal = min(len(real), len(points))
        tally.add(("kid",), lambda: kid(real, points))
        tally.add(("fd",), lambda: fd(real[:equal], points[:equal]))
        tally.add(names[2:], lambda: neighbourhood(real, points))

    def _burn(self, tally: Tally, images: Tensor, ids: Tensor | None) -> None:
        tally.add(("clipped",), lambda: burn.clipped(images))
        tally.add(("chroma",), lambda: burn.chroma(images))
        tally.add(("contrast",), lambda: burn.contrast(images))
        if ids is not None:
            tokens = ids
            size = self.tokenizer.codebook_size
            tally.add(("codebook",), lambda: burn.codebook(tokens.flatten(1), size))
            tally.add(("repetition",), lambda: burn.repetition(tokens))


@dataclass(frozen=True)
class _Captions:
    """What captions look like, learned from real images."""

    scorer: CaptionScorer
    candidates: Tensor
    right: Tensor

    @classmethod
    def learn(cls, task: Task, features: Features) -> _Captions | None:
        """None where there is nothing to learn from.

        Raises:
            ImportError: if the sentence encoder is not installed.
        """
        if task.examples is None:
            return None
        encode = minilm()
        chosen = torch.randperm(len(task.examples), generator=torch.Generator().manual_seed(0))
        examples = task.examples.select(sorted(chosen[:EXAMPLES].tolist()))
        points = extract(features, to_float(examples.images))
        scorer = CaptionScorer.fit(points, encode(examples.captions))
        texts, right = distinct(task.prompts)
        return cls(scorer, encode(texts), torch.as_tensor(right))

    def ranks(self, points: Tensor) -> Tensor:
        return caption_ranks(self.scorer, points, self.right, self.candidates)


def shown(trace: Trace, side: int) -> dict[str, Any]:
    """A trace as means over the samples, for JSON: NaN is None.

    Args:
        trace: of all samples.
        side: tokens a side of an image.
    """
    columns = {
        name: getattr(trace, name).nanmean(1)
        for name in ("scale", "distance", "kl", "entropy", "cosine", "saturation", "changed")
    }
    places = trace.places.mean(0)
    means: dict[str, Any] = {"progress": _plain(trace.progress)} | {
        k: _plain(v) for k, v in columns.items()
    }
    if len(places) == side**2 and bool(places.isfinite().all()):
        means["places"] = [_plain(row) for row in places.view(side, side)]
    return means


def _plain(values: Tensor) -> list[float | None]:
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values.tolist()]
