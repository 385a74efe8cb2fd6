"""Reading captioned images: the conventions, and everything that can be wrong with files."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from folders import read, save
from PIL import Image

from tokenizers_vq import to_float, to_images
from unicfg.training.data import ImageSet, read_folder

RED, WHITE = [255, 0, 0], [255, 255, 255]


def write_jsonl(folder, *rows):
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")


def captioned(folder, name="a.png", caption="a red square", **options):
    save(folder / name, **options)
    (folder / name).with_suffix(".txt").write_text(caption)


def read_with_warning(folder, match):
    with pytest.warns(UserWarning, match=match):
        return read(folder)


def image_set(n, attributes=None, captions=None):
    images = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, 3, 2, 2).contiguous()
    return ImageSet(images, captions or [f"caption {i}" for i in range(n)], attributes or [{}] * n)


def first_pixels(images):
    return images.images[:, 0, 0, 0].tolist()


# ImageSet


def test_image_set_refuses_what_does_not_belong_together():
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    with pytest.raises(TypeError, match=r"images are torch\.float32"):
        ImageSet(images.float(), ["a", "b"], [{}, {}])
    with pytest.raises(ValueError, match=r"shape \(2, 4, 4\)"):
        ImageSet(images[:, 0], ["a", "b"], [{}, {}])
    with pytest.raises(ValueError, match=r"shape \(2, 1, 4, 4\)"):
        ImageSet(images[:, :1], ["a", "b"], [{}, {}])
    with pytest.raises(ValueError, match="captions has 1 entries, expected 2"):
        ImageSet(images, ["a"], [{}, {}])
    with pytest.raises(ValueError, match="attributes has 3 entries, expected 2"):
        ImageSet(images, ["a", "b"], [{}, {}, {}])


def test_select_keeps_the_order_and_all_fields_together():
    some = image_set(5, [{"i": i} for i in range(5)]).select([3, 1])
    assert first_pixels(some) == [3, 1]
    assert some.captions == ["caption 3", "caption 1"]
    assert some.attributes == [{"i": 3}, {"i": 1}]
    assert len(some.select([])) == 0


@pytest.mark.parametrize("index", [-1, 5])
def test_select_refuses_an_index_outside(index):
    with pytest.raises(IndexError, match=f"indices hold {index}, expected 0 to 4"):
        image_set(5).select([0, index])


def test_split_follows_the_field_whatever_the_fraction():
    names = ["train", "val_pair", "val", "test", "validation", "dev", "Valid", "eval", "valley"]
    data = image_set(10, [{"split": name} for name in names] + [{}])
    train, val = data.split(0.0)
    assert first_pixels(val) == [1, 2, 4, 5, 6]
    assert first_pixels(train) == [0, 8, 9]  # a test is in neither


def test_a_picture_with_several_captions_is_on_one_side():
    images = torch.arange(200).repeat_interleave(5).to(torch.uint8).view(-1, 1, 1, 1)
    names = [f"{i // 5}.png" for i in range(1000)]
    data = ImageSet(
        images.expand(-1, 3, 2, 2), [f"caption {i}" for i in range(1000)], [{}] * 1000, names=names
    )
    train, val = data.split(0.1)
    assert {*train.names} | {*val.names} == {*names} and not {*train.names} & {*val.names}
    assert 50 <= len(val) <= 150 and len(val) % 5 == 0
    # what cannot be read, or comes later, moves no other
    fewer = data.select(range(7, 800)).split(0.1)[1]
    assert {*fewer.names} == {n for n in {*val.names} & {*names[7:800]}}


def test_split_by_hash_holds_out_the_fraction_and_loses_nothing():
    train, val = image_set(200, captions=["the same caption"] * 200).split(0.3)
    assert sorted(first_pixels(train) + first_pixels(val)) == list(range(200))
    assert 36 <= len(val) <= 84  # 60 +- 24: 3.7 standard deviations, and the hash is fixed


def test_split_by_hash_does_not_move_earlier_images_when_some_are_appended():
    short, long = image_set(100).split(0.2)[1], image_set(200).split(0.2)[1]
    assert [i for i in first_pixels(long) if i < 100] == first_pixels(short)


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 1.5, float("nan")])
def test_split_refuses_a_fraction_outside(fraction):
    with pytest.raises(ValueError, match=f"fraction is {fraction}"):
        image_set(3).split(fraction)


# Pixels


def test_bytes_survive_the_way_through_floats():
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, 3, 1, 1)
    floats = to_float(pixels)
    assert floats.dtype == torch.float32
    assert (floats.min(), floats.max()) == (-1, 1)
    back = np.asarray(to_images(floats)[0])
    assert np.array_equal(back, pixels[0].permute(1, 2, 0).numpy())


def test_to_float_refuses_floats():
    with pytest.raises(TypeError, match=r"torch\.float32, expected torch\.uint8"):
        to_float(torch.zeros(1, 3, 2, 2))


# The three conventions


def test_jsonl_gives_captions_and_the_other_fields_in_its_order(tmp_path):
    save(tmp_path / "images/b.png", colour="blue")
    save(tmp_path / "a.jpg", colour="white")
    write_jsonl(
        tmp_path,
        {"file_name": "images/b.png", "text": "blue", "split": "val", "tags": ["x"]},
        "",
        {"file_name": "a.jpg", "text": " white, \u00fc "},
    )
    data = read(tmp_path)
    assert data.captions == ["blue", "white, \u00fc"]
    assert data.attributes == [{"split": "val", "tags": ["x"]}, {}]
    assert data.images[:, :, 4, 4].tolist() == [[0, 0, 255], WHITE]
    assert data.skipped == ()


def test_csv_gives_the_same_even_with_a_byte_order_mark_and_line_breaks(tmp_path):
    save(tmp_path / "a.png")
    rows = 'file_name,text,style\r\na.png,"red, and\nsquare",3d\r\n'
    (tmp_path / "metadata.csv").write_bytes(b"\xef\xbb\xbf" + rows.encode())
    data = read(tmp_path)
    assert data.captions == ["red, and\nsquare"]
    assert data.attributes == [{"style": "3d"}]


def test_text_files_beside_the_images_in_subfolders_too(tmp_path):
    for name in ("c.png", "sub/b.jpeg", "a.webp", "d.BMP"):
        captioned(tmp_path, name, f"caption of {name}\n")
    data = read(tmp_path)
    names = ("a.webp", "c.png", "d.BMP", "sub/b.jpeg")
    assert data.captions == [f"caption of {name}" for name in names]
    assert data.attributes == [{}] * 4


def test_jsonl_goes_before_csv_before_text_files(tmp_path):
    captioned(tmp_path, caption="from txt")
    assert read(tmp_path).captions == ["from txt"]
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,from csv\n")
    assert read(tmp_path).captions == ["from csv"]
    write_jsonl(tmp_path, {"file_name": "a.png", "text": "from jsonl"})
    assert read(tmp_path).captions == ["from jsonl"]


def test_hidden_files_are_no_images(tmp_path):
    captioned(tmp_path)
    save(tmp_path / ".thumbnails/x.png")
    assert read(tmp_path).skipped == ()


def test_a_contact_sheet_outside_of_the_folders_that_metadata_names_is_left_alone(tmp_path):
    save(tmp_path / "images/a.png")
    save(tmp_path / "sheet.png")
    write_jsonl(tmp_path, {"file_name": "images/a.png", "text": "x"})
    assert read(tmp_path).skipped == ()


# Image modes


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_becomes_white(tmp_path, mode):
    clear = (255, 0, 0, 0) if mode == "RGBA" else (0, 0)
    captioned(tmp_path, mode=mode, colour=clear)
    assert read(tmp_path).images[0, :, 0, 0].tolist() == WHITE


def test_a_transparent_palette_entry_becomes_white_and_others_keep_their_colour(tmp_path):
    image = Image.new("P", (8, 8), 0)
    image.putpalette([0, 0, 255, 255, 0, 0])
    image.paste(1, (4, 0, 8, 8))
    image.save(tmp_path / "a.png", transparency=0)
    (tmp_path / "a.txt").write_text("half red")
    row = read(tmp_path).images[0, :, 3]
    assert row[:, 0].tolist() == WHITE and row[:, 7].tolist() == RED


@pytest.mark.parametrize(
    ("mode", "colour", "suffix", "expected"),
    [
        ("L", 100, "png", [100] * 3),
        ("1", 1, "png", WHITE),
        ("CMYK", (0, 0, 0, 255), "jpg", [0] * 3),
        ("I;16", 100 * 257, "png", [100] * 3),  # Pillow's own conversion would give white
    ],
)
def test_other_modes_become_rgb(tmp_path, mode, colour, suffix, expected):
    captioned(tmp_path, f"a.{suffix}", mode=mode, colour=colour)
    assert read(tmp_path).images[0, :, 4, 4].tolist() == expected


@pytest.mark.parametrize("size", [(40, 20), (400, 200), (4, 2)])
def test_a_wide_image_is_padded_with_white_not_cropped_or_stretched(tmp_path, size):
    captioned(tmp_path, size=size)
    rows = read(tmp_path).images[0, :, :, 4].T.tolist()
    assert rows == [WHITE] * 2 + [RED] * 4 + [WHITE] * 2


def test_a_long_strip_does_not_fill_the_memory(tmp_path):
    captioned(tmp_path, size=(1, 60_000))  # as a square it would have 3.6e9 pixels
    columns = read(tmp_path).images[0, :, 4].T.tolist()
    assert columns.count(RED) == 1 and columns.count(WHITE) == 7


def test_exif_orientation_is_followed(tmp_path):
    image = Image.new("RGB", (16, 16), "white")
    image.paste((255, 0, 0), (0, 0, 16, 8))
    exif = Image.Exif()
    exif[0x0112] = 3  # stored upside down
    image.save(tmp_path / "a.png", exif=exif)
    (tmp_path / "a.txt").write_text("red below")
    pixels = read(tmp_path).images[0]
    assert pixels[:, 0, 4].tolist() == WHITE and pixels[:, 7, 4].tolist() == RED


@pytest.mark.parametrize("kind", ["AVIF", "JPEG2000", "ICO", "TIFF", "PPM", "BMP", "GIF"])
def test_formats_that_metadata_names(tmp_path, kind):
    Image.init()
    if kind not in Image.SAVE:
        pytest.skip(f"this Pillow has no {kind}")
    with open(tmp_path / "a.picture", "wb") as file:
        Image.new("RGB", (16, 16), "red").save(file, kind)
    write_jsonl(tmp_path, {"file_name": "a.picture", "text": "x"})
    pixels = read(tmp_path).images[0, :, 4, 4]
    assert (pixels - torch.tensor(RED)).abs().max() <= 4


# The cache of the hub


@pytest.mark.parametrize("sub", ["", "data/train"])
@pytest.mark.parametrize("convention", ["metadata.jsonl", "metadata.csv", "txt"])
def test_a_data_set_in_the_cache_of_the_hub_is_read_and_what_lies_beside_it_is_not(
    tmp_path, sub, convention
):
    cache = tmp_path / "hub/datasets--someone--shapes"
    folder = cache / "snapshots/0123abc" / sub
    folder.mkdir(parents=True)
    (cache / "blobs").mkdir()

    def put(name, content):
        (cache / "blobs" / f"hash of {name}").write_bytes(content)
        up = Path(*[".."] * len(folder.relative_to(cache).parts))
        (folder / name).symlink_to(up / "blobs" / f"hash of {name}")

    save(tmp_path / "red.png")
    red = (tmp_path / "red.png").read_bytes()
    names = ["a.png", "secret.png"]
    put("a.png", red)
    (tmp_path / "hub/secret.png").write_bytes(red)
    (folder / "secret.png").symlink_to(tmp_path / "hub/secret.png")
    if convention == "metadata.jsonl":
        put(convention, "\n".join(f'{{"file_name": "{n}", "text": "x"}}' for n in names).encode())
    elif convention == "metadata.csv":
        put(convention, "\n".join(["file_name,text", *(f"{n},x" for n in names)]).encode())
    else:
        put("a.txt", b"x")
        put("secret.txt", b"x")
    data = read_with_warning(folder, "skipped 1 files: secret.png .a link that leads out")
    assert data.captions == ["x"] and data.images[0, :, 4, 4].tolist() == RED


def test_a_folder_of_that_name_opens_no_other_folder(tmp_path):
    folder = tmp_path / "snapshots/x"
    captioned(folder, "own.png")
    save(tmp_path / "private/a.png")
    captioned(folder, "b.png")
    (folder / "b.png").unlink()
    (folder / "b.png").symlink_to(tmp_path / "private/a.png")
    assert read_with_warning(folder, "a link that leads out").captions == ["a red square"]


# What cannot be used


def test_broken_images_are_skipped_with_a_reason_and_one_warning(tmp_path):
    captioned(tmp_path, "good.png")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "cut.png")
    whole = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.jpg").write_text("no image at all")
    (tmp_path / "zero.webp").write_bytes(b"")
    for name in ("cut", "text", "zero"):
        (tmp_path / f"{name}.txt").write_text("x")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = read(tmp_path)
    assert data.captions == ["a red square"]
    assert [name for name, reason in data.skipped if reason] == ["cut.png", "text.jpg", "zero.webp"]
    assert len(caught) == 1
    assert "skipped 3 files: cut.png (OSError" in str(caught[0].message)


def test_the_warning_names_the_first_and_counts_the_rest(tmp_path):
    captioned(tmp_path, "z.png")
    for i in range(8):
        save(tmp_path / f"{i}.png")
    data = read_with_warning(tmp_path, r"skipped 8 files: 0\.png .*4\.png [^;]*; and 3 more$")
    assert len(data.skipped) == 8


@pytest.mark.parametrize("limit", [100, 40])  # Pillow only warns at 64 > 40, and raises at > 2 * 20
def test_images_over_pillows_pixel_limit_are_skipped(tmp_path, monkeypatch, limit):
    captioned(tmp_path, "good.png", size=(4, 4))
    captioned(tmp_path, "huge.png", size=(15, 10))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    data = read_with_warning(tmp_path, "skipped 1 files: huge.png .*DecompressionBomb")
    assert len(data) == 1


def test_images_without_caption_and_captions_without_image_count(tmp_path):
    captioned(tmp_path)
    captioned(tmp_path, "empty.png", caption=" \n")
    captioned(tmp_path, "latin.png")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    save(tmp_path / "bare.png")
    (tmp_path / "alone.txt").write_text("nothing to see")
    data = read_with_warning(tmp_path, "skipped 4 files")
    assert len(data) == 1
    reasons = dict(data.skipped)
    assert reasons["bare.png"] == "no caption: no .txt file beside it"
    assert reasons["empty.png"] == "no caption: empty.txt is empty"
    assert reasons["latin.png"].startswith("no caption: ") and "UTF-8" in reasons["latin.png"]
    assert reasons["alone.txt"] == "caption without an image"


def test_metadata_without_image_or_text_and_images_without_line_count(tmp_path):
    for name in ("a", "unlisted", "silent"):
        save(tmp_path / f"{name}.png")
    names = {"a.png": "x", "gone.png": "x", "silent.png": ""}
    write_jsonl(tmp_path, *({"file_name": k, "text": v} for k, v in names.items()))
    data = read_with_warning(tmp_path, "skipped 3 files")
    reasons = dict(data.skipped)
    assert "FileNotFoundError" in reasons["gone.png"]
    assert reasons["silent.png"] == "empty text in metadata.jsonl"
    assert reasons["unlisted.png"] == "no line in metadata.jsonl"
    assert data.captions == ["x"]


# Errors


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder at .*nowhere"):
        read(tmp_path / "nowhere")


def test_an_empty_folder_says_what_was_looked_for(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match=r"metadata\.jsonl, metadata\.csv and images .*\.txt"):
        read(tmp_path)


def test_only_broken_images(tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match=r"no usable image, skipped 1 files: a\.png"):
        read(tmp_path)


@pytest.mark.parametrize("size", [0, -3])
def test_a_size_below_one(tmp_path, size):
    captioned(tmp_path)
    with pytest.raises(ValueError, match=f"size is {size}"):
        read(tmp_path, size)


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("{not json", "is no JSON"),
        ('["a.png", "x"]', "expected an object"),
        ('{"text": "x"}', "no 'file_name'"),
        ('{"file_name": "a.png"}', "no 'text'"),
        ('{"file_name": "a.png", "text": 3}', "text is 3, expected a text"),
        ('{"file_name": null, "text": "x"}', "file_name is None"),
        ('{"file_name": "../a.png", "text": "x"}', "outside of the folder"),
        ('{"file_name": "b/../../a.png", "text": "x"}', "outside of the folder"),
        ('{"file_name": "/etc/a.png", "text": "x"}', "outside of the folder"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, line, match):
    save(tmp_path / "a.png")
    write_jsonl(tmp_path, {"file_name": "a.png", "text": "x"}, "", line)
    with pytest.raises(ValueError, match=rf"metadata\.jsonl line 3.*{match}"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("file_name,text\na.png,x\nb.png\n", "line 3: expected 2 columns"),
        ("file_name,text\na.png,x,y\n", "line 2: expected 2 columns"),
        ("file,text\na.png,x\n", "line 2: no 'file_name'"),
        ('file_name,text\na.png,"x\n', "is no CSV"),
    ],
)
def test_a_malformed_csv_is_named(tmp_path, text, match):
    save(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text(text)
    with pytest.raises(ValueError, match=rf"metadata\.csv.*{match}"):
        read(tmp_path)


def test_metadata_that_is_no_utf8(tmp_path):
    (tmp_path / "metadata.jsonl").write_bytes(b'{"file_name": "a.png", "text": "caf\xe9"}')
    with pytest.raises(ValueError, match=r"metadata\.jsonl is no UTF-8"):
        read(tmp_path)


def test_subfolders_with_metadata_are_splits(tmp_path):
    for part, colour in (("train", (255, 0, 0)), ("validation", (0, 0, 255))):
        (tmp_path / part).mkdir()
        Image.new("RGB", (8, 8), colour).save(tmp_path / part / "a.png")
        line = json.dumps({"file_name": "a.png", "text": f"one of {part}"})
        (tmp_path / part / "metadata.jsonl").write_text(line + "\n")
    train, val = read_folder(tmp_path, 8, progress=False).split(0.5)
    assert train.captions == ["one of train"] and val.captions == ["one of validation"]
    assert val.images[0, :, 0, 0].tolist() == [0, 0, 255]
