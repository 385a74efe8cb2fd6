"""The built-in scenes: the captions' truth must be in the pixels."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from unicfg.training import shapes
from unicfg.training.shapes import Scene, Thing, describe, make_shapes, render

RED = Thing("circle", "red", "small")
BLUE = Thing("square", "blue", "large")
# Written out here, so that the tests do not believe the table that they check.
DIRECTIONS = {"above": (0, -1), "below": (0, 1), "left of": (-1, 0), "right of": (1, 0)}


@pytest.fixture(scope="module")
def data():
    return make_shapes(2000, seed=3)


def scene_of(attributes):
    things = tuple(Thing(**thing) for thing in attributes["objects"])
    return Scene(attributes["background"], things, attributes["relation"])


def scenes(data):
    return [scene_of(attributes) for attributes in data.attributes]


def share_of(pixels, colour, background):
    """How much of each pixel (H, W) is covered by a colour, the rest being background."""
    way = np.subtract(colour, background, dtype=float)
    away = pixels.transpose(1, 2, 0).astype(float) - background
    return (away @ way) / (way @ way)


def masks(pixels, scene):
    """One coverage map an object, each in its own half of the image."""
    background = shapes.BACKGROUNDS[scene.background]
    found = []
    for k, thing in enumerate(scene.objects):
        mask = share_of(pixels, shapes.COLOURS[thing.colour], background).clip(0, 1)
        if scene.relation:
            mask = mask * half(pixels.shape[1], scene.relation, k)
        found.append(mask)
    return found


def half(side, relation, k):
    """The half of the image in which the first (k = 0) or second object is."""
    dx, dy = DIRECTIONS[relation]
    ramp = np.arange(side) + 0.5 - side / 2
    across = dx * ramp[None, :] + dy * ramp[:, None]
    return across > 0 if k == 0 else across < 0


def centre(mask):
    rows, columns = np.indices(mask.shape)
    return np.array([(columns * mask).sum(), (rows * mask).sum()]) / mask.sum()


# Constants


def test_all_colours_are_far_from_one_another():
    named = {**shapes.COLOURS, **shapes.BACKGROUNDS}
    assert len(named) == len(shapes.COLOURS) + len(shapes.BACKGROUNDS) == 12
    for (a, x), (b, y) in itertools.combinations(named.items(), 2):
        assert math.dist(x, y) >= 90, (a, b)


# Pixels agree with attributes


def test_background_and_object_colours_are_in_the_pixels(data):
    for i, scene in enumerate(scenes(data)):
        pixels = data.images[i].numpy()
        border = np.concatenate([pixels[:, 0], pixels[:, -1]], axis=1)
        assert np.abs(np.median(border, axis=1) - shapes.BACKGROUNDS[scene.background]).max() == 0
        for thing, mask in zip(scene.objects, masks(pixels, scene), strict=True):
            x, y = centre(mask).round().astype(int)
            assert np.abs(pixels[:, y, x] - np.int64(shapes.COLOURS[thing.colour])).max() <= 2


def test_objects_stand_as_the_relation_says(data):
    """The halves are measured here without looking at the relation: only colours tell the objects apart."""
    checked = 0
    for i, scene in enumerate(scenes(data)):
        if len(scene.objects) < 2 or scene.objects[0].colour == scene.objects[1].colour:
            continue
        pixels = data.images[i].numpy().transpose(1, 2, 0).astype(float)
        centres = [
            centre(np.abs(pixels - shapes.COLOURS[thing.colour]).max(-1) <= 2)
            for thing in scene.objects
        ]
        apart = centres[0] - centres[1]
        along = apart @ DIRECTIONS[scene.relation]
        assert along >= 0.3 * 32, scene
        assert np.linalg.norm(apart) < along * math.sqrt(2), (
            scene
        )  # nearer to this axis than the other
        checked += 1
    assert checked > 900


def test_objects_lie_inside_and_do_not_touch():
    data = make_shapes(
        500, size=128, seed=3
    )  # large enough for the free margin to be a whole pixel
    for i, scene in enumerate(scenes(data)):
        drawn = (
            data.images[i] != torch.tensor(shapes.BACKGROUNDS[scene.background])[:, None, None]
        ).any(0)
        assert not drawn[[0, -1]].any() and not drawn[:, [0, -1]].any(), scene
        if scene.relation:
            upright = DIRECTIONS[scene.relation][0] == 0
            assert not (drawn if upright else drawn.T)[63:65].any(), scene


def test_large_is_larger_than_small_for_every_shape():
    for shape in shapes.SHAPES:
        areas = {size: [] for size in shapes.SIZES}
        for size, k in itertools.product(shapes.SIZES, range(30)):
            scene = Scene("white", (Thing(shape, "blue", size),))
            pixels = render(scene, 32, np.random.default_rng(k)).numpy()
            areas[size].append(masks(pixels, scene)[0].sum())
        assert min(areas["large"]) > 2 * max(areas["small"])


def test_size_can_be_told_without_knowing_the_shape():
    """By the larger side of the bounding box, in pixels that are at least half covered."""
    extents = {size: [] for size in shapes.SIZES}
    for shape, size, k in itertools.product(shapes.SHAPES, shapes.SIZES, range(30)):
        scene = Scene("white", (Thing(shape, "blue", size),))
        mask = masks(render(scene, 32, np.random.default_rng(k)).numpy(), scene)[0] >= 0.5
        extents[size].append(max(mask.any(0).sum(), mask.any(1).sum()))
    assert min(extents["large"]) >= max(extents["small"]) + 2


def test_shapes_can_be_told_apart_even_when_small():
    """A nearest-template reader: mean coverage maps, centred on the bounding box, at four times the pixels."""

    def patch(shape, size, k):
        scene = Scene("white", (Thing(shape, "blue", size),))
        mask = masks(render(scene, 32, np.random.default_rng(k)).numpy(), scene)[0]
        spread = torch.from_numpy(mask)[None, None]
        zoom = torch.nn.functional.interpolate(spread, scale_factor=4, mode="bilinear")[
            0, 0
        ].numpy()
        x, y = centre(zoom).round().astype(int)
        return np.pad(zoom, 32)[y : y + 64, x : x + 64]

    for size in shapes.SIZES:
        templates = {s: np.mean([patch(s, size, k) for k in range(40)], 0) for s in shapes.SHAPES}
        for shape, k in itertools.product(shapes.SHAPES, range(100, 150)):
            seen = patch(shape, size, k)
            guess = min(templates, key=lambda s: ((templates[s] - seen) ** 2).sum())
            assert guess == shape, (size, k)


def test_positions_vary():
    scene = Scene("white", (BLUE,))
    centres = [
        centre(masks(render(scene, 32, np.random.default_rng(k)).numpy(), scene)[0])
        for k in range(50)
    ]
    assert np.ptp(centres, axis=0).min() > 3


@pytest.mark.parametrize("size", [16, 24, 64])
def test_other_sizes_show_the_same_scenes(size):
    small, other = make_shapes(20, size=32), make_shapes(20, size=size)
    assert other.images.shape == (20, 3, size, size)
    assert other.attributes == small.attributes and other.captions == small.captions
    resized = torch.nn.functional.interpolate(other.images.float(), (32, 32), mode="area")
    assert (resized - small.images).abs().mean() < 6


# Randomness


def test_image_i_depends_on_seed_and_i_alone():
    few, many = make_shapes(10, seed=5), make_shapes(30, seed=5)
    assert torch.equal(few.images, many.images[:10])
    assert few.captions == many.captions[:10] and few.attributes == many.attributes[:10]
    assert not torch.equal(few.images, make_shapes(10, seed=6).images)


def test_global_random_state_is_neither_used_nor_changed():
    torch_state, before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = make_shapes(5)
    torch.manual_seed(99)
    assert torch.equal(first.images, make_shapes(5).images)
    torch.set_rng_state(torch_state)
    make_shapes(5)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == before).all()


def test_wrong_changes_captions_and_no_pixels():
    clean, noisy = make_shapes(50, wrong=0.0), make_shapes(50, wrong=1.0)
    assert torch.equal(clean.images, noisy.images)
    assert all(c != n for c, n in zip(clean.captions, noisy.captions, strict=True))


# Captions


def test_describe_says_everything():
    assert describe(Scene("white", (Thing("star", "yellow", "large"),))) == (
        "a large yellow star on a white background"
    )
    assert describe(Scene("grey", (RED, BLUE), "left of")) == (
        "a small red circle left of a large blue square on a grey background"
    )


def test_every_scene_has_its_own_caption():
    one = [
        Scene(b, (Thing(s, c, z),))
        for b in shapes.BACKGROUNDS
        for s in shapes.SHAPES
        for c in shapes.COLOURS
        for z in shapes.SIZES
    ]
    assert len({describe(scene) for scene in one}) == len(one) == 256


def test_shares_of_kinds_lie_in_their_binomial_intervals(data):
    kinds = [attributes["caption_kind"] for attributes in data.attributes]
    for kind, p in (("vague", 0.075), ("wrong", 0.075), ("exact", 0.85)):
        spread = 4 * math.sqrt(p * (1 - p) * len(data))  # four standard deviations
        assert abs(kinds.count(kind) - p * len(data)) <= spread, kind
    pairs = sum(attributes["relation"] is not None for attributes in data.attributes)
    assert abs(pairs - 0.6 * len(data)) <= 4 * math.sqrt(0.24 * len(data))


def test_every_value_appears(data):
    things = [thing for scene in scenes(data) for thing in scene.objects]
    assert {thing.shape for thing in things} == set(shapes.SHAPES)
    assert {thing.colour for thing in things} == set(shapes.COLOURS)
    assert {thing.size for thing in things} == set(shapes.SIZES)
    assert {scene.background for scene in scenes(data)} == set(shapes.BACKGROUNDS)
    assert {scene.relation for scene in scenes(data)} == {None, *shapes.RELATIONS}


def test_attributes_hold_the_truth_whatever_the_caption(data):
    for caption, attributes in zip(data.captions, data.attributes, strict=True):
        exact = describe(scene_of(attributes))
        assert attributes["exact_caption"] == exact
        assert (caption == exact) == (attributes["caption_kind"] == "exact")


def test_wrong_captions_differ_in_exactly_one_attribute():
    data = make_shapes(400, wrong=1.0, seed=1)
    changed = set()
    for caption, attributes in zip(data.captions, data.attributes, strict=True):
        if attributes["caption_kind"] == "wrong":
            fits = [
                name
                for name, other in one_step_away(scene_of(attributes))
                if describe(other) == caption
            ]
            assert len(fits) == 1, caption
            changed |= set(fits)
    assert changed == {"background", "relation", "shape", "colour", "size"}


def one_step_away(scene):
    for background in set(shapes.BACKGROUNDS) - {scene.background}:
        yield "background", replace(scene, background=background)
    if scene.relation:
        for relation in set(shapes.RELATIONS) - {scene.relation}:
            yield "relation", replace(scene, relation=relation)
    values = {"shape": shapes.SHAPES, "colour": shapes.COLOURS, "size": shapes.SIZES}
    for k, thing in enumerate(scene.objects):
        for name, known in values.items():
            for value in set(known) - {getattr(thing, name)}:
                objects = list(scene.objects)
                objects[k] = replace(thing, **{name: value})
                yield name, replace(scene, objects=tuple(objects))


def test_vague_captions_are_true_and_shorter():
    data = make_shapes(400, wrong=1.0, seed=2)
    values = {*shapes.SHAPES, *shapes.COLOURS, *shapes.BACKGROUNDS, *shapes.SIZES}
    vague = 0
    for caption, attributes in zip(data.captions, data.attributes, strict=True):
        if attributes["caption_kind"] == "vague":
            vague += 1
            exact = attributes["exact_caption"]
            assert len(caption) < len(exact)
            assert {w for w in caption.split() if w in values} <= set(exact.split())
            assert " a orange" not in f" {caption}" and " an red" not in f" {caption}"
    assert vague > 150


def test_two_objects_always_differ_and_their_share_is_settable(data):
    assert all(len(set(scene.objects)) == len(scene.objects) for scene in scenes(data))
    for share, count in ((0.0, 1), (1.0, 2)):
        some = make_shapes(30, two_objects=share)
        assert {len(attributes["objects"]) for attributes in some.attributes} == {count}


# Errors


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"n": 0}, "n is 0"),
        ({"size": 8}, "size is 8, expected a multiple of 8 from 16"),
        ({"size": 33}, "size is 33"),
        ({"seed": -1}, "seed is -1"),
        ({"wrong": 1.1}, r"wrong is 1\.1"),
        ({"two_objects": -0.1}, r"two_objects is -0\.1"),
        ({"wrong": float("nan")}, "wrong is nan"),
    ],
)
def test_make_shapes_refuses(arguments, match):
    with pytest.raises(ValueError, match=match):
        make_shapes(**{"n": 2} | arguments)


def test_scenes_refuse_what_cannot_be_drawn():
    with pytest.raises(ValueError, match="shape is 'hexagon', expected one of circle, square"):
        Thing("hexagon", "red", "small")
    with pytest.raises(ValueError, match="colour is 'grey'"):
        Thing("circle", "grey", "small")
    with pytest.raises(ValueError, match="size is 'huge'"):
        Thing("circle", "red", "huge")
    with pytest.raises(ValueError, match="background is 'red'"):
        Scene("red", (RED,))
    with pytest.raises(ValueError, match="objects has 0 entries"):
        Scene("white", ())
    with pytest.raises(ValueError, match="objects has 3 entries"):
        Scene("white", (RED, BLUE, RED), "above")
    with pytest.raises(ValueError, match="relation is None"):
        Scene("white", (RED, BLUE))
    with pytest.raises(ValueError, match="relation is 'above', expected None"):
        Scene("white", (RED,), "above")
    with pytest.raises(ValueError, match="size is 20"):
        render(Scene("white", (RED,)), 20, np.random.default_rng(0))
