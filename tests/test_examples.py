"""The numbered examples: each runs as its command does, in a small size, and shows what it says."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from models import TextToImage
from tokenizers_vq.hub import WEIGHTS
from unicfg import Guidance
from unicfg.training.recipe import load_recipe
from unicfg.training.shards import Shards
from unicfg.training.sources import read_captions
from unicfg.training.trainer import train

EXAMPLES = Path(__file__).parent.parent / "examples"
FILE = EXAMPLES / "7_hybrid.py"


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs an example as a command and returns what it prints."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        capsys.readouterr()
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def size(file):
    with Image.open(file) as picture:
        return picture.size


def test_they_are_numbered_without_gaps_and_the_readme_names_each():
    files = {file.name for file in EXAMPLES.glob("[0-9]*.py")}
    assert sorted(int(name.split("_")[0]) for name in files) == [*range(1, len(files) + 1)]
    table = (EXAMPLES / "README.md").read_text()
    assert set(re.findall(r"\]\((\d+_\w+\.py)\)", table)) == files


def test_a_folder_of_images_becomes_a_model_and_a_second_run_does_not_train_again(run, tmp_path):
    prompts = ["a happy red face", "a sad blue face with a hat"]
    command = ["--out", tmp_path, "--steps", 4, "--count", 60, "--prompts", *prompts]
    first = run("2_train_on_a_folder.py", *command)
    assert "goes on" not in first
    picture, log = tmp_path / "samples.png", tmp_path / "run/logs/flow/metrics.jsonl"
    before = picture.read_bytes(), log.read_text()
    width, height = size(picture)
    assert width > 9 * 96 and 2 * 96 < height < 3 * 96  # three scales, three seeds, two prompts
    assert TextToImage.from_pretrained(tmp_path / "run", "flow").text.length == 12
    for more in ([], ["--images", tmp_path / "faces"]):  # drawn again, and taken for a user's own
        assert "flow goes on from step 4" in run("2_train_on_a_folder.py", *command, *more)
        assert (picture.read_bytes(), log.read_text()) == before


RECIPE = """
out: {out}
data: {{source: shapes, image_size: 32, count: 48, validation: 0.3}}
tokenizer:
  {{factor: 8, width: 16, depth: 1, levels: [5, 5], training: {{steps: 4, batch_size: 8, warmup: 1}}}}
text: {{vocabulary: 300, length: 24}}
model:
  width: 32
  depth: 1
  heads: 2
  training: {{steps: 40, batch_size: 8, warmup: 1, ema: 0.5, learning_rate: 1.0e-2}}
"""


def test_published_weights_have_the_losses_of_their_training(run, tmp_path):
    recipe, card, shipped = (tmp_path / name for name in ("recipe.yaml", "card.md", "shipped"))
    recipe.write_text(RECIPE.format(out=tmp_path / "run"))
    card.write_text("# tiny\n")
    families = ("ar", "flow", "hybrid")
    for family in families:
        train(load_recipe(recipe, family), resume=family != "ar")
    options = ["--card", card, "--recipe", recipe, "--reconstruction", tmp_path / "shown.png"]
    assert "MB in" in run("publish.py", tmp_path / "run", shipped, *options)
    page = (shipped / "README.md").read_text()
    assert page.startswith("# tiny\n") and size(tmp_path / "shown.png")[0] > 8 * 96
    rows = [line.split("|")[1:-1] for line in page.splitlines() if line.startswith("| ")][1:]
    assert [row[0].strip() for row in rows[1::2]] == list(families)
    # by the same function, the weights before they were rounded have the loss of the log
    loss_of = runpy.run_path(str(EXAMPLES / "publish.py"))["shipped_loss"]
    images = tmp_path / "run/images"
    (pixels,) = Shards(images / "validation", ("images",)).first(512)
    captions = [caption for own in read_captions(images, "validation") for caption in own]
    for family, row in zip(families, rows[1::2], strict=True):
        trained, _, as_shipped = (float(cell) for cell in row[3:])
        assert as_shipped == pytest.approx(trained, rel=0.02)  # 8 bits a weight
        small = TextToImage.from_pretrained(shipped, family)
        measured = loss_of(small, load_recipe(recipe, family), pixels, captions)
        assert row[5].strip() == f"{measured:.3f}"
        assert torch.int8 in {t.dtype for t in load_file(shipped / family / WEIGHTS).values()}
        log = (tmp_path / "run/logs" / family / "metrics.jsonl").read_text().splitlines()
        logged = json.loads(log[-1])["validation_loss"]
        assert f"{logged:.3f}" == row[3].strip()
        pipe = TextToImage.from_pretrained(tmp_path / "run", family)
        own = loss_of(pipe, load_recipe(recipe, family), pixels, captions)
        assert own == pytest.approx(logged, rel=1e-5)
        if family == "ar":  # denoisers begin without heed of the caption
            assert own != loss_of(pipe, load_recipe(recipe, family), pixels, captions[::-1])


def test_families_are_compared_on_equal_prompts(run, tmp_path):
    """Both draw far more of the prompts at 1 and at 2 than without them."""
    command = ["--families", "ar", "flow", "--scales", 0, 1, 2, "-n", 12, "--out", tmp_path]
    lines = run("3_compare.py", *command).splitlines()
    for family, line in zip(("ar", "flow"), lines, strict=False):
        none, plain, guided = (int(value) for value in re.findall(r": (\d+) \+-", line))
        assert line.split()[0] == family and none < 50 and plain > none + 20 and guided > 80
    assert size(tmp_path / "grid.png")[0] > 3 * 128
    assert size(tmp_path / "plot.png")[0] > 500


def test_a_weaker_model_is_weaker_and_guides_away_from_itself(run, tmp_path):
    out = run("4_weak_model.py", "--scales", 1, 2, "-n", 12, "--out", tmp_path)
    for part in out.split("alone draws ")[1:]:
        alone = int(part.split()[0])
        drawn = re.findall(r"of the prompts drawn: (\d+) \+- \d+ % .*?, (\d+) .*, (.*)\n", part)
        (plain, same, none), (guided, _, _) = drawn
        assert alone + 5 < int(plain) < int(guided)
        assert plain == same and none == "+0 +- 0 (no difference to be told)"
    width, height = size(tmp_path / "weak_model.png")
    assert width > 2 * 128 and height > 4 * 128


def test_what_is_said_of_a_difference_depends_on_its_error():
    verdict = runpy.run_path(str(EXAMPLES / "4_weak_model.py"))["verdict"]
    steady = torch.tensor([0.1, 0.2, 0.1, 0.2])
    assert verdict(steady).endswith("(better)") and verdict(-steady).endswith("(worse)")
    assert "no difference" in verdict(torch.tensor([0.9, -0.6, 0.4, -0.5]))


def test_it_takes_fewer_than_40_lines_and_nothing_of_the_models():
    text = FILE.read_text()
    inside = text.split("from here ---\n")[1].split("# --- to here")[0]
    lines = len([line for line in inside.splitlines() if line.strip()])
    readme = " ".join((FILE.parent.parent / "README.md").read_text().split())
    assert lines < 40 and f"guidable in {lines} lines" in readme
    assert "from models" not in text and "tokenizers_vq import" not in text


def test_guidance_makes_words_and_pictures_right():
    """At s = 0 by chance, at 1 weakly, at 4 mostly, with letters and latents from one Guidance object."""
    example = runpy.run_path(str(FILE))
    torch.manual_seed(0)
    model = example["train"](60, torch.Generator().manual_seed(0))
    label = torch.arange(96).remainder(8)[:, None]
    right = {}
    for s in (0.0, 1.0, 4.0):
        drawn = example["sample"](model, label, Guidance(s), list(range(96)))
        right[s] = example["correct"](*drawn, label)
    for half in (0, 1):
        assert right[0.0][half] < 0.35
        assert right[1.0][half] + 0.1 < right[4.0][half]
        assert right[4.0][half] > 0.8


def test_a_gpt2_believes_what_it_reads_the_more_the_higher_the_scale(tmp_path):
    example = runpy.run_path(str(EXAMPLES / "5_language_model.py"))
    model = example["train"](120)
    scales = [0.0, 1.0, 2.0]
    shares = example["believes"](model, scales, 200)
    assert shares[0] < 0.1 and 0.4 < shares[1] < 0.8 and shares[2] > 0.95
    example["plot"](scales, shares, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
