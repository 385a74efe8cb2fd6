"""All measures of one cell of a study, and of the real images that it is held against."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
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
from unicfg.evaluation.diversity import open_entropy, readable, within_prompts
from unicfg.evaluation.features import Features, extract, find_features
from unicfg.evaluation.fidelity import fd, kid, neighbourhood
from unicfg.evaluation.results import Estimate
from unicfg.evaluation.tasks import Task
from unicfg.evaluation.uncertainty import mean_over_images, share
from unicfg.sampling import Trace

BATCH = 64  # images through the tokenizer at once
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
        except ValueError as error:  # too few images, or images that it makes nothing of
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
        positions: tokens that went through the transformer for an image, in all its rows and steps.
        seconds: that an image took, in each of some batches (K,), with nobody watching; empty where that says nothing.
    """

    images: Tensor
    opened: Tensor
    ids: Tensor | None
    trace: Trace
    positions: int
    seconds: Tensor


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
        self.others = None if task.others is None else self._points(to_float(task.others))
        self.captions = _Captions.learn(task, self.features)

    def cell(self, drawn: Drawn) -> Tally:
        """All measures of a cell."""
        tally, points = Tally(), self._points(drawn.images)
        self._adherence(tally, drawn.images, points, self.task.prompts)
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
        tally.measures["positions"] = Estimate(drawn.positions, 0.0, len(drawn.images))
        self._cost(tally, drawn.seconds)
        return tally

    def references(self) -> dict[str, dict[str, Estimate]]:
        """The same measures of real images, of what the tokenizer makes of them, and of real images with wrong captions."""
        if self.task.real is None:
            return {}
        found: dict[str, dict[str, Estimate]] = {}
        images, captions = to_float(self.task.real), self.task.captions
        ids, again = self._through_the_tokenizer(images)
        for name, pictures in (("real images", images), ("reconstructions", again)):
            tally, points = Tally(), self._points(pictures)
            self._adherence(tally, pictures, points, captions)
            self._fidelity(tally, points)
            self._burn(tally, pictures, ids)
            if self.task.opened is not None:
                opened = to_float(self.task.opened)
                if name == "reconstructions":
                    opened = self._through_the_tokenizer(opened)[1]
                self._diversity(tally, opened)
            found[name] = tally.measures
        if len(images) > 1:
            # every image with the caption of a distant one
            half, wrong = len(images) // 2, Tally()
            swapped = images.roll(half, 0)
            self._adherence(wrong, swapped, self._points(swapped), captions)
            found["shuffled captions"] = wrong.measures
        return found

    def _through_the_tokenizer(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (N, h, w) of images (N, 3, H, W), and what they are decoded to."""
        device = self.tokenizer.latent_mean.device
        ids = [self.tokenizer.encode(part.to(device)) for part in images.split(BATCH)]
        again = [self.tokenizer.decode(part).cpu() for part in ids]
        return torch.cat(ids).cpu(), torch.cat(again)

    def _points(self, images: Tensor) -> Tensor:
        return extract(self.features, images)

    def _adherence(
        self, tally: Tally, images: Tensor, points: Tensor, prompts: Sequence[str]
    ) -> None:
        if self.task.scenes:
            graded = attribute_accuracy(read_scenes(images), self.task.scenes)
            count = len(images)
            right = round(graded.exact * count)
            tally.add(("attributes",), lambda: mean_over_images("attributes", graded.per_image))
            tally.add(("whole_scene",), lambda: share("whole_scene", right, count))
        if self.captions is not None:
            ranks, among = self.captions.ranks(points, prompts), len(self.captions.candidates)
            tally.add(("caption_top5", "caption_rank"), lambda: caption_measures(ranks, among))

    def _diversity(self, tally: Tally, opened: Tensor) -> None:
        names, of_attributes = ("vendi", "distance"), ("open_entropy", "readable")
        if len(opened) == 0:
            tally.missing |= dict.fromkeys((*names, *of_attributes), "no open prompts were drawn")
            return
        each = len(opened) // len(self.task.open_prompts)
        prompts = [prompt for prompt in self.task.open_prompts for _ in range(each)]
        points = self._points(opened)
        tally.add(names, lambda: within_prompts(points, prompts))
        known = [i for i, prompt in enumerate(prompts) if prompt in self.task.leaves_open]
        if not known:
            tally.missing |= dict.fromkeys(
                of_attributes, "no attributes are known that the open prompts leave open"
            )
            return
        readings = read_scenes(opened[known])
        of, leaves_open = [prompts[i] for i in known], self.task.leaves_open
        tally.add(("open_entropy",), lambda: open_entropy(readings, of, leaves_open))
        tally.add(("readable",), lambda: readable(readings, of, leaves_open))

    def _fidelity(self, tally: Tally, points: Tensor) -> None:
        names = ("kid", "fd", "precision", "recall", "density", "coverage")
        if self.others is None:
            tally.missing |= dict.fromkeys(names, "the data has no real images")
            return
        real = self.others
        equal = min(len(real), len(points))
        tally.add(("kid",), lambda: kid(real, points))
        # evenly spaced: images of one prompt stand together
        some = [torch.arange(equal) * len(own) // equal for own in (real, points)]
        tally.add(("fd",), lambda: fd(real[some[0]], points[some[1]]))
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

    @staticmethod
    def _cost(tally: Tally, seconds: Tensor) -> None:
        if len(seconds) < 2:
            why = "it takes two batches of open prompts at least, drawn by one process alone"
            tally.missing |= dict.fromkeys(("seconds", "rate"), why)
            return
        middle = float(seconds.mean())
        error = float(seconds.std() / len(seconds) ** 0.5)
        tally.measures["seconds"] = Estimate(middle, error, len(seconds))
        tally.measures["rate"] = Estimate(1 / middle, error / middle**2, len(seconds))


@dataclass(frozen=True)
class _Captions:
    """What captions look like, learned from real images."""

    scorer: CaptionScorer
    candidates: Tensor
    places: Mapping[str, int]

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
        texts, _ = distinct(task.prompts)
        return cls(scorer, encode(texts), {text: i for i, text in enumerate(texts)})

    def ranks(self, points: Tensor, prompts: Sequence[str]) -> Tensor:
        right = torch.tensor([self.places[prompt] for prompt in prompts])
        return caption_ranks(self.scorer, points, right, self.candidates)


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
