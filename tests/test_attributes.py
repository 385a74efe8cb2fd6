"""Reading the truth back: right on real scenes, honest about damaged and empty ones; and the marks given for it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tokenizers_vq import to_float
from unicfg.evaluation.accuracy import KINDS, attribute_accuracy, scene_of
from unicfg.evaluation.attributes import Reading, read_scene, read_scenes
from unicfg.training.shapes import BACKGROUNDS, COLOURS, Scene, Thing, make_shapes, render


@pytest.fixture(scope="module")
def scenes():
    """2000 scenes that no training sees, with their truth."""
    data = make_shapes(2000, seed=991, wrong=0.0)
    return data.images, [scene_of(attributes) for attributes in data.attributes]


@pytest.fixture(scope="module")
def few(scenes):
    return scenes[0][:200], scenes[1][:200]


def test_995_of_1000_real_scenes_are_read_exactly(scenes):
    images, truth = scenes
    accuracy = attribute_accuracy(read_scenes(images), truth)
    assert accuracy.exact >= 0.995 and accuracy.mean >= 0.995
    assert set(accuracy.by_kind) == set(KINDS) and min(accuracy.by_kind.values()) >= 0.995


def test_the_batch_does_not_matter_nor_the_dtype(few):
    images, _ = few
    readings = read_scenes(images[:20])
    for a, b in zip(readings, map(read_scene, images[:20]), strict=True):
        assert a.background == b.background and len(a.objects) == len(b.objects)
        for one, other in zip(a.objects, b.objects, strict=True):
            # sums of a batch are rounded otherwise on some machines
            assert other.fit == pytest.approx(one.fit, abs=1e-5)
            assert other.diameter == pytest.approx(one.diameter, abs=1e-5)
            assert replace(other, fit=one.fit, diameter=one.diameter) == one
    for a, b in zip(readings, read_scenes(to_float(images[:20])), strict=True):
        assert [(o.shape, o.colour, o.size) for o in a.objects] == [
            (o.shape, o.colour, o.size) for o in b.objects
        ]


@pytest.mark.parametrize(
    ("damage", "least"),
    [
        (
            lambda x: (
                x + 12 / 127.5 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
            ),
            0.97,
        ),
        (lambda x: F.avg_pool2d(F.pad(x, (1, 0, 1, 0), mode="replicate"), 2, 1), 0.95),
        (lambda x: 0.9 * x, 0.99),
    ],
    ids=["noise of 12 levels", "blur of 2 pixels", "less contrast"],
)
def test_slight_damage_does_no_harm(few, damage, least):
    images, truth = few
    assert attribute_accuracy(read_scenes(damage(to_float(images))), truth).mean >= least


def test_larger_pictures_are_read_too():
    data = make_shapes(60, seed=5, size=64, wrong=0.0)
    truth = [scene_of(attributes) for attributes in data.attributes]
    assert attribute_accuracy(read_scenes(data.images), truth).exact == 1.0


def test_nothing_is_credited_to_rubbish():
    noise = torch.rand(40, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    stripes = torch.zeros(1, 3, 32, 32)
    stripes[..., ::4] = 1.0
    things = [
        thing for reading in read_scenes(torch.cat([noise, stripes])) for thing in reading.objects
    ]
    assert all(thing.shape is None for thing in things)
    for name, rgb in BACKGROUNDS.items():
        blank = torch.tensor(rgb, dtype=torch.uint8)[:, None, None].expand(3, 32, 32)
        assert read_scene(blank) == Reading(name, ())


RUBBISH = {
    "cross": lambda x, y: (abs(x) < 1.5) & (abs(y) < 9) | (abs(y) < 1.5) & (abs(x) < 9),
    "ellipse": lambda x, y: (x / 8) ** 2 + (y / 5.5) ** 2 < 1,
    "rectangle": lambda x, y: (abs(x) < 8) & (abs(y) < 5),
    "inverted triangle": lambda x, y: (abs(y) < 8) & (abs(x) < (8 - y) / 2),
}


@pytest.mark.parametrize("name", RUBBISH)
def test_a_shape_that_is_none_of_the_four_is_not_named(name):
    fine = 8  # drawn so many times larger, then averaged, as the scenes are
    y, x = torch.meshgrid(*[torch.arange(-16, 16, 1 / fine) + 0.5 / fine] * 2, indexing="ij")
    inside = torch.nn.functional.avg_pool2d(RUBBISH[name](x, y)[None, None].float(), fine)[0]
    red = torch.tensor(COLOURS["red"], dtype=torch.float32)[:, None, None]
    image = (255 * (1 - inside) + red * inside).round().to(torch.uint8)
    seen = read_scene(image).objects
    assert seen and all(thing.shape is None for thing in seen)


SCENE = Scene(
    "grey", (Thing("star", "yellow", "large"), Thing("square", "blue", "small")), "left of"
)


def grade(shown, asked):
    image = render(shown, 32, np.random.default_rng(3))
    return attribute_accuracy([read_scene(image)], [asked])


def wrong_kinds(accuracy):
    return {kind for kind, share in accuracy.by_kind.items() if share < 1}


def altered(**changes):
    return replace(SCENE, objects=(replace(SCENE.objects[0], **changes), SCENE.objects[1]))


@pytest.mark.parametrize(
    ("asked", "kind"),
    [
        (replace(SCENE, background="white"), "background"),
        (altered(shape="circle"), "shape"),
        (altered(colour="green"), "colour"),
        (altered(size="small"), "size"),
        (replace(SCENE, relation="right of"), "relation"),
        (replace(SCENE, relation="above"), "relation"),
    ],
)
def test_one_wrong_attribute_is_one_wrong_mark(asked, kind):
    assert grade(SCENE, SCENE).exact == 1.0
    accuracy = grade(SCENE, asked)
    assert wrong_kinds(accuracy) == {kind}
    assert accuracy.mean == pytest.approx(8 / 9)  # background, count, 2 x 3, relation: nine marks
    assert accuracy.exact == 0.0


def test_swapped_objects_break_the_relation_and_nothing_else():
    swapped = replace(SCENE, objects=SCENE.objects[::-1])
    assert wrong_kinds(grade(swapped, SCENE)) == {"relation"}
    # the same picture said the other way round is right
    assert grade(swapped, replace(SCENE, relation="right of")).exact == 1.0


def test_missing_and_surplus_objects():
    alone = Scene("grey", SCENE.objects[:1])
    missing = grade(alone, SCENE)
    # background and three of the six object attributes are right; count and relation are not
    assert missing.mean == pytest.approx(4 / 9)
    surplus = grade(SCENE, alone)
    assert wrong_kinds(surplus) == {"count"} and surplus.mean == pytest.approx(4 / 5)
    nothing = attribute_accuracy([Reading("grey", ())], [SCENE])
    assert nothing.mean == pytest.approx(1 / 9)


def test_spread_by_hand():
    right, wrong = Reading("grey", ()), Reading("white", ())
    asked = [Scene("grey", SCENE.objects[:1])] * 4
    accuracy = attribute_accuracy([right, right, wrong, wrong], asked)
    assert accuracy.per_image.tolist() == pytest.approx([0.2, 0.2, 0, 0])
    assert accuracy.mean == pytest.approx(0.1)
    # deviations of 0.1: variance 4 * 0.01 / 3, divided by 4
    assert accuracy.standard_error == pytest.approx((0.04 / 3 / 4) ** 0.5)


def test_unequal_numbers_and_bad_images():
    with pytest.raises(ValueError, match="1 readings and 2 scenes"):
        attribute_accuracy([Reading(None, ())], [SCENE, SCENE])
    with pytest.raises(ValueError, match=r"images have shape \(2, 32, 32\)"):
        read_scenes(torch.zeros(2, 32, 32))
    with pytest.raises(TypeError, match=r"torch\.int64"):
        read_scenes(torch.zeros(1, 3, 32, 32, dtype=torch.int64))
    with pytest.raises(ValueError, match="at least 16"):
        read_scenes(torch.zeros(1, 3, 8, 8))
