"""Whether drawings show a concept in a style: who draws the truth is right, who does not is not, and nothing is drawn twice."""

import json
import random
import re
import shutil
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny import pipeline

from models import TextToImage
from tokenizers_vq import to_float
from tokenizers_vq.images import from_image
from unicfg import Guidance
from unicfg.evaluation.features import pixels
from unicfg.training.data import read_folder

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import composition
from composition import MEASURES, Judge

SIZE = 16
STYLES = {"google": (1.0, 0.7, 0.7), "twitter": (0.7, 1.0, 0.7), "3d": (0.7, 0.7, 1.0)}
CONCEPTS = 26  # one style of each of 24 is held out, and all of the other two
PAIRS = 24
RUN = ["--scales", "1", "3", "--families", "ar", "flow"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures whose pattern is the concept, and whose colour is the style."""
    made = tmp_path_factory.mktemp("pictures")
    patterns = torch.rand(CONCEPTS, 4, 4, generator=torch.Generator().manual_seed(0)) > 0.5
    with (made / "metadata.jsonl").open("w") as metadata:
        for i, pattern in enumerate(patterns):
            for j, (style, colour) in enumerate(STYLES.items()):
                large = pattern.repeat_interleave(4, 0).repeat_interleave(4, 1)[..., None]
                picture = (255 * large * torch.tensor(colour)).to(torch.uint8)
                Image.fromarray(picture.numpy()).save(made / f"{style}-{i}.png")
                split = "val_concept" if i >= PAIRS else "val_pair" if i % 3 == j else "train"
                line = {"file_name": f"{style}-{i}.png", "text": f"c{i} in {style} style"}
                line |= {"concept": f"c{i}", "style": style, "split": split}
                metadata.write(json.dumps(line) + "\n")
    return made


@pytest.fixture(scope="module")
def data(folder):
    return read_folder(folder, SIZE, progress=False)


@pytest.fixture(scope="module")
def pairs(data):
    return composition.asked_for(data, "val_pair", PAIRS)


class Lossless:
    """A tokenizer that changes nothing."""

    def encode(self, images):
        return images

    decode = encode


def fit(data, without):
    return Judge.fit(data, pixels(), Lossless(), without)


@pytest.fixture(scope="module")
def judge(data, pairs):
    return fit(data, pairs)


class Artist:
    """Draws what ``draw`` says for each prompt."""

    def __init__(self, draw, by):
        self.draw, self.by = draw, by

    def sample(self, prompts, *, seeds, guidance, batch_size, branches=None):
        assert list(seeds) == list(range(len(prompts)))
        assert (branches is None) == (self.by == "whole")
        if branches is None:
            assert guidance.scale == 3
            return torch.stack([self.draw(prompt) for prompt in prompts])
        (styles,) = branches.values()
        both = list(zip(prompts, styles, strict=True))
        early, late = (guidance.scale.at(progress) for progress in (composition.LATE, 0.651))
        if self.by == "parts":
            assert early == late == {"cond": 3, "style": 3, "uncond": -5}
            return torch.stack([self.draw(f"{a} {b.removeprefix('emoji ')}") for a, b in both])
        assert early == {"cond": 3, "style": 0, "uncond": -2}
        assert late == {"cond": 0, "style": 3, "uncond": -2}
        assert all(f"emoji {a[a.index(' in ') + 1 :]}" == b for a, b in both)
        return torch.stack([self.draw(prompt) for prompt in prompts])


def judged(draw, judge, data, asked, by="whole"):
    prompts = composition.prompts_for(data, asked, by)
    return composition.measure(Artist(draw, by), judge, prompts, asked, 3.0)


def means(cell):
    return {name: cell[name]["mean"] for name in MEASURES}


def picture_of(data, caption):
    return to_float(data.images[data.captions.index(caption)])


def in_another_style(caption):
    concept, style = re.fullmatch(r"(.*) in (.*) style", caption).groups()
    after = dict(pairwise([*STYLES, next(iter(STYLES))]))
    return f"{concept} in {after[style]} style"


@pytest.mark.parametrize("by", composition.BY)
def test_the_truth_is_right_in_everything_and_wrong_for_another_prompt(judge, data, pairs, by):
    cell = judged(lambda caption: picture_of(data, caption), judge, data, pairs, by)
    assert means(cell) == dict.fromkeys(MEASURES, 1.0)
    # 24 of 24: p = 25 / 26
    error = (25 / 26 / 26 / 24) ** 0.5
    assert all(cell[name]["standard_error"] == pytest.approx(error) for name in MEASURES)
    # each concept is asked for once
    assert cell["shuffled"]["concept"]["mean"] == cell["shuffled"]["pair"]["mean"] == 0
    styles = [data.attributes[i]["style"] for i in pairs]
    same = sum(a == b for a, b in zip(styles, [styles[-1], *styles], strict=False)) / PAIRS
    assert cell["shuffled"]["style"]["mean"] == pytest.approx(same)


def test_another_style_of_the_concept_is_the_concept_only(judge, data, pairs):
    cell = judged(lambda caption: picture_of(data, in_another_style(caption)), judge, data, pairs)
    assert means(cell) == {"concept": 1, "concept_5": 1, "style": 0, "pair": 0}


def test_a_share_and_its_error_by_hand(judge, data, pairs):
    wrong = {data.captions[i] for i in pairs[:6]}
    cell = judged(
        lambda caption: picture_of(
            data, in_another_style(caption) if caption in wrong else caption
        ),
        judge,
        data,
        pairs,
    )
    assert means(cell) == {"concept": 1, "concept_5": 1, "style": 0.75, "pair": 0.75}
    # 18 of 24: p = 19 / 26
    assert cell["pair"]["standard_error"] == pytest.approx((19 / 26 * 7 / 26 / 24) ** 0.5)


def test_noise_is_at_chance(judge, pairs):
    asked = pairs.repeat(20)
    noise = torch.rand(len(asked), 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    found = judge.grade(judge.see(2 * noise - 1), asked)
    chance = {"concept": 1 / PAIRS, "concept_5": 5 / PAIRS, "style": 1 / 3, "pair": 1 / PAIRS}
    for name, share in chance.items():
        assert found[name]["mean"] < share + 4 * (share * (1 - share) / len(asked)) ** 0.5
    assert found["style"]["mean"] == pytest.approx(1 / 3, abs=4 * (2 / 9 / len(asked)) ** 0.5)


def test_a_picture_that_is_left_out_is_found_by_its_other_styles_or_not_at_all(judge, data, pairs):
    seen = judge.see(to_float(data.images[pairs]))
    left_out = judge.grade(seen, pairs, left_out=True)
    assert left_out.keys() == {"concept", "concept_5", "style"}
    assert left_out["concept_5"]["mean"] == left_out["style"]["mean"] == 1
    assert judge.grade(seen, pairs)["pair"]["mean"] == 1
    # as if each picture were a concept of its own
    alone = replace(judge, concepts=torch.arange(len(data)))
    assert alone.grade(seen, pairs, left_out=True)["concept_5"]["mean"] == 0


def test_the_reader_of_styles_has_not_seen_what_is_judged(judge, data, pairs):
    seen = [i for i, own in enumerate(data.attributes) if own["split"] == "train"]
    for touched, changes in ((pairs, False), (torch.tensor(seen[:1]), True)):
        images = data.images.clone()
        images[touched] = 255 - images[touched]
        changed = type(data)(images, data.captions, data.attributes)
        reader = fit(changed, pairs).reader
        assert torch.equal(reader.weights, judge.reader.weights) is not changes
    # nor what is judged of the pictures that were trained on
    asked = composition.asked_for(data, "train", 16)
    images = data.images.clone()
    images[asked] = 0
    first, second = (
        fit(own, asked).reader.weights
        for own in (data, type(data)(images, data.captions, data.attributes))
    )
    assert torch.equal(first, second)


def test_the_order_of_prompts_does_not_depend_on_their_number(data):
    for split, count in (("val_pair", PAIRS), ("train", 2 * PAIRS), ("val_concept", 6)):
        every = composition.asked_for(data, split, 1000)
        assert len(set(every.tolist())) == len(every) == count
        assert {data.attributes[i]["split"] for i in every} == {split}
        assert torch.equal(composition.asked_for(data, split, 5), every[:5])
        assert not torch.equal(every, every.sort().values)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    made = tmp_path_factory.mktemp("weights") / "tiny"
    for family in ("ar", "flow"):
        pipeline(family=family).save_pretrained(made)
    return made


@pytest.fixture
def drawn(monkeypatch):
    """What was drawn: family, scale and number of prompts of each call."""
    calls, sample = [], TextToImage.sample

    def counted(self, prompts, **options):
        calls.append((self.family, options["guidance"].scale, len(prompts)))
        return sample(self, prompts, **options)

    monkeypatch.setattr(TextToImage, "sample", counted)
    return calls


def run(folder, weights, out, *more):
    options = ["--data", str(folder), "--weights", str(weights), "--out", str(out)]
    composition.main([*options, "-n", "16", "--features", "pixels", *more])
    return out / "tiny-composition.json"


@pytest.fixture(scope="module")
def finished(folder, weights, tmp_path_factory):
    return run(folder, weights, tmp_path_factory.mktemp("out"), *RUN)


def test_what_is_finished_is_not_drawn_again(finished, folder, weights, drawn, tmp_path):
    held, out = finished.read_bytes(), tmp_path / "tiny-composition.json"
    out.write_bytes(held)
    run(folder, weights, tmp_path, *RUN)
    assert drawn == [] and out.read_bytes() == held
    results = json.loads(held)
    del results["families"]["flow"]["train"]["3"]
    out.write_text(json.dumps(results))
    run(folder, weights, tmp_path, *RUN)
    assert drawn == [("flow", 3.0, 16)] and json.loads(out.read_text()) == json.loads(held)
    drawn.clear()
    results["families"]["ar"]["made_with"] = "other weights"
    out.write_text(json.dumps(results))
    run(folder, weights, tmp_path, "--scales", "3", "--families", "ar", "--split", "val_pair")
    assert drawn == [("ar", 3.0, 16)]


def test_a_run_that_was_stopped_has_kept_its_cells(folder, weights, drawn, tmp_path, monkeypatch):
    measure = composition.measure

    def stopped(*args):
        if len(drawn) == 1:
            raise KeyboardInterrupt
        return measure(*args)

    monkeypatch.setattr(composition, "measure", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(folder, weights, tmp_path, *RUN, "--split", "val_pair")
    monkeypatch.setattr(composition, "measure", measure)
    run(folder, weights, tmp_path, *RUN, "--split", "val_pair")
    assert [call[:2] for call in drawn] == [(f, s) for f in ("ar", "flow") for s in (1.0, 3.0)]


def test_cells_are_of_these_weights_pictures_and_samplers(data, weights, monkeypatch):
    pipe = TextToImage.from_pretrained(weights, "ar")
    own = composition.fingerprint(pipe, data)
    assert own == composition.fingerprint(TextToImage.from_pretrained(weights, "ar"), data)
    images = data.images.clone()
    images[0, 0, 0, 0] ^= 1
    others = [
        (TextToImage.from_pretrained(weights, "flow"), data),
        (pipe, type(data)(images, data.captions, data.attributes)),
        (pipe, type(data)(data.images, data.captions[::-1], data.attributes)),
        (pipe, type(data)(data.images, data.captions, data.attributes[::-1])),
    ]
    made = {composition.fingerprint(*other) for other in others}
    for name, value in (("LATE", 0.5), ("NEAREST", 4)):
        monkeypatch.setattr(composition, name, value)
        made.add(composition.fingerprint(pipe, data))
    assert len(made) == len(others) + 2 and own not in made


def test_the_table_has_the_numbers_of_the_file(finished, folder, weights, drawn, tmp_path):
    results, rng = json.loads(finished.read_text()), random.Random(0)
    cells = [
        results["families"][family][split][s]
        for family in ("ar", "flow")
        for split in ("val_pair", "train")
        for s in ("1", "3")
    ]
    for part in (*cells, *(cell["shuffled"] for cell in cells)):
        part |= {m: {"mean": rng.random(), "standard_error": rng.random()} for m in MEASURES}
    file = tmp_path / finished.name
    file.write_text(json.dumps(results))
    run(folder, weights, tmp_path, *RUN)
    assert drawn == []
    page = file.with_suffix(".md").read_text()
    sections = dict(zip(["", "val_pair", "train"], page.split("\n## "), strict=True))
    for split in ("val_pair", "train"):
        assert f"({split})" in sections[split].splitlines()[0]
        rows = [
            [part.strip() for part in line.split("|")[1:-1]]
            for line in sections[split].splitlines()
            if "+-" in line
        ]
        expected = []
        for name, label in MEASURES.items():
            for family in ("ar", "flow"):
                one, three = (results["families"][family][split][s][name] for s in ("1", "3"))
                gain = 100 * (max(one["mean"], three["mean"]) - one["mean"])
                expected.append([label, family, percent(one), percent(three), f"{gain:.1f}"])
        for name, own in results["references"][split].items():
            expected.append([name, *(percent(own[m]) if m in own else "-" for m in MEASURES)])
        for family in ("ar", "flow"):
            cells = results["families"][family][split]
            best = "3" if cells["3"]["concept"]["mean"] > cells["1"]["concept"]["mean"] else "1"
            shuffled = [percent(cells[best]["shuffled"][m]) for m in MEASURES]
            expected.append([f"{family}, s = {best}, by another prompt", *shuffled])
        assert rows == expected


def percent(share):
    return f"{100 * share['mean']:.1f} +- {100 * share['standard_error']:.1f}"


def test_a_grid_shows_the_first_pairs_and_what_they_were_asked_for(
    finished, folder, weights, data, tmp_path
):
    (tmp_path / finished.name).write_bytes(finished.read_bytes())
    more = ["--grid", str(tmp_path / "grid.png"), "--grid-scale", "2", "--grid-family", "ar"]
    run(folder, weights, tmp_path, *RUN, *more, "--plot", str(tmp_path / "plot.png"))
    prompts = [data.captions[i] for i in composition.asked_for(data, "val_pair", 32)]
    pipe = TextToImage.from_pretrained(weights, "ar")
    images = pipe.sample(prompts, seeds=range(PAIRS), guidance=Guidance(2.0))
    with Image.open(tmp_path / "grid.png") as sheet:
        shown = from_image(sheet)
    cell = composition.captioned(Image.new("RGB", (SIZE, SIZE)), "words").width
    assert shown.shape == (3, 4 + 3 * (cell + 4), 4 + 8 * (cell + 4))
    large = composition.GRID_CELL
    for i, image in enumerate(images):
        y, x = (4 + place * (cell + 4) for place in divmod(i, 8))
        x += (cell - large) // 2
        picture = shown[:, y : y + large, x : x + large]
        expected = image.clamp(-1, 1).repeat_interleave(8, 1).repeat_interleave(8, 2)
        assert (picture - expected).abs().max() <= 1.01 / 127.5
        assert (shown[:, y + large : y + cell, x : x + large] < 0).any()  # words
    with Image.open(tmp_path / "plot.png") as curves:
        assert curves.width > 1000


def test_drawings_by_parts_have_rows_of_their_own(finished, folder, weights, drawn, tmp_path):
    (tmp_path / finished.name).write_bytes(finished.read_bytes())
    ways = ["--by", "whole", "parts", "late", "--plot", str(tmp_path / "plot.png")]
    file = run(folder, weights, tmp_path, *RUN, *ways, "--split", "val_pair")
    assert len(drawn) == 8 and {n for *_, n in drawn} == {16}  # what is whole was there
    families = json.loads(file.read_text())["families"]
    assert families["flow, by parts"]["val_pair"].keys() == {"1", "3"}
    assert families["ar, the style late"]["val_pair"].keys() == {"1", "3"}
    assert composition.asked_how("ar, the style late") == ("ar", "late")
    page = file.with_suffix(".md").read_text()
    assert "--by whole parts late" in page and (tmp_path / "plot.png").exists()
    (whole,) = re.findall(r"\| style \| flow \|.*\| ([\d.-]+) \|\n", page)
    (parts,) = re.findall(r"\| style \| flow, by parts \|.*\| ([\d.-]+) \|\n", page)
    assert float(whole) >= 0 and parts == "-"  # at 1 two conditions are guided already


def test_pictures_that_are_named_several_times_are_seen_once(folder, data, tmp_path):
    several = tmp_path / "several"
    shutil.copytree(folder, several)
    lines = [json.loads(line) for line in (several / "metadata.jsonl").read_text().splitlines()]
    with (several / "metadata.jsonl").open("w") as metadata:
        for line in lines:
            pair = line | {"caption_of": "pair"}
            alone = line | {"text": line["concept"], "caption_of": "concept"}
            for own in (pair, pair, alone):
                metadata.write(json.dumps(own) + "\n")
    read = read_folder(several, SIZE, progress=False)
    whole = composition.of_pairs(read)
    assert len(read) == 3 * len(data) and whole.captions == data.captions
    assert torch.equal(whole.images, data.images)
    assert composition.of_pairs(data).attributes == data.attributes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--split", "val_concept"], "val_concept has 6 prompts, expected 16 or more"),
        (["--scales", "1", "1.0"], "expected none twice"),
        (["--grid", "grid.png", "--grid-family", "hybrid"], "'hybrid', expected one of"),
    ],
)
def test_what_cannot_be_measured_is_refused(folder, weights, tmp_path, capsys, options, message):
    with pytest.raises(SystemExit):
        run(folder, weights, tmp_path, *options)
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())
