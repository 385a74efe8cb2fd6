"""Sources of captioned images: every kind gives the same pixels and captions, in shards, whatever the interruptions."""

import dataclasses
import io
import json
import sys
import tarfile
import warnings

import pytest
import torch
from PIL import Image

from unicfg.training import sources
from unicfg.training.data import read_folder
from unicfg.training.recipe import DataRecipe
from unicfg.training.shapes import make_shapes
from unicfg.training.shards import Shards
from unicfg.training.sources import Entry, open_source, prepare_images, read_captions

datasets = pytest.importorskip("datasets")
SCENES = make_shapes(11, size=16, wrong=0.0)


@pytest.fixture(autouse=True)
def small_rounds(monkeypatch):
    monkeypatch.setattr(sources, "ROUND", 4)


def png(i):
    file = io.BytesIO()
    Image.fromarray(SCENES.images[i].permute(1, 2, 0).numpy()).save(file, "PNG")
    return file.getvalue()


def write_folder(folder):
    folder.mkdir()
    lines = []
    for i in range(len(SCENES)):
        (folder / f"{i:02d}.png").write_bytes(png(i))
        lines.append(json.dumps({"file_name": f"{i:02d}.png", "text": SCENES.captions[i]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def write_parquet(folder, break_one=None):
    folder.mkdir()
    rows = [
        {"image": {"bytes": png(i), "path": None}, "text": c} for i, c in enumerate(SCENES.captions)
    ]
    if break_one is not None:
        rows[break_one]["image"]["bytes"] = b"no picture"
    for part, some in enumerate((rows[:6], rows[6:])):
        columns = {"image": [r["image"] for r in some], "text": [r["text"] for r in some]}
        features = datasets.Features(image=datasets.Image(), text=datasets.Value("string"))
        table = datasets.Dataset.from_dict(columns, features=features)
        table.to_parquet(folder / f"{part}.parquet")
    return folder


def write_tars(folder, names=str):
    folder.mkdir(parents=True)
    for part, some in enumerate((range(6), range(6, len(SCENES)))):
        with tarfile.open(folder / f"{part}.tar", "w") as tar:
            for i in some:
                about = json.dumps({"caption": SCENES.captions[i]}).encode()
                for suffix, data in (
                    ("png", png(i)),
                    ("txt", SCENES.captions[i].encode()),
                    ("json", about),
                ):
                    member = tarfile.TarInfo(f"{names(f'{i:03d}')}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return folder


def prepared(recipe, folder, validation=0.0):
    prepare_images(open_source(recipe), folder, validation, workers=2)
    (pixels,) = Shards(folder / "train", ("images",)).first(10**6)
    return pixels, [caption for some in read_captions(folder, "train") for caption in some]


RECIPES = {
    "shapes": lambda folder: DataRecipe(
        source="shapes", count=len(SCENES), image_size=16, wrong=0.0
    ),
    "folder": lambda folder: DataRecipe(path=str(write_folder(folder)), image_size=16),
    "imagefolder": lambda folder: DataRecipe(
        source="datasets", format="imagefolder", path=str(write_folder(folder)), image_size=16
    ),
    "parquet": lambda folder: DataRecipe(
        source="datasets",
        format="parquet",
        path=f"{write_parquet(folder)}/*.parquet",
        image_size=16,
    ),
    "webdataset": lambda folder: DataRecipe(
        source="datasets",
        format="webdataset",
        path=f"{write_tars(folder)}/*.tar",
        image="png",
        caption="txt",
        image_size=16,
    ),
    "webdataset with json": lambda folder: DataRecipe(
        source="datasets",
        format="webdataset",
        path=f"{write_tars(folder)}/*.tar",
        image="png",
        caption="json.caption",
        image_size=16,
    ),
}


@pytest.mark.parametrize("kind", RECIPES)
def test_every_source_gives_the_same_pixels_and_captions(tmp_path, kind):
    pixels, captions = prepared(RECIPES[kind](tmp_path / "data"), tmp_path / "images")
    assert torch.equal(pixels, SCENES.images) and captions == SCENES.captions
    assert Shards(tmp_path / "images/train", ()).count == 3


@pytest.mark.parametrize("kind", RECIPES)
def test_a_source_is_split_alike_by_file_or_by_position_and_caption(tmp_path, kind):
    recipe = RECIPES[kind](tmp_path / "data")
    prepared(recipe, tmp_path / "images", validation=0.4)
    # a study asks for what a training held out: both read a folder
    whole = SCENES if recipe.source != "folder" else read_folder(recipe.path, 16, progress=False)
    expected = whole.split(0.4)
    for part, own in zip(("train", "validation"), expected, strict=True):
        (pixels,) = Shards(tmp_path / "images" / part, ("images",)).first(100)
        assert torch.equal(pixels, own.images) and 0 < len(own) < len(SCENES)


class Counting:
    """A source that counts what is decoded, and may stop in the middle like a killed process."""

    made_from, count, size, skipped = "counting", len(SCENES), 16, []

    def __init__(self, stop_at=None):
        self.stop_at, self.seen = stop_at, []

    def entries(self):
        return (Entry(str(i), i) for i in range(len(SCENES)))

    def read(self, entry):
        if entry.content == self.stop_at:
            raise KeyboardInterrupt
        self.seen.append(entry.content)
        return SCENES.images[entry.content], SCENES.captions[entry.content]


def test_finished_rounds_are_not_read_again(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        prepare_images(Counting(stop_at=9), tmp_path, 0.0, workers=1)
    again = Counting()
    prepare_images(again, tmp_path, 0.0, workers=1)
    assert sorted(again.seen) == [8, 9, 10]
    (pixels,) = Shards(tmp_path / "train", ("images",)).first(100)
    assert torch.equal(pixels, SCENES.images)
    third = Counting()
    prepare_images(third, tmp_path, 0.0, workers=1)
    assert third.seen == []


def test_images_of_another_source_are_refused(tmp_path):
    prepare_images(Counting(), tmp_path, 0.0, workers=1)
    other = Counting()
    other.made_from = "something else"
    with pytest.raises(ValueError, match="was made from other data"):
        prepare_images(other, tmp_path, 0.0, workers=1)
    (tmp_path / "train/shards.json").unlink()  # as an interrupted run leaves it
    with pytest.raises(ValueError, match="was made from other data"):
        prepare_images(other, tmp_path, 0.0, workers=1)


def test_a_folder_that_changed_is_another_source(tmp_path):
    folder = write_folder(tmp_path / "data")
    recipe = DataRecipe(path=str(folder), image_size=16)
    before = open_source(recipe).made_from
    assert open_source(recipe).made_from == before
    (folder / "00.png").write_bytes(png(0) + b"more")
    changed = open_source(recipe).made_from
    assert changed != before
    assert open_source(DataRecipe(path=str(folder), image_size=32)).made_from != changed


@pytest.mark.parametrize("kind", ["folder", "parquet", "webdataset"])
def test_images_that_cannot_be_used_are_counted_and_told(tmp_path, kind):
    if kind == "parquet":
        write_parquet(tmp_path / "data", break_one=3)
        recipe = DataRecipe(
            source="datasets", format="parquet", path=f"{tmp_path}/data/*.parquet", image_size=16
        )
    else:
        recipe = RECIPES[kind](tmp_path / "data")
        if kind == "folder":
            (tmp_path / "data/03.png").write_bytes(b"no picture")
        else:
            data = (tmp_path / "data/0.tar").read_bytes()
            start = data.index(png(3))
            (tmp_path / "data/0.tar").write_bytes(data[:start] + b"no picture" + data[start + 10 :])
    with pytest.warns(UserWarning, match="skipped 1 files: .*UnidentifiedImageError"):
        pixels, captions = prepared(recipe, tmp_path / "images")
    kept = [i for i in range(len(SCENES)) if i != 3]
    assert torch.equal(pixels, SCENES.images[kept])
    assert captions == [SCENES.captions[i] for i in kept]


BAD_ROWS = {
    "no picture": {"image": None, "text": "a"},
    "no caption": {"image": {"bytes": png(0), "path": None}, "text": None},
    "an empty caption": {"image": {"bytes": png(0), "path": None}, "text": "  "},
    "a long caption": {"image": {"bytes": png(0), "path": None}, "text": "a" * 10_001},
    "a lone surrogate": {"image": {"bytes": png(0), "path": None}, "text": "\ud800"},
    "no column": {"image": {"bytes": png(0), "path": None}},
    "a path alone": {"image": {"bytes": None, "path": "/etc/hostname"}, "text": "a"},
    "neither": {"image": {"bytes": None, "path": None}, "text": "a"},
    "a number": {"image": 3, "text": "a"},
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_of_a_data_set_is_counted(tmp_path, monkeypatch, name):
    """Whatever a table holds in place of a picture or a caption."""
    recipe = RECIPES["parquet"](tmp_path / "data")
    source = open_source(recipe)
    rows = [{"image": {"bytes": png(i), "path": None}, "text": f"caption {i}"} for i in range(3)]
    rows.insert(1, BAD_ROWS[name])
    source.splits = {"train": rows}
    with pytest.warns(UserWarning, match="skipped 1 files: train 1 "):
        prepare_images(source, tmp_path / "images", 0.0, workers=1)
    captions = [c for some in read_captions(tmp_path / "images", "train") for c in some]
    assert captions == ["caption 0", "caption 1", "caption 2"]


def test_a_member_of_a_caption_that_is_missing_is_counted(tmp_path):
    recipe = RECIPES["webdataset with json"](tmp_path / "data")
    source = open_source(recipe)
    good = {"png": {"bytes": png(0), "path": None}, "json": {"caption": "good"}}
    bad = [good | {"json": own} for own in (None, [1], {"title": "x"}, "text", {"caption": 3})]
    source.splits = {"train": [*bad, good]}
    with pytest.warns(UserWarning, match="skipped 5 files"):
        prepare_images(source, tmp_path / "images", 0.0, workers=1)
    assert list(read_captions(tmp_path / "images", "train")) == [[], ["good"]]


def test_files_whose_names_say_their_split_are_kept_apart(tmp_path):
    write_parquet(tmp_path / "data")
    names = ["train-00000-of-00001.parquet", "validation-00000-of-00001.parquet"]
    for old, new in zip(sorted((tmp_path / "data").iterdir()), names, strict=True):
        old.rename(old.with_name(new))
    (tmp_path / "data/test-00000-of-00001.parquet").write_bytes(
        (tmp_path / "data" / names[0]).read_bytes()
    )
    recipe = DataRecipe(
        source="datasets", format="parquet", path=f"{tmp_path}/data/*.parquet", image_size=16
    )
    _, captions = prepared(recipe, tmp_path / "images", validation=0.9)
    assert captions == SCENES.captions[:6]
    held_out = [c for some in read_captions(tmp_path / "images", "validation") for c in some]
    assert held_out == SCENES.captions[6:]


def test_captions_that_changed_are_another_source(tmp_path):
    folder = write_folder(tmp_path / "data")
    recipe = DataRecipe(source="datasets", format="imagefolder", path=str(folder), image_size=16)
    before = open_source(recipe).made_from
    moved = folder.rename(tmp_path / "moved")
    assert open_source(dataclasses.replace(recipe, path=str(moved))).made_from == before
    folder = moved.rename(folder)
    file = folder / "metadata.jsonl"
    file.write_text(file.read_text().replace("red", "tan").replace("small", "large"))
    assert open_source(recipe).made_from != before


def test_rounds_of_large_images_have_fewer_of_them(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "ROUND_BYTES", 3 * 3 * 16**2)
    prepare_images(Counting(), tmp_path, 0.0, workers=1)
    shards = Shards(tmp_path / "train", ("images",))
    assert shards.count == 4 and torch.equal(shards.first(100)[0], SCENES.images)


def test_nothing_usable_is_an_error(tmp_path):
    folder = write_folder(tmp_path / "data")
    for file in folder.glob("*.png"):
        file.write_bytes(b"no picture")
    with (
        pytest.warns(UserWarning, match="skipped 11"),
        pytest.raises(ValueError, match="no usable image, skipped 11"),
    ):
        prepared(DataRecipe(path=str(folder), image_size=16), tmp_path / "images")


def test_splits_that_the_data_names_are_kept_and_a_test_split_is_left_alone(tmp_path):
    for part, some in (("train", range(6)), ("validation", range(6, 9)), ("test", range(9, 11))):
        (tmp_path / "data" / part).mkdir(parents=True)
        lines = []
        for i in some:
            (tmp_path / "data" / part / f"{i}.png").write_bytes(png(i))
            lines.append(json.dumps({"file_name": f"{i}.png", "text": SCENES.captions[i]}))
        (tmp_path / "data" / part / "metadata.jsonl").write_text("\n".join(lines))
    recipe = DataRecipe(
        source="datasets", format="imagefolder", path=str(tmp_path / "data"), image_size=16
    )
    pixels, captions = prepared(recipe, tmp_path / "images", validation=0.9)
    assert captions == SCENES.captions[:6] and torch.equal(pixels, SCENES.images[:6])
    held_out = [c for some in read_captions(tmp_path / "images", "validation") for c in some]
    assert held_out == SCENES.captions[6:9]


def test_a_folder_that_names_its_splits_keeps_tests_out_of_the_training(tmp_path):
    parts = ["train", "dev", "test", "Validation", "eval", "val_pair", "other"]
    folder = write_folder(tmp_path / "data")
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for row, part in zip(lines, parts, strict=False):  # the others are of no split
        row["split"] = part
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    captions = [row["text"] for row in lines]
    _, train = prepared(
        DataRecipe(path=str(folder), image_size=16), tmp_path / "images", validation=0.9
    )
    assert train == [captions[0], *captions[6:]]
    held_out = [c for some in read_captions(tmp_path / "images", "validation") for c in some]
    assert held_out == [captions[1], captions[3], captions[5]]


def test_names_in_archives_and_metadata_lead_nowhere(tmp_path):
    """Names like ../../x in a tar file are never a place to write to, or to read from."""
    write_tars(tmp_path / "inner/data", names=lambda own: f"../../{own}")
    recipe = DataRecipe(
        source="datasets",
        format="webdataset",
        path=f"{tmp_path}/inner/data/*.tar",
        image="png",
        caption="txt",
        image_size=16,
    )
    before = sorted(tmp_path.rglob("*"))
    prepared(recipe, tmp_path / "images")
    made = set(tmp_path.rglob("*")) - set(before)
    assert all((tmp_path / "images") in (own, *own.parents) for own in made)

    folder = write_folder(tmp_path / "folder")
    (tmp_path / "secret.png").write_bytes(png(0))
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    lines[3] = json.dumps({"file_name": "../secret.png", "text": "a secret"})
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    recipe = DataRecipe(source="datasets", format="imagefolder", path=str(folder), image_size=16)
    # newer versions of datasets refuse the whole set, older ones leave it to us
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            _, captions = prepared(recipe, tmp_path / "more images")
        except ValueError as error:
            assert "secret.png" in str(error)
        else:
            assert "secret.png is outside of" in str(told[0].message) and len(captions) == 10


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"source": "folder"}, ValueError, "data.path is empty, expected the folder"),
        ({"source": "datasets"}, ValueError, "expected a folder, files as in"),
        ({"path": "nowhere"}, FileNotFoundError, "no folder at nowhere"),
        (
            {"source": "datasets", "format": "parquet", "path": "none/*.parquet"},
            FileNotFoundError,
            "names no file",
        ),
    ],
)
def test_a_source_that_is_not_there_is_named(settings, error, message):
    with pytest.raises(error, match=message):
        open_source(DataRecipe(**settings))


def test_a_column_that_is_not_there_is_named(tmp_path):
    write_parquet(tmp_path / "data")
    settings = {"source": "datasets", "format": "parquet", "path": f"{tmp_path}/data/*.parquet"}
    for changes, column in (({"image": "picture"}, "picture"), ({"caption": "title"}, "title")):
        with pytest.raises(ValueError, match=f"{column}.*expected one of.*image, text"):
            prepared(DataRecipe(**settings, image_size=16, **changes), tmp_path / column)


def test_an_archive_that_is_cut_off_is_an_error_with_its_name(tmp_path):
    folder = write_tars(tmp_path / "data")
    file = folder / "1.tar"
    file.write_bytes(file.read_bytes()[:3000])
    recipe = DataRecipe(
        source="datasets",
        format="webdataset",
        path=f"{folder}/*.tar",
        image="png",
        caption="txt",
        image_size=16,
    )
    with pytest.raises(ValueError, match=r"data/\*\.tar"):
        prepared(recipe, tmp_path / "images")


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'unicfg\[data\]'"):
        open_source(DataRecipe(source="datasets", path="x", format="parquet"))
