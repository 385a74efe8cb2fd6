"""How much of what a caption asks for is in the image: attributes asked for, against attributes read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import torch
from torch import Tensor

from unicfg.evaluation.attributes import Reading, Seen
from unicfg.training.shapes import RELATIONS, Scene, Thing

KINDS = ("background", "count", "shape", "colour", "size", "relation")


@dataclass(frozen=True)
class Accuracy:
    """Attributes that are right.

    An image of one object has 5 attributes (background, count, shape, colour, size), one of two objects 9 (with the
    relation). Answers drawn at random would get about a third.

    Attributes:
        per_image: share of an image's attributes that is right (N,).
        by_kind: for each kind of attribute, the share that is right over all images that have it.
        exact: share of images with all attributes right.
    """

    per_image: Tensor
    by_kind: dict[str, float]
    exact: float

    @property
    def mean(self) -> float:
        """Mean of ``per_image``."""
        return float(self.per_image.mean())

    @property
    def standard_error(self) -> float:
        """Of the mean, over images."""
        return float(self.per_image.std() / len(self.per_image) ** 0.5)


def attribute_accuracy(readings: Sequence[Reading], scenes: Sequence[Scene]) -> Accuracy:
    """Compare what was read with what was asked for.

    Objects are matched so that most attributes are right; one that is missing has none right, and one too many makes
    the count wrong. A relation is right if the matched objects stand in it along the axis on which they are
    further apart.

    Args:
        readings: of N images.
        scenes: N, that the images were to show.

    Raises:
        ValueError: if their numbers differ, or there are none.
    """
    if len(readings) != len(scenes) or not scenes:
        raise ValueError(
            f"{len(readings)} readings and {len(scenes)} scenes, expected equally many, at least one"
        )
    graded = [_grade(*pair) for pair in zip(readings, scenes, strict=True)]
    answers = [[right for marks in image.values() for right in marks] for image in graded]
    by_kind = {}
    for kind in KINDS:
        marks = [right for image in graded for right in image[kind]]
        if marks:
            by_kind[kind] = sum(marks) / len(marks)
    return Accuracy(
        torch.tensor([sum(marks) / len(marks) for marks in answers]),
        by_kind,
        sum(all(marks) for marks in answers) / len(answers),
    )


def _grade(reading: Reading, scene: Scene) -> dict[str, list[bool]]:
    """Right or wrong, for every attribute of a scene, by kind."""
    wanted = len(scene.objects)
    # None stands for an object that is not there
    seen: list[Seen | None] = [*reading.objects, *[None] * max(0, wanted - len(reading.objects))]
    matched = max(
        (_grade_objects(chosen, scene) for chosen in permutations(seen, wanted)),
        key=lambda marks: sum(map(sum, marks.values())),
    )
    return {
        "background": [reading.background == scene.background],
        "count": [len(reading.objects) == wanted],
        **matched,
    }


def _grade_objects(seen: Sequence[Seen | None], scene: Scene) -> dict[str, list[bool]]:
    pairs = list(zip(seen, scene.objects, strict=True))
    marks = {
        name: [_has(found, name, asked) for found, asked in pairs]
        for name in ("shape", "colour", "size")
    }
    return marks | {"relation": [] if scene.relation is None else [_related(seen, scene)]}


def _has(found: Seen | None, name: str, asked: Thing) -> bool:
    return found is not None and getattr(found, name) == getattr(asked, name)


def _related(seen: Sequence[Seen | None], scene: Scene) -> bool:
    first, second = seen
    if first is None or second is None or scene.relation is None:
        return False
    away = [a - b for a, b in zip(first.centre, second.centre, strict=True)]
    axis = 0 if abs(away[0]) > abs(away[1]) else 1
    direction = RELATIONS[scene.relation]
    return direction[1 - axis] == 0 and away[axis] * direction[axis] > 0


def scene_of(attributes: dict[str, object]) -> Scene:
    """The scene that ``make_shapes`` describes in an image's attributes."""
    objects = attributes["objects"]
    assert isinstance(objects, (list, tuple))
    things = tuple(Thing(**thing) for thing in objects)
    return Scene(attributes["background"], things, attributes["relation"])  # type: ignore[arg-type]
